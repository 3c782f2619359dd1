"""The symbolic language of scores, masks and maps: expressions over rank coordinates.

An expression is a tree of frozen nodes.  Masks are boolean expressions with *True = keep*::

    (q - kv >= 0) & (q - kv < 256)

Ranks are named coordinates (``q``, ``kv``, ``b``, ``h`` ...), ``#kv`` is the extent of rank ``kv``,
``M0[b, kv]`` reads a tensor, and calls apply an operator of `OPERATORS`.  Operators of Python build
trees (``q - kv``); comparison for *structural* equality is ``==``, the operator node is `eq`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

Scalar = int | float | bool


@dataclass(frozen=True)
class Operator:
    """An elementwise operator: name, arity, and infix symbol with its binding, if any."""

    name: str
    arity: int
    infix: str | None = None
    binding: int = 0
    boolean: bool = False


def _table() -> dict[str, Operator]:
    infix = [
        ("lt", "<", 1, True), ("le", "<=", 1, True), ("gt", ">", 1, True), ("ge", ">=", 1, True),
        ("eq", "==", 1, True), ("ne", "!=", 1, True), ("or", "|", 2, True), ("and", "&", 3, True),
        ("add", "+", 4, False), ("sub", "-", 4, False),
        ("mul", "*", 5, False), ("div", "/", 5, False), ("floordiv", "//", 5, False),
        ("mod", "%", 5, False), ("pow", "**", 7, False),
    ]  # fmt: skip
    table = {name: Operator(name, 2, sign, level, boolean) for name, sign, level, boolean in infix}
    for name in ("max", "min"):
        table[name] = Operator(name, 2)
    for name in (
        "neg", "exp", "exp2", "log", "log1p", "sqrt", "rsqrt", "tanh", "sigmoid", "relu", "abs",
        "floor", "ceil", "round", "sign", "erf", "sin", "cos", "gelu", "silu", "softplus",
        "reciprocal",
    ):  # fmt: skip
        table[name] = Operator(name, 1)
    table["not"] = Operator("not", 1, boolean=True)
    table["isneginf"] = Operator("isneginf", 1, boolean=True)
    table["where"] = Operator("where", 3)
    table["clip"] = Operator("clip", 3)
    for dtype in ("f64", "f32", "f16", "bf16", "f8e4m3", "f8e5m2", "i64", "i32", "i8", "bool"):
        table[f"cast_{dtype}"] = Operator(f"cast_{dtype}", 1, boolean=dtype == "bool")
    return table


OPERATORS: Mapping[str, Operator] = _table()

# Stored bits of the significand, smallest exponent and largest value of the 8-bit floats (OCP 8-bit
# floating point specification 1.0, table 1; E4M3 has no infinities).
FLOAT8: Mapping[str, tuple[int, int, float]] = {
    "f8e4m3": (3, -6, 448.0),
    "f8e5m2": (2, -14, 57344.0),
}


@dataclass(frozen=True, eq=True)
class Expr:
    """Base of all nodes; carries Python's operators so that masks read like masks."""

    def __add__(self, other: ExprLike) -> Expr:
        return call("add", self, other)

    def __radd__(self, other: ExprLike) -> Expr:
        return call("add", other, self)

    def __sub__(self, other: ExprLike) -> Expr:
        return call("sub", self, other)

    def __rsub__(self, other: ExprLike) -> Expr:
        return call("sub", other, self)

    def __mul__(self, other: ExprLike) -> Expr:
        return call("mul", self, other)

    def __rmul__(self, other: ExprLike) -> Expr:
        return call("mul", other, self)

    def __truediv__(self, other: ExprLike) -> Expr:
        return call("div", self, other)

    def __rtruediv__(self, other: ExprLike) -> Expr:
        return call("div", other, self)

    def __floordiv__(self, other: ExprLike) -> Expr:
        return call("floordiv", self, other)

    def __mod__(self, other: ExprLike) -> Expr:
        return call("mod", self, other)

    def __pow__(self, other: ExprLike) -> Expr:
        return call("pow", self, other)

    def __rfloordiv__(self, other: ExprLike) -> Expr:
        return call("floordiv", other, self)

    def __rmod__(self, other: ExprLike) -> Expr:
        return call("mod", other, self)

    def __rpow__(self, other: ExprLike) -> Expr:
        return call("pow", other, self)

    def __neg__(self) -> Expr:
        return call("neg", self)

    def __abs__(self) -> Expr:
        return call("abs", self)

    def __lt__(self, other: ExprLike) -> Expr:
        return call("lt", self, other)

    def __le__(self, other: ExprLike) -> Expr:
        return call("le", self, other)

    def __gt__(self, other: ExprLike) -> Expr:
        return call("gt", self, other)

    def __ge__(self, other: ExprLike) -> Expr:
        return call("ge", self, other)

    def __and__(self, other: ExprLike) -> Expr:
        return call("and", self, _condition(other))

    def __rand__(self, other: ExprLike) -> Expr:
        return call("and", _condition(other), self)

    def __or__(self, other: ExprLike) -> Expr:
        return call("or", self, _condition(other))

    def __ror__(self, other: ExprLike) -> Expr:
        return call("or", _condition(other), self)

    def __invert__(self) -> Expr:
        return call("not", self)

    def __bool__(self) -> bool:
        raise TypeError(f"an expression has no truth value: {self}; combine masks with & | ~")

    @property
    def children(self) -> tuple[Expr, ...]:
        """Direct subexpressions."""
        return ()

    def __str__(self) -> str:
        return to_text(self)


