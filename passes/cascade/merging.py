"""Split-K: join the states of two parts of a rank.

``(s, t) . (s', t') = (z, h_{s->z}(t) (+) h_{s'->z}(t'))`` with ``z = s (+) s'``: associative on
reachable states, because the repair functions compose (Neptune, Theorem 4.4).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from attn_rewrite.cascade.expr import Expr, Read, call, substitute, walk
from attn_rewrite.cascade.ir import Cascade, Einsum, TensorDecl
from attn_rewrite.passes.cascade.flow import Flow, pruned
from attn_rewrite.passes.cascade.online import loop_members
from attn_rewrite.passes.cascade.parts import state_decl, used_inputs
from attn_rewrite.passes.cascade.stability import starts_at
from attn_rewrite.passes.cascade.steps import Step, corrected, rebased, safe


def merge_cascade(flow: Flow, steps: Mapping[str, Step]) -> Cascade:
    """Inputs ``GM_a``, ``GM_b`` ... (the states of two parts), outputs the joined states."""
    members = loop_members(flow, steps)
    body: list[Einsum] = []
    inputs: list[TensorDecl] = []
    for e in flow.einsums:
        name = e.out.tensor
        if name in steps:
            inputs += [state_decl(flow, e, f"{name}_{side}") for side in "ab"]
            body.append(_joined(flow, steps[name]))
        elif name in members and not flow.is_map(e):
            body += [_of_part(flow, e, side) for side in "ab"] + [e]
        elif not flow.iterates(e) and name not in flow.complete:
            body.append(e)
    merged = replace(
        flow.cascade,
        name=f"{flow.cascade.name}-merge",
        inputs=(*flow.cascade.inputs, *inputs),
        body=tuple(body),
        outputs=tuple(steps),
    )
    return used_inputs(pruned(merged))


def _of_part(flow: Flow, e: Einsum, side: str) -> Einsum:
    """A value made of states, for one part."""

    def part(expr: Expr) -> Expr:
        found: dict[Expr, Expr] = {
            r: Read(f"{r.tensor}_{side}", r.index)
            for r in walk(expr)
            if isinstance(r, Read) and r.tensor in flow.complete
        }
        return substitute(expr, found)

    return Einsum(
        Read(f"{e.out.tensor}_{side}", e.out.index), part(e.expr), e.reduce, part(e.guard)
    )


def _suffixed(side: str, read: Read) -> Read:
    return Read(f"{read.tensor}_{side}", read.index)


def _joined(flow: Flow, step: Step) -> Einsum:
    e, op = step.einsum, flow.operation(step.einsum)
    parts: list[Expr] = []
    for side in "ab":
        value: Expr = Read(f"{e.out.tensor}_{side}", e.out.index)
        if step.correction is not None:
            factor = corrected(
                flow,
                step,
                partial(_suffixed, side),
                lambda r: safe(r, starts_at(flow, r)),
            )
            value = rebased(value, factor, step, op)
        parts.append(value)
    return Einsum(e.out, call(op, *parts))
