"""Expressions as ATen operators: one emitter for graphs, for eager tiles and for text.

An `Emitter` walks an expression and issues operators through a builder; a `Space` says what the
coordinates, extents and tensor reads of the expression are there.  Values are Python numbers,
symbolic sizes (graph nodes) or tensors that broadcast against each other, one dimension per
dimension of the space.

Types: coordinates are int64, truth values bool, scores at least float32.  Casts to float32 and
float64 are dropped, as the working type is that wide; casts to narrower floats and integers round.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import fx

from attn_rewrite.cascade.expr import FLOAT8, Call, Const, Expr, Extent, Rank, Read
from attn_rewrite.graph import Builder, aten

DTYPES = {
    "f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16,
    "f8e4m3": torch.float8_e4m3fn, "f8e5m2": torch.float8_e5m2,
    "i64": torch.int64, "i32": torch.int32, "i8": torch.int8, "bool": torch.bool,
}  # fmt: skip


class Space(Protocol):
    """The points an expression is evaluated at."""

    @property
    def device(self) -> torch.device:
        """Where tensors are made."""

    @property
    def dtype(self) -> torch.dtype:
        """The working type of scores."""

    def coordinate(self, rank: str) -> Any:
        """The coordinates of ``rank``: an int64 tensor placed in its dimension."""

    def extent(self, rank: str) -> Any:
        """The extent of ``rank``: an int or a symbolic size."""

    def read(self, read: Read, emitter: Emitter) -> Any:
        """The elements of a tensor at the read's coordinates."""


def value_of(value: Any) -> Any:
    """The tensor or number behind a node; other values as they are."""
    return value.meta["val"] if isinstance(value, fx.Node) else value


def dtype_of(value: Any) -> torch.dtype | None:
    """The type of a tensor value; None for numbers and sizes."""
    found = value_of(value)
    return found.dtype if isinstance(found, torch.Tensor) else None


def is_tensor(value: Any) -> bool:
    """True for tensors and nodes whose value is one."""
    return dtype_of(value) is not None


def _is_size(value: Any) -> bool:
    """A symbolic size: a node, or a SymInt, that is not a tensor."""
    return isinstance(value, fx.Node | torch.SymInt) and not is_tensor(value)


def cast(build: Builder, value: Any, dtype: torch.dtype) -> Any:
    """``value`` in ``dtype``; the same value if it has it."""
    return value if dtype_of(value) == dtype else build.call(aten.to.dtype, value, dtype)


