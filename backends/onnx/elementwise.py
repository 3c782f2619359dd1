"""Expressions over rank coordinates as ONNX nodes, evaluated over one tile of (b, h, q, kv).

Every value broadcasts to ``[b, h, rows, columns]``.  Coordinates are int64; comparisons give bool;
the rest is computed in the frame's floating-point type.  Reads gather from whole tensors; an index
outside the tensor is clipped into it (such points are only ever computed where the guard is false).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import onnx_ir as ir

from attn_rewrite.backends.onnx.bands import Affine
from attn_rewrite.backends.onnx.graph import Recorder
from attn_rewrite.cascade.expr import OPERATORS, Call, Const, Expr, Extent, Rank, Read, ranks_of
from attn_rewrite.cascade.ir import TensorDecl
from attn_rewrite.errors import LowerError

AXES = ("b", "h", "q", "kv")


class Typed(NamedTuple):
    """A value and what it is made of: ``"bool"``, ``"int"`` or ``"float"``."""

    value: ir.Value
    kind: str


class Coordinate(NamedTuple):
    """The coordinates of a rank in the tile; ``whole`` where they are the axis from end to end."""

    vector: ir.Value
    whole: bool


@dataclass(frozen=True)
class Frame:
    """What the names in an expression mean inside a tile.

    ``coordinates`` per rank of `AXES`; ``extents`` the length of every rank (vectors of one
    element); ``reads`` tensors with their ranks; ``known`` values given for a subtree (the product
    QK); ``dtype`` the floating-point type of the arithmetic.
    """

    coordinates: Mapping[str, Coordinate]
    extents: Mapping[str, ir.Value]
    reads: Mapping[str, tuple[ir.Value, TensorDecl]]
    known: Mapping[Expr, Typed]
    dtype: ir.DataType


_RANKED = {"bool": 0, "int": 1, "float": 2}
_COMPARE = {"lt": "Less", "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual"}
_BINARY = {"add": "Add", "sub": "Sub", "mul": "Mul", "max": "Max", "min": "Min"}
_FLOAT_UNARY = {
    **{name: name.capitalize() for name in ("exp", "log", "sqrt", "tanh", "sigmoid", "relu")},
    **{name: name.capitalize() for name in ("floor", "ceil", "round", "erf", "sin", "cos")},
    **{name: name.capitalize() for name in ("softplus", "reciprocal")},
}
_ANY_UNARY = {"neg": "Neg", "abs": "Abs", "sign": "Sign"}
_CASTS = {
    "cast_f64": ir.DataType.DOUBLE,
    "cast_f32": ir.DataType.FLOAT,
    "cast_f16": ir.DataType.FLOAT16,
    "cast_bf16": ir.DataType.BFLOAT16,
    "cast_i64": ir.DataType.INT64,
    "cast_i32": ir.DataType.INT32,
    "cast_i8": ir.DataType.INT8,
    "cast_bool": ir.DataType.BOOL,
}


def kind_of(dtype: ir.DataType | None) -> str:
    """The kind of a tensor's element type."""
    if dtype is None or dtype.is_floating_point():
        return "float"
    return "bool" if dtype == ir.DataType.BOOL else "int"


def affine(recorder: Recorder, value: Affine, extents: Mapping[str, ir.Value]) -> ir.Value:
    """``value`` as an int64 vector of one element."""
    total = recorder.integers([value.const])
    for rank, coefficient in value.extents:
        term = extents[rank]
        if coefficient != 1:
            term = recorder.op("Mul", term, recorder.integers([coefficient]))
        total = recorder.op("Add", total, term)
    return total


