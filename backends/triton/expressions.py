"""Expressions as Triton source.

A `Value` is source text with the axes of the tile it spans; axes are ranks, in the order of the
kernel.  Values of fewer axes are broadcast by inserting dimensions, as numpy does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from attn_rewrite.cascade.expr import OPERATORS, Call, Const, Expr, Extent, Rank, Read
from attn_rewrite.cascade.interval import affine, is_integer
from attn_rewrite.errors import LowerError

ATOM = 9  # binding of a name, a call or a subscript
# Binding strength of Python's operators, where the cascade's notation has another order.
_BINDING = {
    "or": 1, "and": 3, "lt": 0, "le": 0, "gt": 0, "ge": 0, "eq": 0, "ne": 0,
    "add": 5, "sub": 5, "mul": 6, "div": 6, "floordiv": 6, "mod": 6,
}  # fmt: skip


@dataclass(frozen=True)
class Value:
    """Source text of a value over ``axes``; ``kind`` is ``float``, ``int`` or ``bool``.

    ``raw`` marks a tile in the type it is stored in, which matrix products take as it is;
    ``narrow`` one that was computed and rounded to an 8-bit float.
    """

    text: str
    axes: tuple[str, ...] = ()
    kind: str = "float"
    binding: int = ATOM
    raw: bool = False
    narrow: bool = False

    def atom(self) -> str:
        """The text, in parentheses unless it is an atom."""
        return self.text if self.binding >= ATOM else f"({self.text})"

    def over(self, axes: Sequence[str]) -> str:
        """The text broadcast to ``axes``."""
        if not self.axes or self.axes == tuple(axes):
            return self.atom()
        places = [":" if a in self.axes else "None" for a in axes]
        if len(self.axes) == 1 and len(places) == 1:
            return self.atom()
        return f"{self.atom()}[{', '.join(places)}]"


def joined(values: Sequence[Value], order: Sequence[str]) -> tuple[str, ...]:
    """The axes of several values together, in the kernel's order."""
    every = {a for v in values for a in v.axes}
    return tuple(a for a in order if a in every)