class Emitter:
    """Emits expressions of one space; equal subexpressions are emitted once."""

    def __init__(
        self, build: Builder, space: Space, known: Mapping[Expr, Any] | None = None
    ) -> None:
        self.build, self.space = build, space
        self._memo: dict[Expr, Any] = dict(known or {})
        self._left: Counter[Expr] = Counter()

    @classmethod
    def once(cls, build: Builder, space: Space, expr: Expr) -> Emitter:
        """An emitter of ``expr`` alone, which lets go of a value after its last use."""
        emitter = cls(build, space)
        seen, waiting = {expr}, [expr]
        emitter._left[expr] = 1
        while waiting:
            for child in waiting.pop().children:
                emitter._left[child] += 1
                if child not in seen:
                    seen.add(child)
                    waiting.append(child)
        return emitter

    def know(self, expr: Expr, value: Any) -> None:
        """Take ``value`` for ``expr`` from now on."""
        self._memo[expr] = value

    def emit(self, expr: Expr) -> Any:
        """The value of ``expr``."""
        if expr not in self._memo:
            self._memo[expr] = self._emit(expr)
        if self._left[expr] == 1:
            return self._memo.pop(expr)
        self._left[expr] -= 1
        return self._memo[expr]

    def tensor(self, expr: Expr, dtype: torch.dtype | None = None) -> Any:
        """The value of ``expr`` as a tensor (of ``dtype`` if given)."""
        value = self.as_tensor(self.emit(expr))
        return value if dtype is None else cast(self.build, value, dtype)

    def truth(self, expr: Expr) -> Any:
        """The value of a mask as a bool tensor."""
        value = self.tensor(expr)
        return value if dtype_of(value) == torch.bool else self.build.call(aten.ne.Scalar, value, 0)

    def as_tensor(self, value: Any) -> Any:
        """A number or size as a tensor without dimensions."""
        if is_tensor(value):
            return value
        kind = self.space.dtype
        if isinstance(value, bool):
            kind = torch.bool
        elif isinstance(value, int) or _is_size(value):
            kind = torch.int64
        return self.build.call(
            aten.scalar_tensor.default, value, dtype=kind, device=self.space.device
        )

    def _emit(self, expr: Expr) -> Any:
        match expr:
            case Const(value):
                return value
            case Rank(name):
                return self.space.coordinate(name)
            case Extent(rank):
                return self.space.extent(rank)
            case Read():
                return self.space.read(expr, self)
            case Call("where", (condition, yes, no)):
                return self._where(condition, yes, no)
            case Call("exp" | "exp2", (Call("sub", (a, _)),)):
                return self._shifted_exponential(expr, a)
            case Call("div", (a, b)):
                return self._divide(self.emit(a), self.emit(b))
            case Call(op, args):
                return self.apply(op, *(self.emit(a) for a in args))
        raise TypeError(f"not an expression: {expr!r}")

    def apply(self, op: str, *values: Any) -> Any:
        """One operator of the language on values."""
        if not any(is_tensor(v) for v in values):
            return self._on_numbers(op, values)
        if op.startswith("cast_"):
            return self._cast(values[0], DTYPES[op.removeprefix("cast_")])
        if op == "clip":
            return self.apply("min", self.apply("max", values[0], values[1]), values[2])
        if op in _LOGIC:
            return self.build.call(_LOGIC[op], *(self._bool(v) for v in values))
        values = tuple(self._number(v) for v in values)
        if len(values) == 1:
            return self.build.call(_UNARY[op], self._float(values[0]) if op in _REAL else values[0])
        return self._binary(op, *values)

    # -- pieces ---------------------------------------------------------------------------------

    def _on_numbers(self, op: str, values: tuple[Any, ...]) -> Any:
        if any(_is_size(v) for v in values):
            if op in _SIZES:
                return self.build.call(_SIZES[op], *values)
            return self.apply(op, *(self.as_tensor(v) for v in values))
        if op in _FOLD:
            return _FOLD[op](*values)
        return self.apply(op, *(self.as_tensor(v) for v in values))

    def _binary(self, op: str, left: Any, right: Any) -> Any:
        with_tensor, with_scalar = _BINARY[op]
        if not is_tensor(left):
            left = self.as_tensor(left)
        if is_tensor(right) or with_scalar is None or _is_size(right):
            return self.build.call(with_tensor, left, self.as_tensor(right), **_MODE.get(op, {}))
        return self.build.call(with_scalar, left, right, **_MODE.get(op, {}))

    def _bool(self, value: Any) -> Any:
        value = self.as_tensor(value)
        return value if dtype_of(value) == torch.bool else self.build.call(aten.ne.Scalar, value, 0)

    def _number(self, value: Any) -> Any:
        """Truth values count as 0 and 1 in arithmetic and comparisons."""
        if dtype_of(value) == torch.bool:
            return self.build.call(aten.to.dtype, value, torch.int64)
        return int(value) if isinstance(value, bool) else value

    def _float(self, value: Any) -> Any:
        dtype = dtype_of(value)
        if dtype is not None and not dtype.is_floating_point:
            return self.build.call(aten.to.dtype, value, self.space.dtype)
        return value

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        have = dtype_of(value)
        if dtype == torch.bool:
            return self._bool(value)
        if have is not None and have.is_floating_point and dtype in (torch.float32, torch.float64):
            return value
        if not dtype.is_floating_point:
            # Saturates; the narrow type is a range here, not a place to compute in.
            if dtype != torch.int64:
                limits = torch.iinfo(dtype)
                value = self.build.call(aten.clamp.default, value, limits.min, limits.max)
            return cast(self.build, value, torch.int64)
        if dtype.itemsize == 1:
            return self._float8(cast(self.build, value, self.space.dtype), dtype)
        rounded = self.build.call(aten.to.dtype, value, dtype)
        return cast(self.build, rounded, self.space.dtype)

    def _float8(self, value: Any, dtype: torch.dtype) -> Any:
        """Rounded to an 8-bit float by exponents: half to even, saturating, without a cast.

        A cast from float64 rounds twice, by way of float32.
        """
        name = next(n for n, d in DTYPES.items() if d == dtype)
        bits, smallest, largest = FLOAT8[name]
        value = self.build.call(aten.clamp.default, value, -largest, largest)
        exponent = self.build.call(operator.getitem, self.build.call(aten.frexp.Tensor, value), 1)
        # The stored bits of the significand start one below the exponent of frexp.
        lowest = self.build.call(aten.clamp.default, exponent, smallest + 1)
        power = self.build.call(aten.sub.Scalar, lowest, bits + 1)
        step = self.build.call(aten.exp2.default, cast(self.build, power, self.space.dtype))
        units = self.build.call(aten.div.Tensor, value, step)
        return self.build.call(aten.mul.Tensor, self.build.call(aten.round.default, units), step)

    def _divide(self, a: Any, b: Any) -> Any:
        """``a / b``, and 0 where b is 0: the divisor is empty there."""
        if not is_tensor(b) and not _is_size(b):
            if b == 0:
                return self.apply("mul", a, 0)
            if not is_tensor(a) and not _is_size(a):
                return a / b
            return self.build.call(aten.div.Scalar, self._real(a), float(b))
        b = self._real(b)
        quotient = self.build.call(aten.div.Tensor, self._real(a), b)
        empty = self.build.call(aten.eq.Scalar, b, 0)
        return self.build.call(aten.masked_fill.Scalar, quotient, empty, 0)

    def _real(self, value: Any) -> Any:
        return self._float(self._number(self.as_tensor(value)))

    def _where(self, condition: Expr, yes: Expr, no: Expr) -> Any:
        keep = self.emit(condition)
        if not is_tensor(keep) and not _is_size(keep):
            return self.emit(yes if keep else no)
        a, b = self.emit(yes), self.emit(no)
        dtype = self._common(a, b)
        values = (cast(self.build, self.as_tensor(v), dtype) for v in (a, b))
        return self.build.call(aten.where.self, self._bool(keep), *values)

    def _common(self, *values: Any) -> torch.dtype:
        """The type both branches of a choice fit in."""
        found = [dtype_of(self.as_tensor(v)) for v in values]
        tensors = [d for v, d in zip(values, found, strict=True) if is_tensor(v)]
        if tensors and any(isinstance(v, float) for v in values):
            tensors = [
                d if d is not None and d.is_floating_point else self.space.dtype for d in tensors
            ]
        result = (tensors or found)[0]
        for dtype in tensors or found:
            assert result is not None
            assert dtype is not None
            result = torch.promote_types(result, dtype)
        assert result is not None
        return result

    def _shifted_exponential(self, expr: Expr, minuend: Expr) -> Any:
        """``exp(a - b)`` is 0 where a is -inf whatever b is: the score is empty."""
        assert isinstance(expr, Call)
        a, power = self.emit(minuend), self.apply(expr.op, self.emit(expr.args[0]))
        if not is_tensor(a) or not is_tensor(power):
            return power
        empty = self.build.call(aten.eq.Scalar, a, -math.inf)
        return self.build.call(aten.masked_fill.Scalar, power, empty, 0)


