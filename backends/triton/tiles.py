"""The steps of a program as statements: maps, folds, products of matrices and their masks.

Points outside the guard, and keys beyond the length, must not reach a fold.  A value that a fold
reads is masked where it is made (its default), or is shown to be neutral already: an exponential of
a masked score is 0, and so is everything multiplied by it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from attn_rewrite.backends.triton.expressions import Value, as_number, bare, joined
from attn_rewrite.backends.triton.frame import Frame, Parameter
from attn_rewrite.backends.triton.program import Step
from attn_rewrite.cascade.expr import FLOAT8, TRUE, Call, Const, Expr, Read, call
from attn_rewrite.cascade.infer import IDENTITY
from attn_rewrite.errors import LowerError

_PRECISION = Parameter("PRECISION", "block")
# Terms of a product of 8-bit floats that tensor cores may add up before float32 takes the sum.
_IMPRECISE = 64
_FOLD = {"add": "tl.sum", "max": "tl.max", "min": "tl.min"}


@dataclass
class Masking:
    """Where masks are needed: ``condition`` is the test for tiles that are not full.

    None: never (steps outside a traversal); ``""``: in every tile.
    """

    condition: str | None = None
    keeps: dict[Expr, Value] = field(default_factory=dict)


class Steps:
    """Writes steps into the body of a frame."""

    def __init__(self, frame: Frame, masking: Masking | None = None) -> None:
        self.frame, self.masking = frame, masking or Masking()
        self.outside: dict[str, float] = {}  # value of tiles where the mask does not hold

    def run(self, step: Step, name: str | None = None) -> Value:
        """Write ``step``; its value is known by its name from then on."""
        frame = self.frame
        for line in step.text.splitlines():
            frame.body.comment(line)
        if not step.reduce and isinstance(step.expr, Read):
            alias = frame.resolve(step.expr)
            if step.guard == TRUE and alias.raw:
                frame.values[step.name] = alias
                return alias
        value = self._folded(step) if step.reduce else frame.expressions.emit(step.expr)
        target = name or frame.names.of(step.name)
        frame.body.line(f"{target} = {bare(value.text)}")
        made = Value(target, value.axes, value.kind, narrow=value.narrow)
        self._mask_default(step, made)
        frame.values[step.name] = made
        return made

    # Masks

    def _mask_default(self, step: Step, made: Value) -> None:
        """Give the default to points outside the guard, unless they have it anyway."""
        along = self.frame.roles.along
        if self.masking.condition is None or along not in made.axes:
            return
        have = None if step.reduce else self._value_outside(step.expr)
        if have is not None and have == step.default:
            self.outside[step.name] = step.default
        elif step.guard != TRUE or step.default != 0.0:
            self._where(made, step.guard, step.default)
            self.outside[step.name] = step.default
        elif have is not None:
            self.outside[step.name] = have

    def _where(self, made: Value, guard: Expr, default: float) -> None:
        body, name, axes = self.frame.body, made.text, made.axes
        keep = self._keep(guard)
        if not set(keep.axes) <= set(axes):
            raise LowerError(f"{name} is masked along a rank that it does not have")
        other = f"float('{default}')" if math.isinf(default) else repr(default)
        held, after = name, ""
        if made.kind == "int" and math.isfinite(default):
            other = str(int(default))
        elif made.narrow:  # no arithmetic in 8 bits; there and back changes nothing
            held, after = f"{name}.to(tl.float32)", f".to({name}.dtype)"
        line = f"{name} = tl.where({bare(keep.over(axes))}, {held}, {other}){after}"
        if not self.masking.condition:
            body.line(line)
            return
        with body.block(f"if {self.masking.condition}:"):
            body.line(line)

    def _keep(self, guard: Expr) -> Value:
        """The truth of a guard in this tile, keys beyond the length excluded; computed once."""
        if guard in self.masking.keeps:
            return self.masking.keeps[guard]
        frame, roles = self.frame, self.frame.roles
        inside = Value(f"{frame.rank(roles.along)}_ok", (roles.along,), "bool")
        if guard == TRUE:
            self.masking.keeps[guard] = inside
            return inside
        truth = frame.expressions.truth(guard)
        axes = joined([truth, inside], frame.order)
        name = frame.names.of(
            f"keep_{len(self.masking.keeps)}" if self.masking.keeps else "keep", "mask"
        )
        texts = [v.over(axes) if len(axes) > 1 else v.atom() for v in (inside, truth)]
        line = f"{name} = {texts[0]} & {texts[1]}"
        if self.masking.condition:
            with frame.body.block(f"if {self.masking.condition}:"):
                frame.body.line(line)
        else:
            frame.body.line(line)
        keep = Value(name, axes, "bool")
        self.masking.keeps[guard] = keep
        return keep

    def _value_outside(self, expr: Expr) -> float | None:
        """The value of an expression where the mask does not hold, if that is known."""
        match expr:
            case Const(value):
                return float(value)
            case Read(name):
                return self.outside.get(name)
            case Call("exp" | "exp2", (inner,)):
                return 0.0 if self._value_outside(inner) == -math.inf else None
            case Call("add" | "sub", (a, b)):
                first = self._value_outside(a)
                return first if first == -math.inf and not self._is_tile(b) else None
            case Call("mul", (a, b)):
                return 0.0 if 0.0 in (self._value_outside(a), self._value_outside(b)) else None
            case Call("clip", (a, Const(low), Const(high))) if low <= 0 <= high:
                return 0.0 if self._value_outside(a) == 0.0 else None
            case Call("div", (a, _)) | Call("round" | "floor" | "abs" | "sign", (a,)):
                return 0.0 if self._value_outside(a) == 0.0 else None
            case Call(op, (a,)) if op.startswith("cast_"):
                return 0.0 if self._value_outside(a) == 0.0 else None
        return None

    def _is_tile(self, expr: Expr) -> bool:
        return self.frame.roles.along in self.frame.axes(expr)

    # Folds

    def _folded(self, step: Step) -> Value:
        product = self._matrix_product(step)
        if product is not None:
            return product
        value = self.frame.expressions.emit(step.expr)
        op = dict(step.reduce).get(self.frame.roles.along)
        if op is not None:
            value = self._neutral(step, step.expr, value, IDENTITY[op])
        value = self._within_lanes(step, value)
        for rank, how in step.reduce:
            if rank not in value.axes:
                raise LowerError(f"{step.text} folds {rank}, which its terms do not have")
            text = f"{_FOLD[how]}({bare(value.text)}, axis={value.axes.index(rank)})"
            value = Value(text, tuple(a for a in value.axes if a != rank), value.kind)
        return value

    def _neutral(self, step: Step, expr: Expr, value: Value, identity: float) -> Value:
        """The value with the identity of its fold outside the mask."""
        if self.masking.condition is None or self._value_outside(expr) == identity:
            return value
        name = self.frame.names.of(f"{step.name}_in", "mask")
        self.frame.body.line(f"{name} = {bare(value.text)}")
        made = Value(name, value.axes, value.kind, narrow=value.narrow)
        self._where(made, step.guard, identity)
        return made

    def _within_lanes(self, step: Step, value: Value) -> Value:
        """The identity in lanes beyond the head dimension: a computed value is not 0 there."""
        for rank, op in step.reduce:
            if rank not in self.frame.padded or rank not in value.axes:
                continue
            inside = Value(f"{self.frame.rank(rank)}_ok", (rank,), "bool").over(value.axes)
            other = "0.0" if op == "add" else f"float('{IDENTITY[op]}')"
            value = Value(f"tl.where({inside}, {bare(value.text)}, {other})", value.axes)
        return value

    def _matrix_product(self, step: Step) -> Value | None:
        """``left @ right`` where a sum of products spans three axes."""
        factors = _factors(step.expr)
        axes = {f: self.frame.axes(f) for f in factors}
        every = tuple(a for a in self.frame.order if any(a in x for x in axes.values()))
        if len(every) < 3:
            return None
        if len(every) != 3 or len(step.reduce) != 1 or step.reduce[0][1] != "add":
            raise LowerError(f"{step.text} spans {len(every)} axes, and is no product of matrices")
        folded = step.reduce[0][0]
        x, y = (a for a in every if a != folded)
        after = [f for f in factors if folded not in axes[f]]
        right = [f for f in factors if f not in after and y in axes[f]]
        left = [f for f in factors if f not in after and f not in right]
        if not left or not right or any(len(axes[f]) > 2 for f in factors):
            raise LowerError(f"{step.text} is no product of two matrices")
        first = self._operand(step, left, (x, folded))
        second = self._operand(step, right, (folded, y))
        return self._scaled(self._dot(first, second, (x, folded, y), left, right), after)

    def _operand(self, step: Step, factors: Sequence[Expr], axes: tuple[str, str]) -> Value:
        """One side of a product: a stored tile as it is, or a computed one, neutral outside."""
        frame = self.frame
        if len(factors) == 1 and isinstance(factors[0], Read):
            value = frame.resolve(factors[0])
        else:
            value = frame.expressions.emit(_product(factors))
        if set(value.axes) != set(axes):
            raise LowerError(f"{step.text} is no product of matrices")
        along = frame.roles.along
        if not value.raw and along in dict(step.reduce):
            value = self._neutral(step, _product(factors), value, 0.0)
        if not value.raw:
            value = self._within_lanes(step, value)
        if value.axes != axes:
            return Value(f"tl.trans({bare(value.text)})", axes, value.kind, raw=value.raw)
        return value

    def _dot(
        self,
        first: Value,
        second: Value,
        axes: tuple[str, str, str],
        left: Sequence[Expr],
        right: Sequence[Expr],
    ) -> Value:
        """``first @ second`` over ``axes``, the second of which is folded."""
        frame = self.frame
        x, folded, y = axes
        texts = [bare(first.text), bare(second.text)]
        stored = [v for v in (first, second) if v.raw]
        integer = all(v.kind == "int" for v in (first, second))
        narrow = [
            bool(frame.schedule.widen & {r.tensor for r in side if isinstance(r, Read)})
            for side in (left, right)
        ]
        uneven = len(stored) == 2 and narrow[0] != narrow[1]
        eight = not uneven and all(v.raw or v.narrow for v in (first, second))
        if uneven:
            # Keys of 8 bits beside queries that are wider: their values are exact in 16 bits.
            wide = (first, second)[narrow.index(False)]
            kind = f"{wide.text.removeprefix('tl.trans(').removesuffix(')')}.dtype"
            texts = [f"{v.atom()}.to({kind})" if n else t for t, v, n in
                     zip(texts, (first, second), narrow, strict=True)]  # fmt: skip
        elif integer or eight:
            pass  # both are stored, or rounded to a type that products take
        elif len(stored) == 1 and narrow[1]:
            texts = [f"{v.atom()}.to(tl.float16)" for v in (first, second)]
        elif len(stored) == 1:
            kind = f"{stored[0].text.removeprefix('tl.trans(').removesuffix(')')}.dtype"
            texts = [t if v.raw else f"{v.atom()}.to({kind})" for t, v in
                     zip(texts, (first, second), strict=True)]  # fmt: skip
        frame.parameter(_PRECISION)
        options = ", out_dtype=tl.int32" if integer else ", input_precision=PRECISION"
        if eight and not integer and (all(narrow) or self._stored_as_float8((*left, *right))):
            # Tensor cores add 8-bit products with 22 bits: hand them on to float32 in time.
            options += f", max_num_imprecise_acc=min({_IMPRECISE}, {frame.side(folded)})"
        text = f"tl.dot({texts[0]}, {texts[1]}{options})"
        return Value(text + (".to(tl.float32)" if integer else ""), (x, y))

    def _stored_as_float8(self, factors: Sequence[Expr]) -> bool:
        known = self.frame.inputs
        names = {f.tensor for f in factors if isinstance(f, Read)} & known.keys()
        return any(known[n].dtype in FLOAT8 for n in names)

    def _scaled(self, value: Value, after: Sequence[Expr]) -> Value:
        """The product times what the folded rank has no part in."""
        for factor in after:
            scale = as_number(self.frame.expressions.emit(factor))
            value = Value(f"{value.text} * {scale.over(value.axes)}", value.axes, "float", 6)
        return value


def _factors(expr: Expr) -> list[Expr]:
    if isinstance(expr, Call) and expr.op == "mul":
        return _factors(expr.args[0]) + _factors(expr.args[1])
    if isinstance(expr, Call) and expr.op == "div":
        return [*_factors(expr.args[0]), call("div", 1.0, expr.args[1])]
    return [expr]


def _product(factors: Sequence[Expr]) -> Expr:
    result = factors[0]
    for factor in factors[1:]:
        result = result * factor
    return result