ExprLike = Expr | Scalar


def _condition(value: ExprLike) -> ExprLike:
    """One side of ``&`` or ``|``.  ``a == b`` compares the expressions themselves."""
    if isinstance(value, bool):
        raise TypeError(
            f"& and | combine expressions, and one side is {value}; if it was a == b or a != b, "
            "say eq(a, b) or ~eq(a, b), and TRUE or FALSE for a constant"
        )
    return value


@dataclass(frozen=True)
class Const(Expr):
    """A literal number or truth value; ``inf`` and ``-inf`` included."""

    value: Scalar

    # 1, 1.0 and True are equal and hash alike in Python; as literals of the language they are not.
    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Const):
            return NotImplemented
        return type(self.value) is type(other.value) and self.value == other.value

    def __hash__(self) -> int:
        return hash((type(self.value).__name__, self.value))

    __str__ = Expr.__str__


@dataclass(frozen=True)
class Rank(Expr):
    """The coordinate of a rank, an integer from 0 to its extent less one."""

    name: str
    __str__ = Expr.__str__


@dataclass(frozen=True)
class Extent(Expr):
    """The extent (number of coordinates) of a rank, written ``#kv``."""

    rank: str
    __str__ = Expr.__str__


@dataclass(frozen=True)
class Read(Expr):
    """The element of ``tensor`` at the given coordinates, one expression per rank."""

    tensor: str
    index: tuple[Expr, ...] = ()

    @property
    def children(self) -> tuple[Expr, ...]:
        """The index expressions."""
        return self.index

    __str__ = Expr.__str__


@dataclass(frozen=True)
class Call(Expr):
    """An elementwise operator of `OPERATORS` applied to its arguments."""

    op: str
    args: tuple[Expr, ...]

    def __post_init__(self) -> None:
        operator = OPERATORS.get(self.op)
        if operator is None:
            raise ValueError(f"unknown operator {self.op!r}; known: {', '.join(sorted(OPERATORS))}")
        if len(self.args) != operator.arity:
            raise ValueError(f"{self.op} takes {operator.arity} arguments, got {len(self.args)}")
        # Kept, as trees are looked up in tables at every step: hashing is not a walk each time.
        object.__setattr__(self, "_hash", hash((self.op, self.args)))

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined,no-any-return]

    def __reduce__(self) -> tuple[type[Call], tuple[str, tuple[Expr, ...]]]:
        return Call, (self.op, self.args)  # hashes of text differ from process to process

    @property
    def children(self) -> tuple[Expr, ...]:
        """The arguments."""
        return self.args

    __str__ = Expr.__str__


# Ranks of every attention: batch, query head, query position, key position, and the head dims.
B, H, Q, KV, D, F = (Rank(name) for name in ("b", "h", "q", "kv", "d", "f"))
TRUE, FALSE = Const(True), Const(False)


def as_expr(value: ExprLike) -> Expr:
    """Wrap a Python number as a literal; expressions pass through."""
    return value if isinstance(value, Expr) else Const(value)


def call(op: str, *args: ExprLike) -> Expr:
    """Build ``op(*args)``, wrapping Python numbers."""
    return Call(op, tuple(as_expr(a) for a in args))


def eq(left: ExprLike, right: ExprLike) -> Expr:
    """The equality operator node (``==`` compares trees)."""
    return call("eq", left, right)