class Expressions:
    """Writes expressions; ``resolve`` gives the value of ranks, extents and reads."""

    def __init__(self, order: Sequence[str], resolve: Callable[[Expr], Value]) -> None:
        self.order, self.resolve = tuple(order), resolve
        self.helpers: set[str] = set()

    def emit(self, expr: Expr) -> Value:
        """The value of ``expr``, in float32 where it is not a coordinate or a truth."""
        match expr:
            case Const(value):
                return _literal(value)
            case Rank() | Extent():
                return self.resolve(expr)
            case Read():
                return as_number(self.resolve(expr))
            case Call("neg", (Const(value),)):
                return _literal(-value)
            case Call(op, args) if op in ("floordiv", "mod"):
                return self._division(expr, op, args)
            case Call("div", (a, b)) if not isinstance(b, Const):
                return self._quotient(a, b)
            case Call(op, args):
                return self._call(op, [self.emit(a) for a in args], args)
        raise LowerError(f"not an expression: {expr!r}")

    def truth(self, expr: Expr) -> Value:
        """The value of a mask as a truth value."""
        value = self.emit(expr)
        if value.kind == "bool":
            return value
        return Value(f"{value.atom()} != 0", value.axes, "bool", 0)

    def _call(self, op: str, values: list[Value], args: Sequence[Expr]) -> Value:
        if op not in _TRUTHS:
            values = [_counted(v) for v in values]
        axes = joined(values, self.order)
        texts = [v.over(axes) if len(axes) > 1 else v.atom() for v in values]
        kind = "int" if all(v.kind == "int" for v in values) else "float"
        if op in ("and", "or", "not"):
            texts = [self._truths(v, axes) for v in values]
        if op == "not":
            return Value(f"~{texts[0]}", axes, "bool", 8)
        if op in _BINDING:
            return self._infix(op, values, args, axes, kind, texts)
        if op == "where":
            condition = self._truths(values[0], axes)
            kind = values[1].kind if values[1].kind == values[2].kind else "float"
            return Value(f"tl.where({condition}, {bare(texts[1])}, {bare(texts[2])})", axes, kind)
        if op in ("max", "min"):
            name = {"max": "tl.maximum", "min": "tl.minimum"}[op]
            return Value(f"{name}({bare(texts[0])}, {bare(texts[1])})", axes, kind)
        if op == "clip":
            low, high = bare(texts[1]), bare(texts[2])
            return Value(f"tl.minimum(tl.maximum({bare(texts[0])}, {low}), {high})", axes, kind)
        if op == "pow":
            return self._power(values, args[1], axes, texts)
        if op.startswith("cast_"):
            return _cast(op.removeprefix("cast_"), texts[0], axes)
        return self._function(op, values[0], texts[0], axes)

    def _truths(self, value: Value, axes: tuple[str, ...]) -> str:
        if value.kind != "bool":
            value = Value(f"{value.atom()} != 0", value.axes, "bool", 0)
        return value.over(axes) if len(axes) > 1 else value.atom()

    def _infix(
        self,
        op: str,
        values: list[Value],
        args: Sequence[Expr],
        axes: tuple[str, ...],
        kind: str,
        texts: list[str],
    ) -> Value:
        sign = {"or": "|", "and": "&"}.get(op) or OPERATORS[op].infix
        level = _BINDING[op]
        first, second = values
        if first.binding >= max(level, 1) and first.axes in ((), axes):
            texts[0] = first.text
        if second.binding > level and second.axes in ((), axes):
            texts[1] = second.text
        if op == "mul" and kind == "int" and _may_overflow(args):
            texts[0] = f"tl.cast({bare(texts[0])}, tl.int64)"
        boolean = OPERATORS[op].boolean or op in ("and", "or")
        if op == "div":
            kind = "float"
        return Value(f"{texts[0]} {sign} {texts[1]}", axes, "bool" if boolean else kind, level)

    def _power(
        self, values: list[Value], exponent: Expr, axes: tuple[str, ...], texts: list[str]
    ) -> Value:
        if isinstance(exponent, Const) and exponent.value in (2, 3):
            return Value(" * ".join([texts[0]] * int(exponent.value)), axes, values[0].kind, 6)
        self.helpers.add("power")
        return Value(f"power({bare(texts[0])}, {bare(texts[1])} + 0.0)", axes)

    def _function(self, op: str, value: Value, text: str, axes: tuple[str, ...]) -> Value:
        pattern = _FUNCTIONS.get(op)
        if pattern is None:
            raise LowerError(f"the Triton backend has no operator {op!r}")
        if "{helper}" in pattern:
            self.helpers.add(op)
            return Value(f"{op}({bare(text)})", axes)
        kind = value.kind if op in ("neg", "abs", "relu") else "float"
        if value.kind == "int" and op in _REAL:
            text = f"{text} * 1.0"
        if op == "isneginf":
            return Value(f"{text} == float('-inf')", axes, "bool", 0)
        if op == "neg":
            return Value(f"-{text}", axes, kind, 6)
        return Value(pattern.format(bare(text)), axes, kind, 6 if op == "reciprocal" else ATOM)

    def _quotient(self, a: Expr, b: Expr) -> Value:
        """``a / b``, 0 where b is 0: a point whose divisor is empty is not touched."""
        top, bottom = self.emit(a), self.emit(b)
        axes = joined([top, bottom], self.order)
        if bottom.kind == "int":
            return Value(f"{top.over(axes)} / {bottom.over(axes)}", axes, "float", 6)
        self.helpers.add("quotient")
        first, second = (bare(v.over(axes)) for v in (top, bottom))
        return Value(f"quotient({first}, {second})", axes)

    def _division(self, expr: Expr, op: str, args: Sequence[Expr]) -> Value:
        """Floor division and remainder: Triton's round towards zero, so signs must be known."""
        known = self.resolve(expr)
        if known.text:
            return known
        a, b = (self.emit(x) for x in args)
        axes = joined([a, b], self.order)
        texts = [bare(v.over(axes)) if len(axes) > 1 else v.text for v in (a, b)]
        if a.kind != "int" or b.kind != "int":
            if op == "floordiv":
                return Value(f"tl.floor({texts[0]} / ({texts[1]}))", axes)
            return Value(f"{texts[0]} - tl.floor(({texts[0]}) / ({texts[1]})) * ({texts[1]})",
                         axes, "float", 5)  # fmt: skip
        if _nonnegative(args[0]) and _nonnegative(args[1]):
            sign = {"floordiv": "//", "mod": "%"}[op]
            return Value(f"{a.over(axes)} {sign} {b.over(axes)}", axes, "int", 6)
        self.helpers.add(f"floor_{op}")
        return Value(f"floor_{op}({texts[0]}, {texts[1]})", axes, "int")


