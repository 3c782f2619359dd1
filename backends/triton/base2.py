"""Exponentials to the base of two, with the factor folded into the scale of the scores.

Hardware computes ``exp2``; ``exp(x)`` is ``exp2(x * log2(e))``.  Values that only enter exponents
(scores, running maxima, references) are kept multiplied by log2(e), so that the factor joins the
scale that the scores have anyway, and the loop has no multiplication more.  Exact but for rounding:
reassociated.
"""

from __future__ import annotations

import math
from dataclasses import replace

from attn_rewrite.backends.triton.program import NEXT, Pass, Program, State, Step
from attn_rewrite.cascade.expr import Call, Const, Expr, Read, call, rebuild

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)

_LINEAR = frozenset({"add", "sub", "max", "min", "neg", "cast_f32", "cast_f64"})


def to_base_2(program: Program) -> Program:
    """The program with every ``exp`` an ``exp2``."""
    scaled = _scaled_values(program)
    if not scaled and not any(_has_exp(s.expr) for s in program.steps()):
        return program
    rewriter = _Rewriter(scaled)
    stages: list[Step | Pass] = []
    for stage in program.stages:
        if isinstance(stage, Step):
            stages.append(rewriter.step(stage))
        else:
            states = tuple(State(rewriter.step(s.init)) for s in stage.states)
            steps = tuple(rewriter.step(s) for s in stage.steps)
            stages.append(replace(stage, states=states, steps=steps))
    return replace(program, stages=tuple(stages))


def _has_exp(expr: Expr) -> bool:
    return any(isinstance(n, Call) and n.op == "exp" for n in _nodes(expr))


def _nodes(expr: Expr) -> list[Expr]:
    return [expr, *(n for c in expr.children for n in _nodes(c))]


def _version(name: str) -> str:
    return name.removesuffix(NEXT)


def _linear_reads(expr: Expr) -> set[str]:
    """Tensors whose scaling scales the expression: read through sums and extrema."""
    match expr:
        case Read(name):
            return {_version(name)}
        case Call("where", (_, yes, no)):
            return _linear_reads(yes) | _linear_reads(no)
        case Call(op, args) if op in _LINEAR:
            return set().union(*map(_linear_reads, args))
    return set()


def _scaled_values(program: Program) -> frozenset[str]:
    """Values kept multiplied by log2(e): those exponents are made of, outputs excepted."""
    makers: dict[str, list[Step]] = {}
    for step in program.steps():
        makers.setdefault(_version(step.name), []).append(step)
    fixed = set(program.cascade.outputs) | {n for n, made in makers.items() if not _may_scale(made)}
    found: set[str] = set()
    queue = [
        name
        for step in program.steps()
        for node in _nodes(step.expr)
        if isinstance(node, Call) and node.op == "exp"
        for name in _linear_reads(node.args[0])
    ]
    while queue:
        name = queue.pop()
        if name in found or name in fixed or name not in makers:
            continue
        found.add(name)
        queue += [n for step in makers[name] for n in _linear_reads(step.expr)]
    return frozenset(found)


def _may_scale(made: list[Step]) -> bool:
    """Scaled values are maps and extrema; a product of matrices is scaled where it is read."""
    return all(op in ("max", "min") for step in made for _, op in step.reduce)


class _Rewriter:
    def __init__(self, scaled: frozenset[str]) -> None:
        self.values = scaled

    def step(self, step: Step) -> Step:
        rule = self.scaled if _version(step.name) in self.values else self.plain
        expr = rule(step.expr)
        return step if expr == step.expr else replace(step, expr=expr)

    def _holds(self, expr: Expr) -> bool:
        return isinstance(expr, Read) and _version(expr.tensor) in self.values

    def plain(self, expr: Expr) -> Expr:
        """The same value; values kept scaled are scaled back."""
        if self._holds(expr):
            return expr * LN2
        match expr:
            case Call("exp", (inner,)):
                return call("exp2", self.scaled(inner))
            case Call("isneginf", (inner,)) if self._holds(inner):
                return expr
        if isinstance(expr, Read):
            return expr
        return rebuild(expr, tuple(self.plain(c) for c in expr.children))

    def scaled(self, expr: Expr) -> Expr:
        """The value times log2(e)."""
        if self._holds(expr):
            return expr
        match expr:
            case Const(value):
                return expr if value == 0 or math.isinf(value) else Const(value * LOG2E)
            case Call("where", (condition, yes, no)):
                return Call("where", (self.plain(condition), self.scaled(yes), self.scaled(no)))
            case Call("mul", (a, Const(c))) | Call("mul", (Const(c), a)) if c != 0:
                return self.plain(a) * (c * LOG2E)
            case Call("div", (a, Const(c))) if c != 0:
                return self.plain(a) * (LOG2E / c)
            case Call(op, args) if op in _LINEAR:
                return Call(op, tuple(self.scaled(a) for a in args))
        return self.plain(expr) * LOG2E
