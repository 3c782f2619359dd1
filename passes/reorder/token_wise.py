"""Which operators do the same to every token: a proof by schema and axes, one operator at a time.

`tokens_of(node, dim)` says at which dimension of its inputs an operator finds the tokens that are
at ``dim`` of its output, provided that permuting them there is the same as permuting them here.
No answer means that nothing was proved: convolutions, sums over tokens, reshapes that split or
merge the token axis, random numbers and operators that are not in the table are not moved across.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from attn_rewrite.graph import arguments, is_tensor, op_name, shape_of
from attn_rewrite.memory import written
from attn_rewrite.passes.find.axes import Axes
from attn_rewrite.passes.find.layout import pull

Tokens = Mapping[fx.Node, int]
Rule = Callable[[fx.Node, dict[str, Any], int], Tokens | None]


def tokens_of(node: fx.Node, dim: int) -> Tokens | None:
    """Inputs that carry the tokens at ``dim`` of ``node``, and their dimensions there.

    Empty where no input does and all tokens are alike (zeros); None where nothing is proved.
    Inputs that are not named are the same for every token, or only asked for a shape.
    """
    if op_name(node) == "getitem" and is_tensor(node):
        return _layout(node, dim)
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not is_tensor(node):
        return None
    named, name = arguments(node), op_name(node)
    random = torch.Tag.nondeterministic_seeded in target.tags
    if random:
        return _RANDOM[name](node, named, dim) if name in _RANDOM else None
    if written(node) and name not in _WRITES:
        return None
    if name in _RULES:
        return _RULES[name](node, named, dim)
    if torch.Tag.pointwise in target.tags or name in _WRITES:
        return _broadcast(node, dim)
    return _layout(node, dim)


def only_shape(user: fx.Node, operand: fx.Node) -> bool:
    """True if ``user`` asks ``operand`` for its shape or type and reads no element."""
    name = op_name(user)
    if name in ("sym_size", "_assert_tensor_metadata", "sym_stride", "sym_numel") or name in _ALIKE:
        return True
    return name in ("type_as", "view_as", "expand_as", "reshape_as") and operand is not user.args[0]


def _same(first: Any, second: Any) -> bool:
    return str(first) == str(second)


def _inputs(node: fx.Node) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if is_tensor(n)]


def _broadcast(node: fx.Node, dim: int) -> Tokens | None:
    """Operators of elements: dimensions are counted from the last one."""
    shape = shape_of(node)
    found: dict[fx.Node, int] = {}
    for operand in _inputs(node):
        other = shape_of(operand)
        at = len(other) - (len(shape) - dim)
        if at >= 0 and not _same(other[at], 1):
            if not _same(other[at], shape[dim]):
                return None
            found[operand] = at
    return found or None


def _layout(node: fx.Node, dim: int) -> Tokens | None:
    """Views, permutations, slices and parts: follow the axis as the finder of attention does."""
    axes = Axes()
    shape = shape_of(node)
    token = axes.line(shape[dim])
    dims = tuple(token if d == dim else axes.fresh(n) for d, n in enumerate(shape))
    found = pull(node, dims, axes)
    if found is None or axes.resolve(token) != token:
        return None
    source, places = found
    at = [
        d for d, place in enumerate(places)
        if isinstance(place, tuple) and token[0] in axes.resolve(place)
    ]  # fmt: skip
    if not at:
        return {} if all(isinstance(place, tuple) for place in places) else None
    whole = places[at[0]]
    assert isinstance(whole, tuple)
    if len(at) > 1 or axes.resolve(whole) != token:
        return None
    return {source: at[0]} if _same(shape_of(source)[at[0]], shape[dim]) else None


def _rows(node: fx.Node, named: dict[str, Any], dim: int) -> Tokens | None:
    """``linear``: every vector of the last dimension by itself."""
    return {named["input"]: dim} if dim < len(shape_of(node)) - 1 else None


def _matmul(node: fx.Node, named: dict[str, Any], dim: int) -> Tokens | None:
    left, right = (named.get("self"), named.get("mat2", named.get("other")))
    if not (is_tensor(left) and is_tensor(right)):
        return None
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    rank, ranks = len(shape_of(node)), (len(shape_of(left)), len(shape_of(right)))
    if min(ranks) < 2 or left is right:
        return None
    if dim == rank - 1:
        return {right: ranks[1] - 1}
    if dim == rank - 2:
        return {left: ranks[0] - 2}
    return _leading(node, (left, right), dim)


def _leading(node: fx.Node, operands: tuple[fx.Node, ...], dim: int) -> Tokens | None:
    """A dimension of a batch, where operands may broadcast."""
    shape = shape_of(node)
    found: dict[fx.Node, int] = {}
    for operand in operands:
        other = shape_of(operand)
        at = len(other) - (len(shape) - dim)
        if at < 0 or _same(other[at], 1):
            continue
        if not _same(other[at], shape[dim]):
            return None
        found[operand] = at
    return found or None


def _addmm(node: fx.Node, named: dict[str, Any], dim: int) -> Tokens | None:
    bias, left = named["self"], named["mat1"]
    if dim != 0 or len(shape_of(bias)) != 1 or bias is left:
        return None
    return {left: 0}


def _normalised(node: fx.Node, named: dict[str, Any], dim: int) -> Tokens | None:
    inner = len(named["normalized_shape"])
    return {named["input"]: dim} if dim < len(shape_of(node)) - inner else None


def _along(node: fx.Node, named: dict[str, Any], dim: int) -> Tokens | None:
    """Operators along one other dimension: softmax, running sums, gated units."""
    source = named.get("self", named.get("input"))
    other = named.get("dim")
    rank = len(shape_of(node))
    if not isinstance(source, fx.Node) or not isinstance(other, int) or other % rank == dim:
        return None
    return {source: dim} if len(shape_of(source)) == rank else None


def _reduced(node: fx.Node, named: dict[str, Any], dim: int) -> Tokens | None:
    """Sums, means and maxima over other dimensions."""
    source, dims = named["self"], named.get("dim")
    if dims is None or dims == []:
        return None
    rank = len(shape_of(source))
    gone = {d % rank for d in (dims if isinstance(dims, (list, tuple)) else [dims])}
    left = list(range(rank)) if named.get("keepdim") else [d for d in range(rank) if d not in gone]
    if len(left) != len(shape_of(node)) or left[dim] in gone:
        return None
    return {source: left[dim]}


def _cat(node: fx.Node, named: dict[str, Any], dim: int) -> Tokens | None:
    parts = named["tensors"]
    rank = len(shape_of(node))
    same_rank = all(is_tensor(p) and len(shape_of(p)) == rank for p in parts)
    return dict.fromkeys(parts, dim) if same_rank and named["dim"] % rank != dim else None


def _stack(node: fx.Node, named: dict[str, Any], dim: int) -> Tokens | None:
    at = named["dim"] % len(shape_of(node))
    if at == dim or not all(map(is_tensor, named["tensors"])):
        return None
    return dict.fromkeys(named["tensors"], dim - (at < dim))


def _selected(node: fx.Node, named: dict[str, Any], dim: int) -> Tokens | None:
    rank = len(shape_of(node))
    if named["dim"] % rank == dim or named["index"] is named["self"]:
        return None
    return {named["self"]: dim}


def _embedding(node: fx.Node, named: dict[str, Any], dim: int) -> Tokens | None:
    indices = named["indices"]
    inside = dim < len(shape_of(indices)) and indices is not named["weight"]
    return {indices: dim} if inside else None


def _complex(node: fx.Node, named: dict[str, Any], dim: int) -> Tokens | None:
    """Pairs of reals as complex numbers, and back: the last dimension comes or goes."""
    source = named["self"]
    return {source: dim} if dim < min(len(shape_of(source)), len(shape_of(node))) else None


def _part(node: fx.Node, named: dict[str, Any], dim: int) -> Tokens | None:
    source = named["self"]
    return {source: dim} if len(shape_of(source)) == len(shape_of(node)) else None


def _alike(node: fx.Node, named: dict[str, Any], dim: int) -> Tokens | None:
    return {}


def _pad(node: fx.Node, named: dict[str, Any], dim: int) -> Tokens | None:
    rank, pads = len(shape_of(node)), named["pad"]
    untouched = dim < rank - len(pads) // 2
    return {named["self"]: dim} if untouched else None


def _dropout(node: fx.Node, named: dict[str, Any], dim: int) -> Tokens | None:
    """The identity where nothing is dropped."""
    idle = named.get("train") is False or named.get("p") == 0
    return {named["input"]: dim} if idle else None


def _attention(node: fx.Node, named: dict[str, Any], dim: int) -> Tokens | None:
    """Queries do not see each other: the query axis, where no mask tells queries apart."""
    q, k, v, mask = (named[n] for n in ("query", "key", "value", "attn_mask"))
    rank = len(shape_of(node))
    if named["dropout_p"] or q in (k, v):
        return None
    if dim < rank - 2:
        alone = mask is None and k is not v and not named["enable_gqa"]
        return _leading(node, (q, k, v), dim) if alone else None
    if dim != rank - 2 or named["is_causal"]:
        return None
    if mask is None or _same(shape_of(mask)[-2], 1):
        return {q: len(shape_of(q)) - 2}
    return {q: len(shape_of(q)) - 2, mask: len(shape_of(mask)) - 2} if mask is not q else None


_ALIKE = frozenset("empty_like zeros_like ones_like full_like".split())
_WRITES = frozenset("copy_ add_ mul_ sub_ div_ neg_ exp_ clamp_ relu_ silu_ sigmoid_ tanh_".split())
_RANDOM: Mapping[str, Rule] = {
    "dropout": _dropout,
    "scaled_dot_product_attention": _attention,
}
_RULES: Mapping[str, Rule] = {
    "linear": _rows,
    "addmm": _addmm,
    **dict.fromkeys(("matmul", "mm", "bmm"), _matmul),
    **dict.fromkeys(("layer_norm", "rms_norm"), _normalised),
    **dict.fromkeys(("softmax", "_softmax", "log_softmax", "cumsum"), _along),
    **dict.fromkeys(("mean", "sum", "amax", "amin"), _reduced),
    "cat": _cat,
    "stack": _stack,
    "index_select": _selected,
    "embedding": _embedding,
    **dict.fromkeys(("view_as_complex", "view_as_real"), _complex),
    **dict.fromkeys(("real", "imag", "view_as_real_copy"), _part),
    "constant_pad_nd": _pad,
    **dict.fromkeys((*_ALIKE, "zeros", "ones", "full", "empty"), _alike),
}