def _may_overflow(factors: Sequence[Expr]) -> bool:
    """Can the product of two integers of at most 2^20 leave 32 bits?"""
    known = [abs(f.value) for f in factors if isinstance(f, Const)]
    return not known or max(known) >= 1 << 11


def _nonnegative(expr: Expr) -> bool:
    """Provably not below 0: sums of coordinates and extents with positive factors."""
    form = affine(expr)
    if form.constant < 0 or not is_integer(expr):
        return False
    return all(c > 0 and _is_count(t) for t, c in form.terms.items())


def _is_count(term: Expr) -> bool:
    match term:
        case Rank() | Extent():
            return True
        case Call("floordiv" | "mod" | "min" | "max" | "mul", (a, b)):
            return _nonnegative(a) and _nonnegative(b)
    return False


def bare(text: str) -> str:
    """Without the parentheses that enclose the whole text, for an argument of a call."""
    if not (text.startswith("(") and text.endswith(")")):
        return text
    depth = 0
    for place, character in enumerate(text):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0 and place < len(text) - 1:
            return text
    return text[1:-1]


def as_number(value: Value) -> Value:
    """A tile in its stored type as float32; anything else as it is."""
    if not (value.raw or value.narrow) or value.kind != "float":
        return value
    return Value(f"{value.atom()}.to(tl.float32)", value.axes, "float")


def _counted(value: Value) -> Value:
    """A truth value as 0 or 1, for arithmetic."""
    if value.kind != "bool":
        return value
    if value.text in ("True", "False"):
        return Value(str(float(value.text == "True")))
    return Value(f"{value.atom()}.to(tl.float32)", value.axes)


def _literal(value: float | int | bool) -> Value:
    if isinstance(value, bool):
        return Value(str(value), (), "bool")
    if isinstance(value, int):
        return Value(str(value), (), "int", ATOM if value >= 0 else 6)
    if math.isinf(value) or math.isnan(value):
        return Value(f"float('{value}')")
    return Value(repr(value), (), "float", ATOM if value >= 0 else 6)


_CASTS = {
    "f16": "float16", "bf16": "bfloat16", "i64": "int64", "i32": "int32", "i8": "int8",
}  # fmt: skip


_EIGHT_BITS = {"f8e4m3": ("float8e4nv", "448.0"), "f8e5m2": ("float8e5", "57344.0")}