class StraightThrough(Emitter):
    """Rounding and narrow casts whose gradient is that of the number they round.

    ``x + (r - x)`` is ``r`` to the last bit: the difference of a number and its rounding is exact.
    Narrow numbers stay in the working type.
    """

    def apply(self, op: str, *values: Any) -> Any:
        """One operator of the language on values."""
        if op in ("round", "floor") and is_tensor(values[0]):
            return self._through(values[0], super().apply(op, *values))
        return super().apply(op, *values)

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if dtype == torch.int8:  # rounded and saturated by what stands inside
            return value
        if dtype.itemsize == 1 and dtype.is_floating_point:
            return self._through(
                value, self._float8(cast(self.build, value, self.space.dtype), dtype)
            )
        return super()._cast(value, dtype)

    def _through(self, value: Any, rounded: Any) -> Any:
        if not (kind := dtype_of(value)) or not kind.is_floating_point:
            return rounded
        gap = self.build.call(aten.sub.Tensor, rounded, value)
        return self.build.call(aten.add.Tensor, value, self.build.call(aten.detach.default, gap))


_SIZES: dict[str, Callable[..., Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul,
    "floordiv": operator.floordiv, "mod": operator.mod,
}  # fmt: skip

_FOLD: dict[str, Callable[..., Any]] = {
    **_SIZES, "neg": operator.neg, "pow": operator.pow, "abs": abs, "max": max, "min": min,
    "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
    "eq": operator.eq, "ne": operator.ne, "not": operator.not_,
    "isneginf": lambda a: a == -math.inf,
    "and": lambda a, b: bool(a) and bool(b), "or": lambda a, b: bool(a) or bool(b),
    "exp": math.exp, "sqrt": math.sqrt, "tanh": math.tanh, "rsqrt": lambda a: 1 / math.sqrt(a),
    "reciprocal": lambda a: 1 / a, "clip": lambda x, a, b: min(max(x, a), b),
    "cast_f64": float, "cast_f32": float, "cast_i64": int, "cast_i32": int, "cast_bool": bool,
    "floor": math.floor, "ceil": math.ceil, "relu": lambda a: max(a, 0),
}  # fmt: skip

_LOGIC = {
    "and": aten.logical_and.default,
    "or": aten.logical_or.default,
    "not": aten.logical_not.default,
}

_MODE = {"floordiv": {"rounding_mode": "floor"}}

_BINARY: dict[str, tuple[Any, Any]] = {
    "lt": (aten.lt.Tensor, aten.lt.Scalar), "le": (aten.le.Tensor, aten.le.Scalar),
    "gt": (aten.gt.Tensor, aten.gt.Scalar), "ge": (aten.ge.Tensor, aten.ge.Scalar),
    "eq": (aten.eq.Tensor, aten.eq.Scalar), "ne": (aten.ne.Tensor, aten.ne.Scalar),
    "add": (aten.add.Tensor, aten.add.Scalar), "sub": (aten.sub.Tensor, aten.sub.Scalar),
    "mul": (aten.mul.Tensor, aten.mul.Scalar),
    "floordiv": (aten.div.Tensor_mode, aten.div.Scalar_mode),
    "mod": (aten.remainder.Tensor, aten.remainder.Scalar),
    "pow": (aten.pow.Tensor_Tensor, aten.pow.Tensor_Scalar),
    "max": (aten.maximum.default, None), "min": (aten.minimum.default, None),
}  # fmt: skip

# Operators whose argument must be a float, and those that take any number.
_REAL = {
    "exp": aten.exp.default, "exp2": aten.exp2.default, "log": aten.log.default,
    "log1p": aten.log1p.default, "sqrt": aten.sqrt.default, "rsqrt": aten.rsqrt.default,
    "tanh": aten.tanh.default, "sigmoid": aten.sigmoid.default, "erf": aten.erf.default,
    "sin": aten.sin.default, "cos": aten.cos.default, "gelu": aten.gelu.default,
    "silu": aten.silu.default, "softplus": aten.softplus.default,
    "reciprocal": aten.reciprocal.default,
}  # fmt: skip
_UNARY = {
    **_REAL, "neg": aten.neg.default, "relu": aten.relu.default, "abs": aten.abs.default,
    "floor": aten.floor.default, "ceil": aten.ceil.default, "round": aten.round.default,
    "sign": aten.sign.default, "isneginf": aten.isneginf.default,
}  # fmt: skip
