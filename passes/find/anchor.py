"""Anchors: where a softmax over keys starts, in one normal form.

A softmax node and a ``scaled_dot_product_attention`` node both become an `Anchor`: the lifted
score, the axes of the score tensor, and either the probabilities (to be followed forward) or the
value product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attn_rewrite.cascade.expr import TRUE, Expr, Read, call, where
from attn_rewrite.graph import (
    arguments,
    is_call,
    is_tensor,
    op_name,
    shape_of,
    source_line,
    value_of,
)
from attn_rewrite.passes.find.axes import Atoms, Axes
from attn_rewrite.passes.find.layout import coordinate
from attn_rewrite.passes.find.lift import Dot, Lifter
from attn_rewrite.passes.find.lse import Lse, of_softmax
from attn_rewrite.passes.find.product import Product
from attn_rewrite.site import Refusal
from attn_rewrite.sizes import as_size, same_size

SOFTMAX = frozenset({"softmax", "_softmax", "_safe_softmax"})
SDPA = "scaled_dot_product_attention"
FLEX = "flex_attention"
FUSED = frozenset({SDPA, FLEX})


@dataclass(frozen=True, eq=False)
class ValueProduct:
    """The contraction with V: its node, V, and the atoms of V and of the output."""

    node: fx.Node
    value: fx.Node
    value_dims: tuple[Atoms, ...]
    out_dims: tuple[Atoms, ...]
    features: Atoms


@dataclass(frozen=True, eq=False)
class Anchor:
    """A normalisation over keys, lifted: the score expression over atoms, and the axes around
    it."""

    node: fx.Node
    axes: Axes
    lifter: Lifter
    dims: tuple[Atoms, ...]  # of the score tensor
    keys: Atoms  # atoms normalised over
    score: Expr
    guard: Expr = TRUE
    dropout: float = 0.0
    value: ValueProduct | None = None
    sink: Expr | None = None  # a logit that joins the denominator only
    sink_first: bool = False  # its column stands before the keys
    lse: Lse | None = None  # the log-sum-exp of the scores, where it is used, and its axes


def refuse(code: str, reason: str, node: fx.Node) -> Refusal:
    """A refusal about a graph node."""
    return Refusal(code, reason, node.format_node() or str(node), source_line(node))


def is_anchor(node: fx.Node) -> bool:
    """True for nodes that may be the softmax of an attention."""
    return op_name(node) in SOFTMAX | FUSED


def open_anchor(node: fx.Node, module: torch.nn.Module) -> Anchor | Refusal:
    """Lift the scores of an anchor.

    Only where they hold no product at all a broadcasting multiplication is taken for one: queries
    and keys of width 1.
    """
    if op_name(node) == SDPA:
        return _open_sdpa(node, module)
    if op_name(node) == FLEX:
        from attn_rewrite.passes.find.flex import open_flex

        return open_flex(node, module)
    anchor = _open_softmax(node, module)
    if isinstance(anchor, Anchor) and not anchor.lifter.dots:
        return _open_softmax(node, module, outer=True)
    return anchor


def _open_softmax(
    node: fx.Node, module: torch.nn.Module, *, outer: bool = False
) -> Anchor | Refusal:
    named = arguments(node)
    scores = named["self"]
    assert isinstance(scores, fx.Node)
    if not shape_of(scores):
        return refuse("no-score-product", "the softmax is taken of a single number", node)
    place = named["dim"] % len(shape_of(scores))
    scores, column, first = _without_sink(scores, place)
    shape = shape_of(scores)
    axes = Axes()
    dims = tuple(axes.line(s) if i == place else axes.fresh(s) for i, s in enumerate(shape))
    keys = dims[place]
    lifter = Lifter(axes, module, outer=outer)
    lifter.know_sizes(dims)
    expr = lifter.lift(scores, dims)
    assert expr is not None
    sink = None
    if column is not None:
        sink = lifter.operand(column, scores, (*dims[:place], (), *dims[place + 1 :]), 0)
    lse = of_softmax(named["self"], dims, place)
    if isinstance(lse, str):
        return refuse("logsumexp-used", lse, node)
    return Anchor(node, axes, lifter, dims, keys, expr, sink=sink, sink_first=first, lse=lse)


def _without_sink(scores: fx.Node, place: int) -> tuple[fx.Node, fx.Node | None, bool]:
    """(scores, sink, sink first) of ``cat([scores, sink])`` along the softmax axis (GPT-OSS), which
    may be cast as a whole (Inkling)."""
    joined = scores
    while is_call(joined, "to", "contiguous", "clone") and value_of(joined).is_floating_point():
        before = joined.args[0]
        assert isinstance(before, fx.Node)
        joined = before
    if op_name(joined) != "cat":
        return scores, None, False
    named = arguments(joined)
    parts = named["tensors"]
    if len(parts) != 2 or named["dim"] % len(shape_of(scores)) != place:
        return scores, None, False
    for at in (1, 0):
        if same_size(as_size(shape_of(parts[at])[place]), 1):
            return parts[1 - at], parts[at], at == 0
    return scores, None, False


@dataclass(frozen=True, eq=False)
class Pairs:
    """The axes of a fused call: scores D0 over (batch, query, key), values and output."""

    axes: Axes
    lifter: Lifter
    dims: tuple[Atoms, ...]
    keys: Atoms
    value_dims: tuple[Atoms, ...]
    out_dims: tuple[Atoms, ...]
    features: Atoms


def pairs(
    node: fx.Node, q: Any, k: Any, v: Any, *, gqa: bool, module: torch.nn.Module
) -> Pairs | None:
    """The axes of ``node``, which attends with q, k, v; None if their batches do not broadcast."""
    axes = Axes()
    shared = _sdpa_axes(axes, q, k, v, gqa)
    if shared is None:
        return None
    batch_q, batch_k, batch_v = shared
    rows, keys = axes.fresh(shape_of(q)[-2]), axes.line(shape_of(k)[-2])
    width, features = axes.fresh(shape_of(q)[-1]), axes.fresh(shape_of(v)[-1])
    dims = (*batch_q, rows, keys)
    labels_q = tuple(f"q{i}" for i in range(len(batch_q)))
    labels_k = tuple(f"k{i}" for i in range(len(batch_k)))
    product = Product(
        node, q, k, (*labels_q, "m", "k"), (*labels_k, "n", "k"), (*labels_q, "m", "n")
    )
    atoms = dict(
        zip(
            (*labels_q, *labels_k, "m", "n", "k"),
            (*batch_q, *batch_k, rows, keys, width),
            strict=True,
        )
    )
    lifter = Lifter(axes, module)
    lifter.know_sizes(dims)
    lifter.dots["D0"] = Dot("D0", product, dims, atoms)
    values, out = (*batch_v, keys, features), (*batch_q, rows, features)
    return Pairs(axes, lifter, dims, keys, values, out, features)


def _open_sdpa(node: fx.Node, module: torch.nn.Module) -> Anchor | Refusal:
    named = arguments(node)
    q, k, v = (named[n] for n in ("query", "key", "value"))
    if not all(map(is_tensor, (q, k, v))):
        return refuse(
            "not-tensors", "an operand of scaled_dot_product_attention is not a tensor", node
        )
    found = pairs(node, q, k, v, gqa=named["enable_gqa"], module=module)
    if found is None:
        return refuse(
            "sdpa-shapes", "the batch dimensions of query, key and value do not broadcast", node
        )
    scale = named["scale"]
    if scale is not None and not isinstance(scale, (int, float)):
        return refuse("tensor-scale", "the scale is a tensor, not a number", node)
    factor = 1.0 / math.sqrt(_width(q)) if scale is None else float(scale)
    score: Expr = Read("D0") * factor
    masked = _sdpa_mask(found.lifter, named, found.dims, score)
    if isinstance(masked, str):
        return refuse("mask-shape", masked, node)
    value = ValueProduct(node, v, found.value_dims, found.out_dims, found.features)
    place = (node, found.axes, found.lifter, found.dims, found.keys)
    return Anchor(*place, *masked, named["dropout_p"], value)


def _width(q: fx.Node) -> float:
    return float(as_size(shape_of(q)[-1]))


def _sdpa_axes(
    axes: Axes, q: fx.Node, k: fx.Node, v: fx.Node, gqa: bool
) -> tuple[tuple[Atoms, ...], tuple[Atoms, ...], tuple[Atoms, ...]] | None:
    """Atoms of the batch dimensions; with ``gqa`` the query heads split into (key heads, group)."""
    shapes = [shape_of(x)[:-2] for x in (q, k, v)]
    rank = max(map(len, shapes))
    sizes = [tuple(as_size(s) for s in (1,) * (rank - len(x)) + tuple(x)) for x in shapes]
    dims: list[list[Atoms]] = [[], [], []]
    for i in range(rank):
        here = [s[i] for s in sizes]
        whole = next((s for s in here if not same_size(s, 1)), 1)
        atoms = axes.fresh(whole)
        if gqa and i == rank - 1 and not same_size(here[0], here[1]):
            parts = axes.regroup([atoms], [here[1], here[0] // here[1]])
            if parts is None:
                return None
            atoms, heads = (*parts[0], *parts[1]), parts[0]
            for own, value in zip(dims, (atoms, heads, heads), strict=True):
                own.append(value)
            continue
        for own, size in zip(dims, here, strict=True):
            own.append(() if same_size(size, 1) else atoms)
    whole_dims = [next((d[i] for d in dims if d[i]), ()) for i in range(rank)]
    full_q = tuple(a or b for a, b in zip(dims[0], whole_dims, strict=True))
    trim = [tuple(d[rank - len(s) :]) for d, s in zip(dims, shapes, strict=True)]
    return (
        (trim[0] if full_q == tuple(dims[0]) and len(shapes[0]) == rank else full_q),
        trim[1],
        trim[2],
    )


def _sdpa_mask(
    lifter: Lifter, named: dict[str, Any], dims: tuple[Atoms, ...], score: Expr
) -> tuple[Expr, Expr] | str:
    """(score, guard) with the mask of the call; a sentence if it cannot be read."""
    mask = named["attn_mask"]
    guard: Expr = TRUE
    if named["is_causal"]:
        row, column = coordinate(dims[-2], lifter.axes), coordinate(dims[-1], lifter.axes)
        assert row is not None
        assert column is not None
        guard = call("le", column, row)
    if mask is None:
        return score, guard
    shape = shape_of(mask)
    inner = dims[len(dims) - len(shape) :]
    own = tuple(() if same_size(as_size(s), 1) else d for s, d in zip(shape, inner, strict=True))
    lifted = lifter.lift(mask, own)
    if lifted is None:
        return "the mask cannot be read"
    if value_of(mask).dtype == torch.bool:
        return where(lifted, score, -math.inf), guard
    return score + lifted, guard