def _cast(dtype: str, text: str, axes: tuple[str, ...]) -> Value:
    if dtype in ("f32", "f64"):
        return Value(f"({bare(text)} + 0.0)" if text.isdigit() else text, axes)
    if dtype == "bool":
        return Value(f"{text} != 0", axes, "bool", 0)
    if dtype in _EIGHT_BITS:
        # Half to even, and no infinity: the largest number stays one.
        kind, largest = _EIGHT_BITS[dtype]
        held = f"tl.clamp({bare(text)}, -{largest}, {largest})"
        return Value(f"{held}.to(tl.{kind}, fp_downcast_rounding='rtne')", axes, narrow=True)
    narrowed = f"{text}.to(tl.{_CASTS[dtype]})"
    if dtype in ("f16", "bf16"):
        return Value(f"{narrowed}.to(tl.float32)", axes)
    return Value(narrowed, axes, "int")


_FUNCTIONS = {
    "exp": "tl.exp({})", "exp2": "tl.exp2({})", "log": "tl.log({})", "sqrt": "tl.sqrt({})",
    "rsqrt": "tl.rsqrt({})", "sigmoid": "tl.sigmoid({})", "abs": "tl.abs({})",
    "floor": "tl.floor({})", "ceil": "tl.ceil({})", "erf": "tl.erf({})", "sin": "tl.sin({})",
    "cos": "tl.cos({})", "relu": "tl.maximum({}, 0.0)", "neg": "-{}", "isneginf": "",
    "tanh": "{helper}", "gelu": "{helper}", "silu": "{helper}", "softplus": "{helper}",
    "log1p": "{helper}", "round": "{helper}", "sign": "{helper}", "reciprocal": "1.0 / ({})",
}  # fmt: skip

# Operators that take truth values as they are.
_TRUTHS = frozenset({"and", "or", "not", "where", "cast_bool", "eq", "ne"})

# Functions that take no integers.
_REAL = frozenset(
    "exp exp2 log log1p sqrt rsqrt sigmoid tanh erf sin cos gelu silu softplus".split()
)

# Definitions a source begins with where it uses them.
HELPERS = {
    "quotient": (
        "def quotient(a, b):",
        "    # A point whose divisor is empty is not touched: it stays 0.",
        "    return tl.where(b == 0.0, 0.0, a / tl.where(b == 0.0, 1.0, b))",
    ),
    "power": (
        "def power(a, b):",
        "    return tl.where(a == 0.0, tl.where(b == 0.0, 1.0, 0.0), tl.exp2(b * tl.log2(a)))",
    ),
    "floor_floordiv": (
        "def floor_floordiv(a, b):",
        "    return (a - ((a % b) + b) % b) // b",
    ),
    "floor_mod": (
        "def floor_mod(a, b):",
        "    return ((a % b) + b) % b",
    ),
    "tanh": (
        "def tanh(x):",
        "    # The quotient of exponentials cancels near 0; there the series is exact.",
        "    e = tl.exp(-2.0 * tl.abs(x))",
        "    t = (1.0 - e) / (1.0 + e)",
        "    s = x * x",
        "    near = x * (1.0 - s * (1.0 / 3.0 - s * (2.0 / 15.0 - s * (17.0 / 315.0))))",
        "    return tl.where(tl.abs(x) < 0.15, near, tl.where(x < 0.0, -t, t))",
    ),
    "gelu": (
        "def gelu(x):",
        "    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))",
    ),
    "silu": (
        "def silu(x):",
        "    return x * tl.sigmoid(x)",
    ),
    "softplus": (
        "def softplus(x):",
        "    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))",
    ),
    "log1p": (
        "def log1p(x):",
        "    # Exact where 1 + x rounds: log(u) * x / (u - 1).",
        "    u = 1.0 + x",
        "    return tl.where(u == 1.0, x, tl.log(u) * x / tl.where(u == 1.0, 1.0, u - 1.0))",
    ),
    "round": (
        "def round(x):",
        "    # Half to even: adding 1.5 * 2^23 leaves no bits behind the point.",
        "    return tl.where(tl.abs(x) < 4194304.0, (x + 12582912.0) - 12582912.0, x)",
    ),
    "sign": (
        "def sign(x):",
        "    return tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, 0.0))",
    ),
}  # fmt: skip