def where(condition: ExprLike, yes: ExprLike, no: ExprLike) -> Expr:
    """``yes`` where the condition holds, else ``no``."""
    return call("where", condition, yes, no)


def walk(expr: Expr) -> Iterator[Expr]:
    """Every node of the tree, parents before children."""
    stack = [expr]
    while stack:
        node = stack.pop()
        yield node
        stack.extend(reversed(node.children))


def ranks_of(expr: Expr) -> frozenset[str]:
    """Names of the ranks whose coordinates the expression uses (extents do not count)."""
    return frozenset(n.name for n in walk(expr) if isinstance(n, Rank))


def tensors_of(expr: Expr) -> tuple[str, ...]:
    """Names of the tensors read, in order of first appearance."""
    return tuple(dict.fromkeys(n.tensor for n in walk(expr) if isinstance(n, Read)))


def rebuild(expr: Expr, children: tuple[Expr, ...]) -> Expr:
    """The same node over other children; the same object if they are the same objects."""
    if all(a is b for a, b in zip(expr.children, children, strict=True)):
        return expr
    if isinstance(expr, Read):
        return Read(expr.tensor, children)
    assert isinstance(expr, Call)
    return Call(expr.op, children)


def transform(expr: Expr, rule: Callable[[Expr], Expr | None]) -> Expr:
    """Apply ``rule`` bottom-up; where it returns None the node stays."""
    new = rebuild(expr, tuple(transform(child, rule) for child in expr.children))
    replaced = rule(new)
    return new if replaced is None else replaced


def substitute(expr: Expr, mapping: Mapping[Expr, Expr]) -> Expr:
    """Replace every occurrence of each key (a whole subtree) by its value, top-down."""
    if expr in mapping:
        return mapping[expr]
    return rebuild(expr, tuple(substitute(child, mapping) for child in expr.children))


def conjuncts(mask: Expr) -> tuple[Expr, ...]:
    """The terms of a conjunction, nested ``&`` flattened; literal True dropped."""
    if isinstance(mask, Call) and mask.op == "and":
        return conjuncts(mask.args[0]) + conjuncts(mask.args[1])
    return () if mask == TRUE else (mask,)


def disjuncts(mask: Expr) -> tuple[Expr, ...]:
    """The terms of a disjunction, nested ``|`` flattened."""
    if isinstance(mask, Call) and mask.op == "or":
        return disjuncts(mask.args[0]) + disjuncts(mask.args[1])
    return (mask,)


def conjunction(terms: tuple[Expr, ...]) -> Expr:
    """``&`` of the terms; literal True when there are none."""
    if not terms:
        return TRUE
    result = terms[0]
    for term in terms[1:]:
        result = call("and", result, term)
    return result


_PLAIN_NAME = re.compile(r"[A-Za-z_][\w@]*(?:\.\w+)*'*", re.ASCII)

# Words that mean something else in an expression, or end one.
_WORDS = frozenset({"inf", "nan", "true", "false", "and", "or", "not", "where", "x"})


def quoted(name: str) -> str:
    """``name`` as the notation writes it: bare where it can be, else a JSON string."""
    if _PLAIN_NAME.fullmatch(name) and name not in _WORDS:
        return name
    return json.dumps(name)


def _literal(value: Scalar) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        if math.isinf(value):
            return "inf" if value > 0 else "-inf"
        return repr(value)
    return str(value)


def to_text(expr: Expr) -> str:
    """Print with the fewest parentheses; `attn_rewrite.cascade.text` parses it back."""
    return _text(expr, 0)


def _text(expr: Expr, outer: int) -> str:
    match expr:
        case Const(value):
            text = _literal(value)
            return f"({text})" if text.startswith("-") and outer > 4 else text
        case Rank(name):
            return quoted(name)
        case Extent(rank):
            return f"#{quoted(rank)}"
        case Read(tensor, index):
            return f"{quoted(tensor)}[{', '.join(_text(i, 0) for i in index)}]"
        case Call(op, args):
            operator = OPERATORS[op]
            if operator.infix is None:
                return f"{op}({', '.join(_text(a, 0) for a in args)})"
            # `(a < b) < c` keeps its parentheses (comparisons do not chain); powers bind right.
            left = _text(args[0], operator.binding + (operator.binding == 1 or op == "pow"))
            right = _text(args[1], operator.binding + (op != "pow"))
            text = f"{left} {operator.infix} {right}"
            return f"({text})" if operator.binding < outer else text
    raise TypeError(f"not an expression: {expr!r}")