class Elementwise:
    """Emits expressions into a recorder; equal subexpressions are emitted once."""

    def __init__(self, recorder: Recorder, frame: Frame) -> None:
        self.recorder = recorder
        self.frame = frame
        self._done: dict[Expr, Typed] = dict(frame.known)

    def emit(self, expr: Expr) -> Typed:
        """The value of ``expr`` over the tile."""
        if expr not in self._done:
            self._done[expr] = self._emit(expr)
        return self._done[expr]

    def know(self, expr: Expr, value: ir.Value) -> None:
        """Take ``value``, a float, for ``expr`` from now on."""
        self._done[expr] = Typed(value, "float")

    def number(self, expr: Expr) -> ir.Value:
        """The value of ``expr`` in the frame's floating-point type."""
        return self._as(self.emit(expr), "float")

    def truth(self, expr: Expr) -> ir.Value:
        """The value of ``expr`` as bool (numbers: not zero)."""
        return self._as(self.emit(expr), "bool")

    def _emit(self, expr: Expr) -> Typed:
        r = self.recorder
        match expr:
            case Const(bool(value)):
                return Typed(r.cast(r.integers(int(value)), ir.DataType.BOOL), "bool")
            case Const(int(value)):
                return Typed(r.integers(value), "int")
            case Const(value):
                return Typed(r.number(value, self.frame.dtype), "float")
            case Rank(name):
                return Typed(self._spread(name), "int")
            case Extent(rank):
                return Typed(self._extent(rank), "int")
            case Read(tensor, index):
                return self._read(tensor, index)
            case Call("max" | "min" as op, (x, Const() as c) | (Const() as c, x)):
                (value, bound), kind = self._alike((self.emit(x), self.emit(c)), "int")
                return Typed(self._bounded(op, value, bound), kind)
            case Call(op, args):
                return self._call(op, tuple(self.emit(a) for a in args))
        raise LowerError(f"ONNX: {expr} is no expression over ranks and tensors; this is a bug.")

    def _spread(self, rank: str) -> ir.Value:
        """The coordinate of a rank along its own axis of the tile."""
        axes = [i for i, name in enumerate(AXES) if name != rank]
        return self.recorder.op("Unsqueeze", self._coordinate(rank), self.recorder.integers(axes))

    def _coordinate(self, rank: str) -> ir.Value:
        found = self.frame.coordinates.get(rank)
        if found is None:
            raise LowerError(
                f"ONNX: rank {rank!r} in a mask or score has no coordinate in an attention tile; "
                f"only {', '.join(AXES)} have one; rewrite the expression without it."
            )
        return found.vector

    def _extent(self, rank: str) -> ir.Value:
        if rank not in self.frame.extents:
            raise LowerError(
                f"ONNX: the extent #{rank} is of no input of the attention; declare it."
            )
        return self.frame.extents[rank]

    def _as(self, typed: Typed, kind: str) -> ir.Value:
        if typed.kind == kind:
            return typed.value
        to = {"bool": ir.DataType.BOOL, "int": ir.DataType.INT64, "float": self.frame.dtype}[kind]
        return self.recorder.cast(typed.value, to)

    def _alike(self, args: tuple[Typed, ...], least: str = "bool") -> tuple[list[ir.Value], str]:
        """All arguments in the widest kind among them, at least ``least``."""
        kind = max((least, *(a.kind for a in args)), key=lambda k: _RANKED[k])
        return [self._as(a, kind) for a in args], kind

    def _call(self, op: str, args: tuple[Typed, ...]) -> Typed:
        r = self.recorder
        if op in _COMPARE:
            values, _ = self._alike(args, "int")
            return Typed(r.op(_COMPARE[op], *values), "bool")
        if op in _BINARY:
            values, kind = self._alike(args, "int")
            return Typed(r.op(_BINARY[op], *values), kind)
        if op in _FLOAT_UNARY:
            return Typed(r.op(_FLOAT_UNARY[op], self._as(args[0], "float")), "float")
        if op in _ANY_UNARY:
            values, kind = self._alike(args, "int")
            return Typed(r.op(_ANY_UNARY[op], *values), kind)
        if op in _CASTS:
            return self._cast(args[0], _CASTS[op])
        return _SPECIAL[op](self, args)

    def _cast(self, arg: Typed, to: ir.DataType) -> Typed:
        """Rounds to the narrow type, then continues in the frame's type (int64 for integers)."""
        r, kind = self.recorder, kind_of(to)
        wide = {"bool": ir.DataType.BOOL, "int": ir.DataType.INT64, "float": self.frame.dtype}[kind]
        if arg.kind == kind and to == wide:
            return arg
        value = r.cast(arg.value, to)
        return Typed(value if to == wide else r.cast(value, wide), kind)

    def _logic(self, args: tuple[Typed, ...], name: str) -> Typed:
        return Typed(self.recorder.op(name, *(self._as(a, "bool") for a in args)), "bool")

    def _equal(self, args: tuple[Typed, ...]) -> Typed:
        return Typed(self.recorder.op("Equal", *self._alike(args)[0]), "bool")

    def _where(self, args: tuple[Typed, ...]) -> Typed:
        r, condition = self.recorder, self._as(args[0], "bool")
        (yes, no), kind = self._alike(args[1:])
        if kind != "bool":
            return Typed(r.op("Where", condition, yes, no), kind)
        # ONNX Runtime's Where has no bool branches.
        taken = r.op("And", condition, yes)
        return Typed(r.op("Or", taken, r.op("And", r.op("Not", condition), no)), "bool")

    def _divide(self, args: tuple[Typed, ...]) -> Typed:
        a, b = (self._as(x, "float") for x in args)
        return Typed(self.recorder.op("Div", a, b), "float")

    def _floordiv(self, args: tuple[Typed, ...]) -> Typed:
        """Rounds down; ONNX integer Div rounds towards zero, so the remainder goes first."""
        r, ((a, b), kind) = self.recorder, self._alike(args, "int")
        if kind == "float":
            return Typed(r.op("Floor", r.op("Div", a, b)), kind)
        return Typed(r.op("Div", r.op("Sub", a, r.op("Mod", a, b)), b), kind)

    def _mod(self, args: tuple[Typed, ...]) -> Typed:
        """The remainder with the sign of the divisor."""
        r, ((a, b), kind) = self.recorder, self._alike(args, "int")
        if kind == "int":
            return Typed(r.op("Mod", a, b), kind)
        return Typed(r.op("Sub", a, r.op("Mul", r.op("Floor", r.op("Div", a, b)), b)), kind)

    def _power(self, args: tuple[Typed, ...]) -> Typed:
        return Typed(self.recorder.op("Pow", *(self._as(a, "float") for a in args)), "float")

    def _clip(self, args: tuple[Typed, ...]) -> Typed:
        (x, low, high), kind = self._alike(args, "int")
        return Typed(self._bounded("min", self._bounded("max", x, low), high), kind)

    def _bounded(self, op: str, value: ir.Value, bound: ir.Value) -> ir.Value:
        """The larger (``max``) or the smaller of a value and a bound; NaN where the value is.

        Not Max and Min: onnxscript's optimizer makes Clip of a pair of them with constants, and
        loses constants where one value of a Scan's body is clipped twice.
        """
        r = self.recorder
        beyond = r.op("Less", value, bound) if op == "max" else r.op("Less", bound, value)
        return r.op("Where", beyond, bound, value)

    def _float_function(self, args: tuple[Typed, ...], name: str) -> Typed:
        r, x = self.recorder, self._as(args[0], "float")
        number: Callable[[float], ir.Value] = lambda v: r.number(v, self.frame.dtype)  # noqa: E731
        match name:
            case "exp2":
                out = r.op("Pow", number(2.0), x)
            case "log1p":
                out = r.op("Log", r.op("Add", x, number(1.0)))
            case "rsqrt":
                out = r.op("Reciprocal", r.op("Sqrt", x))
            case "silu":
                out = r.op("Mul", x, r.op("Sigmoid", x))
            case _:
                inner = r.op("Erf", r.op("Mul", x, number(0.5**0.5)))
                half = r.op("Mul", x, number(0.5))
                out = r.op("Mul", half, r.op("Add", inner, number(1.0)))
        return Typed(out, "float")

    def _is_minus_infinity(self, args: tuple[Typed, ...]) -> Typed:
        x = self._as(args[0], "float")
        return Typed(self.recorder.op("IsInf", x, detect_positive=0), "bool")

    def _no_float8(self) -> Typed:
        raise LowerError(
            "ONNX: 8-bit floats inside a score have no kernel in ONNX Runtime; "
            "keep this site exact, or use int8."
        )

    def _read(self, tensor: str, index: tuple[Expr, ...]) -> Typed:
        if tensor not in self.frame.reads:
            raise LowerError(f"ONNX: the mask or score reads {tensor!r}, which is not given.")
        value, _ = self.frame.reads[tensor]
        used = [sorted(ranks_of(i)) for i in index]
        apart = self._separable(used)
        out = self._read_axes(value, index, used) if apart else self._read_flat(value, index)
        kind = kind_of(value.dtype)
        wide = {"bool": ir.DataType.BOOL, "int": ir.DataType.INT64, "float": self.frame.dtype}[kind]
        return Typed(out if value.dtype == wide else self.recorder.cast(out, wide), kind)

    def _separable(self, used: list[list[str]]) -> bool:
        """True if every index depends on one rank at most, and no two on the same."""
        flat = [name for names in used for name in names]
        return all(len(n) <= 1 for n in used) and len(set(flat)) == len(flat)

    def _read_axes(
        self, value: ir.Value, index: tuple[Expr, ...], used: list[list[str]]
    ) -> ir.Value:
        """Each index depends on one rank of its own: gather axis by axis, then order the axes."""
        r = self.recorder
        for axis, (expr, names) in enumerate(zip(index, used, strict=True)):
            if names and isinstance(expr, Rank) and self.frame.coordinates[names[0]].whole:
                continue
            flat = r.op("Reshape", self._as(self.emit(expr), "int"), r.integers([-1]))
            value = r.op("Gather", value, self._clipped(flat, r.extent(value, axis)), axis=axis)
        order = sorted(range(len(index)), key=lambda a: (_axis(used[a]), a))
        if order != list(range(len(index))):
            value = r.op("Transpose", value, perm=order)
        free = [position for position, a in enumerate(order) if not used[a]]
        if free:
            value = r.op("Squeeze", value, r.integers(free))
        present = {names[0] for names in used if names}
        missing = [i for i, rank in enumerate(AXES) if rank not in present]
        return r.op("Unsqueeze", value, r.integers(missing)) if missing else value

    def _read_flat(self, value: ir.Value, index: tuple[Expr, ...]) -> ir.Value:
        """Indices that mix ranks (``table[h, q - kv]``): one gather from the flattened tensor."""
        r = self.recorder
        total: ir.Value | None = None
        for axis, expr in enumerate(index):
            extent = r.extent(value, axis)
            part = self._clipped(self._as(self.emit(expr), "int"), extent)
            total = part if total is None else r.op("Add", r.op("Mul", total, extent), part)
        return r.op("Gather", r.op("Reshape", value, r.integers([-1])), total, axis=0)

    def _clipped(self, index: ir.Value, extent: ir.Value) -> ir.Value:
        r = self.recorder
        last = r.op("Sub", extent, r.integers([1]))
        return self._bounded("min", self._bounded("max", index, r.integers([0])), last)


