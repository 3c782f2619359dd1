"""Stages that make integer codes, recognised and computed by one kernel (`quantise_ops`).

Recognised by meaning: a stage whose formula is that of an `Integer` quantiser over an operand, its
mean over the keys taken off or not, with a scale for a block of tokens, a token or a channel.
Anything else (rotation, scales of threads, 8-bit floats, some heads only) stays plain operators.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from attn_rewrite.backends.torch.einsums import emit_stages
from attn_rewrite.backends.torch.emit import value_of
from attn_rewrite.cascade.expr import KV, B, Call, Const, Extent, Read, ranks_of
from attn_rewrite.cascade.ir import Cascade, Einsum
from attn_rewrite.graph import Builder, aten, is_call, op_name
from attn_rewrite.passes.quantize.quantisers import EPSILON, Integer

OPERATOR = "attn_rewrite::quantise_tokens"
_QUANTISERS = tuple(Integer(bits, mode) for bits in (8, 4) for mode in ("even", "away"))


@dataclass(frozen=True)
class Coded:
    """Codes of one operand: what they are called, and how they are made.

    ``group`` tokens share a scale; 0 is one a channel.  ``mean`` names the mean over the keys that
    is taken off, if any.
    """

    operand: str
    codes: str
    scales: str
    mean: str | None
    quantiser: Integer
    group: int


def coded(stages: Cascade) -> Iterator[Coded]:
    """What one kernel can make of ``stages``."""
    for e in stages.einsums():
        for read in e.reads():
            made = stages.producer(read.tensor)
            if made is None or not made.reduce:
                continue
            found = _coded(stages, e, read, made)
            if found is not None:
                yield found


def _coded(stages: Cascade, e: Einsum, scale: Read, made: Einsum) -> Coded | None:
    """``e`` as codes with the scale that ``made`` computes."""
    quantiser = next((q for q in _QUANTISERS if _is_code(e, scale, made, q)), None)
    if quantiser is None or made.out.index != scale.index:
        return None
    source = next(r for r in e.reads() if r.tensor != scale.tensor)
    group = _group(scale, made, source)
    if group is None or source.index != e.out.index:
        return None
    operand, mean = source.tensor, None
    if operand not in ("Q", "K", "V"):
        found = _smoothed(stages, source)
        if found is None:
            return None
        operand, mean = found
    return Coded(operand, e.out.tensor, scale.tensor, mean, quantiser, group)


def _is_code(e: Einsum, scale: Read, made: Einsum, quantiser: Integer) -> bool:
    sources = [r for r in e.reads() if r.tensor != scale.tensor]
    if len(set(sources)) != 1:
        return False
    x = sources[0]
    return e.expr == quantiser.code(x, scale) and made.expr == quantiser.scale(x)


def _group(scale: Read, made: Einsum, source: Read) -> int | None:
    """Tokens that share the scale; 0 for channels; None for any other sharing."""
    if len(source.index) != 4 or {op for _, op in made.reduce} != {"max"}:
        return None
    batch, head, token, channel = source.index
    if scale.index == (batch, head, channel):
        return 0
    if scale.index == (batch, head, token):
        return 1
    if len(scale.index) != 3 or scale.index[:2] != (batch, head):
        return None
    match scale.index[2]:
        case Call("floordiv", (rank, Const(size))) if rank == token:
            return int(size)
    return None


def _smoothed(stages: Cascade, source: Read) -> tuple[str, str] | None:
    """The operand and the mean over its keys that ``source`` is the difference of."""
    made = stages.producer(source.tensor)
    match made:
        case Einsum(expr=Call("sub", (Read(operand) as whole, Read(mean) as middle))):
            pass
        case _:
            return None
    if operand not in ("K", "V") or len(whole.index) != 4 or made.out.index != whole.index:
        return None
    batch, head, token, channel = whole.index
    over = stages.producer(mean)
    wanted = Einsum(Read(mean, (batch, head, channel)), whole / Extent("kv"), (("kv", "add"),))
    fits = token == KV and batch == B and middle == wanted.out and over == wanted
    return (operand, mean) if fits else None


# Emission


def emit_fused(build: Builder, stages: Cascade, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The outputs of ``stages`` by name, as `emit_stages` gives them: integer codes by one kernel
    an operand, everything else by plain operators.
    """
    made: dict[str, Any] = {}
    for item in coded(stages):
        made |= _emit(build, item, inputs[item.operand])
    wanted = tuple(n for n in stages.outputs if n not in made)
    if wanted:
        rest = needed_for(stages, wanted)
        made |= emit_stages(build, rest, {t.name: inputs[t.name] for t in rest.inputs})
    return {name: made[name] for name in stages.outputs}


