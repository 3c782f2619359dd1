"""Facts about a site that do not change what it computes: its kind, whether rope was seen, its
layout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from attn_rewrite.called import called_by
from attn_rewrite.graph import (
    is_call,
    is_parameter,
    is_tensor,
    op_name,
    shape_of,
    value_of,
)
from attn_rewrite.passes.find.product import product_of
from attn_rewrite.passes.find.roles import Roles
from attn_rewrite.site import Operand
from attn_rewrite.sizes import as_size, same_size

PROJECTIONS = frozenset({"linear", "addmm", "conv1d", "conv2d", "convolution", "conv3d"})
_SAME = ("to", "contiguous", "clone", "detach", "alias")
_LAYOUTS = tuple("view reshape flatten unflatten transpose permute squeeze unsqueeze".split())
# A walk meets tables of positions beside the activations.
_STEPS = 256
# Projections of one operand, one behind the other.
_PROJECTED = 3


def length_of(own: Operand, role: str, size: Any) -> Any:
    """The extent of a role as the graph has it (a SymInt where it is dynamic)."""
    if isinstance(size, int):
        return size
    for dim, extent in zip(own.dims, shape_of(own.node), strict=True):
        if dim and all(f.role == role for f in dim) and same_size(as_size(extent), size):
            return extent
    return size


def inputs_of(node: fx.Node) -> Iterator[fx.Node]:
    """Tensor arguments of a node, lists flattened."""
    for arg in node.all_input_nodes:
        if is_tensor(arg) or isinstance(arg.meta.get("val"), (list, tuple)):
            yield arg


def _is_projection(node: fx.Node) -> bool:
    if op_name(node) in PROJECTIONS:
        return True
    if op_name(node) not in ("matmul", "mm", "einsum"):
        return False
    product = product_of(node)
    if product is not None:
        shared = {*product.left_labels} & {*product.right_labels} & {*product.out_labels}
        if shared - {""}:
            return False  # a map of its own for each head, behind the projection
    return any(_is_weight(a) for a in node.all_input_nodes)


def _is_weight(node: fx.Node) -> bool:
    while is_call(node, "t", "transpose", "permute", "to", "detach", "view", "unsqueeze"):
        first = node.args[0]
        assert isinstance(first, fx.Node)
        node = first
    return is_parameter(node)


def laid_out(node: fx.Node) -> fx.Node:
    """The tensor that ``node`` is in another layout: an image is a sequence and an image again."""
    while is_call(node, *_SAME, *_LAYOUTS):
        first = node.args[0]
        assert isinstance(first, fx.Node)
        node = first
    return node


def origins(node: fx.Node) -> tuple[set[fx.Node], list[fx.Node]]:
    """What a tensor was projected from, and the nodes between: the activations nearest behind
    it."""
    found: set[fx.Node] = set()
    between: list[fx.Node] = []
    queue, seen = [node], {node}
    while queue and len(between) < _STEPS:
        here = queue.pop(0)
        if _is_projection(here):
            found.update(laid_out(a) for a in inputs_of(here) if not _is_weight(a))
            continue
        sources = [a for a in inputs_of(here) if not _is_weight(a)]
        if here.op == "placeholder" or (not sources and is_parameter(here)):
            found.add(here)
            continue
        between.append(here)
        for source in sources:
            if source not in seen:
                seen.add(source)
                queue.append(source)
    return found, between


def _projected(found: set[fx.Node]) -> set[fx.Node]:
    """Those of ``found`` that a projection reads, where there are any: the others are tables (of a
    rotation) that were given beside the activations."""
    read = {n for n in found if n.op != "placeholder" or any(map(_is_projection, _readers(n)))}
    return read or found


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """What reads a tensor, in whatever layout or type."""
    for user in node.users:
        yield user
        if is_call(user, *_SAME, *_LAYOUTS):
            yield from _readers(user)


def _behind(found: set[fx.Node]) -> set[fx.Node]:
    """``found``, and what was projected to it in earlier steps: low-rank queries and keys (MLA) are
    projections of projections, with a norm between.  A residual sum or an attention ends the walk.
    """
    whole = set(found)
    for node in found:
        for _ in range(_PROJECTED):
            before, between = origins(node)
            before = _sequences(before) or before
            if len(before) != 1 or any(_mixes_tokens(n) for n in between):
                break
            (node,) = before
            whole.add(node)
    return {n for n in whole if value_of(n).is_floating_point()}


def _mixes_tokens(node: fx.Node) -> bool:
    """True where the rows of a result are not those of the input: an attention, or some of them."""
    if is_call(node, "slice", "select", "index", "index_select", "gather"):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        before, after = shape_of(source), shape_of(node)
        return len(before) != len(after) or any(
            not same_size(as_size(a), as_size(b))
            for a, b in zip(before[:-1], after[:-1], strict=True)
        )
    return is_call(node, "scaled_dot_product_attention") or product_of(node) is not None


def rope_seen(nodes: list[fx.Node]) -> bool:
    """Rotary embedding: a rotation of halves or pairs multiplied by cos and sin."""
    # Tables are often made without gradients, in a graph of their own.
    inside = [n for at in nodes for called, _ in called_by(at) for n in called.graph.nodes]
    names = {op_name(n) for n in (*nodes, *inside)}
    if "view_as_complex" in names:
        return True
    return "mul" in names and bool({"add", "sub"} & names) and (
        ("neg" in names and bool({"cat", "stack"} & names)) or {"cos", "sin"} <= names
    )  # fmt: skip


def kind_of(query: Operand, key: Operand, roles: Roles) -> tuple[str, bool]:
    """(self | cross | joint | pooling, rope seen)."""
    from_q, path_q = origins(query.node)
    from_k, path_k = origins(key.node)
    rope = rope_seen(path_q)
    from_q, from_k = _projected(from_q), _projected(from_k)
    if roles.b and (
        not any(f.role == "b" for d in query.dims for f in d)
        or (_is_single(query) and _is_learned(from_q))
    ):
        return "pooling", rope
    if any(is_call(n, "cat") for n in path_q) and any(is_call(n, "cat") for n in path_k):
        long_q, long_k = _sequences(from_q), _sequences(from_k)
        if len(long_q) >= 2 and long_q & long_k:
            return "joint", rope
    if from_q & from_k or _behind(from_q) & _behind(from_k):
        return "self", rope
    extents = [
        {str(f.extent) for d in o.dims for f in d if f.role == r}
        for o, r in ((query, "q"), (key, "kv"))
    ]
    same_length = bool(extents[0]) and extents[0] == extents[1]
    raw = all(n.op == "placeholder" for n in from_q | from_k)
    return ("self" if same_length and raw else "cross"), rope


def _is_single(query: Operand) -> bool:
    return all(same_size(f.extent, 1) for d in query.dims for f in d if f.role == "q")


def _is_learned(found: set[fx.Node]) -> bool:
    """True for parameters of the model, repeated for each sequence (a probe)."""
    walks = [origins(a) for a in found]
    return bool(walks) and all(
        len(between) < _STEPS and all(map(is_parameter, before)) for before, between in walks
    )


def _sequences(nodes: set[fx.Node]) -> set[fx.Node]:
    """Activations with a batch and a sequence, not positions or tables of them."""
    return {
        n for n in nodes
        if is_tensor(n) and value_of(n).is_floating_point()
        and len(shape_of(n)) >= 3 and not same_size(as_size(shape_of(n)[-2]), 1)
    }  # fmt: skip


def layout_text(operand: Operand) -> str:
    """The layout of an operand as an einops-like string, such as ``"b q (h d)"``."""
    words = []
    for dim in operand.dims:
        names = [f.role for f in dim]
        words.append(names[0] if len(names) == 1 else f"({' '.join(names)})" if names else "1")
    return " ".join(words)
