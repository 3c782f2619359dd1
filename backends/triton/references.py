"""References of exponents that are -inf: a row without keys, whose sink is -inf as well.

Inside a loop the fusion guards its running references.  Steps after the loop may take the
difference of two values that are both -inf (a sink logit, or the log-sum-exp of an earlier part,
and the maximum of a row without keys); their exponential is 0.
"""

from __future__ import annotations

from dataclasses import replace

from attn_rewrite.backends.triton.program import Program, Step
from attn_rewrite.cascade.expr import Call, Expr, Read, call, transform, where


def with_safe_references(program: Program) -> Program:
    """The program with ``exp(x - m)`` of row steps taken at 0 where the maximum m is -inf.

    Exact where the result was a number: x is at most m.
    """
    maxima = frozenset(s.name for s in program.steps() if _is_maximum(s))
    stages = tuple(_safe(s, maxima) if isinstance(s, Step) else s for s in program.stages)
    return program if stages == program.stages else replace(program, stages=stages)


def _is_maximum(step: Step) -> bool:
    folded = any(op == "max" for _, op in step.reduce)
    return folded or (isinstance(step.expr, Call) and step.expr.op == "max")


def _safe(step: Step, maxima: frozenset[str]) -> Step:
    def rule(node: Expr) -> Expr | None:
        match node:
            case Call("exp", (Call("sub", (x, Read(name) as m)),)) if name in maxima:
                return call("exp", x - where(call("isneginf", m), 0.0, m))
        return None

    expr = transform(step.expr, rule)
    return step if expr == step.expr else replace(step, expr=expr)