def _emit(build: Builder, item: Coded, x: Any) -> dict[str, Any]:
    import attn_rewrite.backends.triton.quantise_ops  # noqa: F401  (registers the operator)

    made: dict[str, Any] = {}
    mean = scale = None
    limit = item.quantiser.limit
    if item.mean is not None:
        length = value_of(x).shape[2] if not isinstance(x, fx.Node) else None
        length = build.call(aten.sym_size.int, x, 2) if length is None else length
        total = build.call(aten.sum.dim_IntList, x, [2], dtype=torch.float64)
        mean = made[item.mean] = build.call(aten.div.Tensor, total, length)
    if item.group == 0:
        scale = made[item.scales] = _channel_scale(build, x, mean, limit)
    op = torch.ops.attn_rewrite.quantise_tokens.default
    away = item.quantiser.rounding == "away"
    both = build.call(op, x, None, mean, scale, max(item.group, 1), limit, away)
    made[item.codes] = build.call(_part, both, 0)
    if item.group:
        made[item.scales] = build.call(_part, both, 1)
    return made


def _channel_scale(build: Builder, x: Any, mean: Any, limit: float) -> Any:
    """Largest magnitude of each channel over ``limit``: subtraction keeps the order of numbers, so
    the extremes of x decide."""
    high, low = (
        build.call(aten.to.dtype, build.call(op, x, [2]), torch.float64)
        for op in (aten.amax.default, aten.amin.default)
    )
    if mean is not None:
        high, low = (build.call(aten.sub.Tensor, t, mean) for t in (high, low))
    top = build.call(aten.maximum.default, build.call(aten.abs.default, high),
                     build.call(aten.abs.default, low))  # fmt: skip
    return build.call(aten.div.Tensor, build.call(aten.clamp_min.default, top, EPSILON), limit)


def _part(results: Any, place: int) -> Any:
    return results[place]


def needed_for(stages: Cascade, wanted: tuple[str, ...]) -> Cascade:
    """The stages that ``wanted`` follow from."""
    names = set(wanted)
    body: list[Einsum] = []
    for e in reversed(tuple(stages.einsums())):
        if e.out.tensor in names:
            body.insert(0, e)
            names |= {r.tensor for r in e.reads()}
    inputs = tuple(t for t in stages.inputs if t.name in names)
    used = {r for e in body for r in _ranks(e)} | {r for t in inputs for r in t.ranks}
    used |= {part for r in stages.ranks if r.name in used for part in r.parts}
    return replace(
        stages, inputs=inputs, body=tuple(body), outputs=wanted,
        ranks=tuple(r for r in stages.ranks if r.name in used),
        tensors=tuple(t for t in stages.tensors if t.name in names),
    )  # fmt: skip


def _ranks(e: Einsum) -> frozenset[str]:
    parts = (*e.out.index, e.expr, e.guard)
    return frozenset[str]().union(*map(ranks_of, parts), (r for r, _ in e.reduce))


# Gathers


def fold_gathers(graph: fx.Graph) -> int:
    """Let the kernels that make codes read tokens in the order that a gather gives them; how many
    gathers that spares.

    What is folded over all tokens (means, extremes) reads them in any order: reassociated.
    """
    spared = 0
    for node in list(graph.nodes):
        found = _gather(node)
        if found is None or not node.users or not all(_takes(u, node) for u in node.users):
            continue
        source, index = found
        for user in list(node.users):
            if op_name(user) == OPERATOR:
                user.args = (source, index, *user.args[2:])
            else:
                user.replace_input_with(node, source)
        spared += 1
    return spared


def _gather(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The operand [b, h, n, d] and the places of its tokens, if ``node`` puts them in order."""
    if is_call(node, "index_select") and node.args[1] == 2 and node.meta["val"].dim() == 4:
        return node.args[0], node.args[2]  # type: ignore[return-value]
    # Rows of all heads, one after the other.
    inner = node.args[0] if is_call(node, "reshape") else None
    if not is_call(inner, "index_select") or inner.args[1] != 1 or len(inner.users) > 1:  # type: ignore[union-attr]
        return None
    rows, index = inner.args[0], inner.args[2]  # type: ignore[union-attr]
    if not is_call(rows, "reshape"):
        return None
    source = rows.args[0]  # type: ignore[union-attr]
    same = [str(n) for n in source.meta["val"].shape] == [str(n) for n in node.meta["val"].shape]  # type: ignore[union-attr]
    return (source, index) if same and node.meta["val"].dim() == 4 else None  # type: ignore[return-value]


def _takes(user: fx.Node, gathered: fx.Node) -> bool:
    if op_name(user) == OPERATOR:
        return user.args[0] is gathered and user.args[1] is None
    if is_call(user, "sym_size"):
        return True
    folds = is_call(user, "sum", "amax", "amin")
    return folds and list(user.args[1]) == [2]  # type: ignore[arg-type]