def _axis(names: list[str]) -> int:
    """Where an index axis goes in the tile; axes that depend on no rank go first and vanish."""
    return AXES.index(names[0]) if names else -1


class Joined(Elementwise):
    """Expressions over a tile of unrelated rows: coordinates come shaped ``[b, items, q, kv]``.

    Every item has a head, queries and keys of its own, so that no axis of the tile is one rank's,
    and every read is a gather from the flattened tensor.
    """

    def _spread(self, rank: str) -> ir.Value:
        return self._coordinate(rank)

    def _separable(self, used: list[list[str]]) -> bool:
        return False


_SPECIAL: Mapping[str, Callable[[Elementwise, tuple[Typed, ...]], Typed]] = {
    "and": lambda e, a: e._logic(a, "And"),
    "or": lambda e, a: e._logic(a, "Or"),
    "not": lambda e, a: e._logic(a, "Not"),
    "eq": lambda e, a: e._equal(a),
    "ne": lambda e, a: e._logic((e._equal(a),), "Not"),
    "where": lambda e, a: e._where(a),
    "div": lambda e, a: e._divide(a),
    "floordiv": lambda e, a: e._floordiv(a),
    "mod": lambda e, a: e._mod(a),
    "pow": lambda e, a: e._power(a),
    "clip": lambda e, a: e._clip(a),
    "isneginf": lambda e, a: e._is_minus_infinity(a),
    "exp2": lambda e, a: e._float_function(a, "exp2"),
    "log1p": lambda e, a: e._float_function(a, "log1p"),
    "rsqrt": lambda e, a: e._float_function(a, "rsqrt"),
    "silu": lambda e, a: e._float_function(a, "silu"),
    "gelu": lambda e, a: e._float_function(a, "gelu"),
    **{name: lambda e, a: e._no_float8() for name in ("cast_f8e4m3", "cast_f8e5m2")},
}

EMITTED = frozenset({*_COMPARE, *_BINARY, *_FLOAT_UNARY, *_ANY_UNARY, *_CASTS, *_SPECIAL})
assert frozenset(OPERATORS) <= EMITTED, sorted(frozenset(OPERATORS) - EMITTED)
