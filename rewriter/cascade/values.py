"""Values of expressions over a box of rank coordinates, as float64 torch tensors.

A value has one dimension per rank of the frame (size 1 where it does not vary), so that every
operator is one broadcast torch operation.  Truth values stay bool and coordinates int64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attn_rewrite.cascade.expr import FLOAT8, Call, Const, Expr, Extent, Rank, Read, walk
from attn_rewrite.cascade.extents import shift_of
from attn_rewrite.errors import CascadeError

_FLOATS = {"f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_INTEGERS = {"i64": 64, "i32": 32, "i8": 8}


@dataclass
class Frame:
    """The box an expression is evaluated over.

    ``coordinates`` are consecutive int64 values per rank, ``active`` the points that count (None:
    all): only there must a read lie inside its tensor.  ``present`` collects the points where the
    divisors of the outermost product are not empty.
    """

    ranks: tuple[str, ...]
    coordinates: Mapping[str, Tensor]
    extents: Mapping[str, int]
    tensors: Mapping[str, Tensor]
    active: Tensor | None = None
    present: list[Tensor] = field(default_factory=list)

    def axis(self, rank: str) -> int:
        """The dimension of ``rank``."""
        return self.ranks.index(rank)

    def shape(self) -> list[int]:
        """Points along each rank."""
        return [len(self.coordinates[r]) for r in self.ranks]

    def restricted(self, condition: Tensor) -> Frame:
        """The same box with fewer active points."""
        active = condition if self.active is None else self.active & condition
        return Frame(self.ranks, self.coordinates, self.extents, self.tensors, active)


def evaluate(expr: Expr, frame: Frame, outermost: bool = False) -> Tensor:
    """The value of ``expr``; ``outermost`` collects divisors of a product in ``frame.present``.

    ``a / b`` is 0 where b is 0 (the divisor is empty there), and ``exp(a - b)`` is 0 where a is
    -inf whatever b is (an empty score), as the user operations of the paper define it.
    """
    match expr:
        case Const(value):
            dtype = {bool: torch.bool, int: torch.int64, float: torch.float64}[type(value)]
            return _constant(torch.tensor(value, dtype=dtype), frame)
        case Rank(name):
            shape = [-1 if r == name else 1 for r in frame.ranks]
            return frame.coordinates[name].view(shape)
        case Extent(rank):
            return _constant(torch.tensor(frame.extents[rank]), frame)
        case Read():
            return _read(expr, frame)
        case Call("mul" | "neg" | "div"):
            return _product(expr, frame, outermost)
        case Call(op, args):
            special = _SPECIAL.get(op)
            if special is not None:
                return special(expr, frame)
            return _OPERATIONS[op](*(evaluate(a, frame) for a in args))
    raise TypeError(f"not an expression: {expr!r}")


def truth(value: Tensor) -> Tensor:
    """The value as a truth value."""
    return value if value.dtype == torch.bool else value != 0


def real(value: Tensor) -> Tensor:
    """The value in float64."""
    return value.to(torch.float64)


def broadcast_shape(*shapes: Sequence[int]) -> list[int]:
    """The common shape of values of one frame, where a size of 1 gives way to any other."""
    return [next((n for n in sizes if n != 1), 1) for sizes in zip(*shapes, strict=True)]


def _constant(value: Tensor, frame: Frame) -> Tensor:
    device = next(iter(frame.coordinates.values())).device if frame.coordinates else None
    return value.to(device).view([1] * len(frame.ranks))


def _read(read: Read, frame: Frame) -> Tensor:
    tensor = frame.tensors.get(read.tensor)
    if tensor is None:
        raise CascadeError(f"{read} is read before anything is written to it")
    if len(read.index) != tensor.ndim:
        raise CascadeError(
            f"{read} has {len(read.index)} indices, the tensor {tensor.ndim} dimensions"
        )
    view = _slice(read, tensor, frame)
    return _gather(read, tensor, frame) if view is None else view


def place(access: Read, tensor: Tensor, frame: Frame) -> Tensor | None:
    """The box of ``tensor`` that the frame accesses, as a view with a dimension per index.

    None unless each index is a literal or a shifted rank of its own and stays inside.
    """
    shifts = [shift_of(i, frame.extents) for i in access.index]
    ranks = [s.rank for s in shifts if s is not None and s.rank is not None]
    if len(set(ranks)) != len(ranks):
        return None
    for dim, shift in enumerate(shifts):
        if shift is None:
            return None
        start, count = shift.span(frame.coordinates)
        if start < 0 or start + count > tensor.shape[dim]:
            return None
        tensor = tensor.narrow(dim, start, count)
    return tensor


def _slice(read: Read, tensor: Tensor, frame: Frame) -> Tensor | None:
    """A view with the dimensions of the frame, where `place` finds one."""
    box = place(read, tensor, frame)
    if box is None:
        return None
    ranks = [next((n.name for n in walk(i) if isinstance(n, Rank)), None) for i in read.index]
    counts = {r: n for r, n in zip(ranks, box.shape, strict=True) if r is not None}
    box = box.reshape(list(counts.values()))
    order = sorted(range(len(counts)), key=lambda i: frame.axis(list(counts)[i]))
    return box.permute(order).reshape([counts.get(r, 1) for r in frame.ranks])


def _gather(read: Read, tensor: Tensor, frame: Frame) -> Tensor:
    """Any index expressions; a point that counts must lie inside the tensor."""
    indices = []
    for dim, index in enumerate(read.index):
        at = evaluate(index, frame).to(torch.int64)
        outside = (at < 0) | (at >= tensor.shape[dim])
        if frame.active is not None:
            outside = outside & frame.active
        if bool(outside.any()):
            example = at.expand(outside.shape)[outside][0]
            raise CascadeError(
                f"{read} is read at {index} = {int(example)}, outside its extent "
                f"{tensor.shape[dim]}; filter such points with a where clause"
            )
        indices.append(at.clamp(0, max(0, tensor.shape[dim] - 1)))
    if 0 in tensor.shape:
        return tensor.new_zeros(broadcast_shape(*(i.shape for i in indices)))
    return tensor[tuple(indices)]


def _arithmetic(value: Tensor) -> Tensor:
    """Truth values count as 0 and 1."""
    return value.to(torch.int64) if value.dtype == torch.bool else value


def _product(expr: Call, frame: Frame, outermost: bool) -> Tensor:
    """A product, quotient or negation; the outermost ones say which points are not touched."""
    first = evaluate(expr.args[0], frame, outermost)
    if expr.op == "neg":
        return -_arithmetic(first)
    if expr.op == "mul":
        return _arithmetic(first) * _arithmetic(evaluate(expr.args[1], frame, outermost))
    divisor = real(evaluate(expr.args[1], frame))
    present = divisor != 0
    if outermost and not bool(present.all()):
        frame.present.append(present)
    return torch.where(present, real(first) / torch.where(present, divisor, 1.0), 0.0)


def _exponential(expr: Call, frame: Frame) -> Tensor:
    power = torch.exp if expr.op == "exp" else torch.exp2
    match expr.args[0]:
        case Call("sub", (a, b)):
            left, right = real(evaluate(a, frame)), real(evaluate(b, frame))
            return torch.where(left == -math.inf, 0.0, power(left - right))
    return power(real(evaluate(expr.args[0], frame)))


def _conditional(expr: Call, frame: Frame) -> Tensor:
    condition = truth(evaluate(expr.args[0], frame))
    yes = evaluate(expr.args[1], frame.restricted(condition))
    no = evaluate(expr.args[2], frame.restricted(~condition))
    dtype = torch.promote_types(yes.dtype, no.dtype)
    return torch.where(condition, yes.to(dtype), no.to(dtype))


def _conjunction(expr: Call, frame: Frame) -> Tensor:
    """The right side counts only where the left one holds, so that it may guard a read."""
    left = truth(evaluate(expr.args[0], frame))
    return left & truth(evaluate(expr.args[1], frame.restricted(left)))


_SPECIAL: dict[str, Callable[[Call, Frame], Tensor]] = {
    "exp": _exponential,
    "exp2": _exponential,
    "where": _conditional,
    "and": _conjunction,
}


def _power(a: Tensor, b: Tensor) -> Tensor:
    a, b = _arithmetic(a), _arithmetic(b)
    if a.is_floating_point() or b.is_floating_point() or bool((b < 0).any()):
        a, b = real(a), real(b)
    return torch.pow(a, b)


def _promoted(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def operation(a: Tensor, b: Tensor) -> Tensor:
        a, b = _arithmetic(a), _arithmetic(b)
        dtype = torch.promote_types(a.dtype, b.dtype)
        return function(a.to(dtype), b.to(dtype))

    return operation


def _of_real(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda a: function(real(a))


def _exact(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Integers stay integers (abs, floor, round, sign)."""
    return lambda a: function(_arithmetic(a))


def float8(value: Tensor, name: str) -> Tensor:
    """``value`` rounded to an 8-bit float, half to even, saturating; in the type of ``value``.

    By exponents, because a conversion of float64 by way of float32 rounds twice.
    """
    bits, smallest, largest = FLOAT8[name]
    value = value.clamp(-largest, largest)
    exponent = torch.frexp(value).exponent - 1
    step = torch.ldexp(torch.ones_like(value), exponent.clamp(min=smallest) - bits)
    return torch.round(value / step) * step


def _cast(name: str) -> Callable[[Tensor], Tensor]:
    """Round to the named type and come back; integer types truncate and saturate."""
    if name == "bool":
        return truth
    if name in FLOAT8:
        return lambda a: float8(real(a), name)
    if name in _FLOATS:
        return lambda a: real(a).to(_FLOATS[name]).to(torch.float64)
    bits = _INTEGERS[name]

    def operation(a: Tensor) -> Tensor:
        a = _arithmetic(a)
        limit = 2 ** (bits - 1)
        # The largest float64 below 2**63 keeps the conversion of i64 defined.
        high = float(limit - 1) if bits < 64 else float(limit - 1024)
        return (
            a.clamp(-limit, limit - 1)
            if a.dtype == torch.int64
            else a.clamp(-limit, high).to(torch.int64)
        )

    return operation


_OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "lt": _promoted(torch.lt), "le": _promoted(torch.le), "gt": _promoted(torch.gt),
    "ge": _promoted(torch.ge), "eq": _promoted(torch.eq), "ne": _promoted(torch.ne),
    "or": lambda a, b: truth(a) | truth(b), "not": lambda a: ~truth(a),
    "add": _promoted(torch.add), "sub": _promoted(torch.sub), "pow": _power,
    "floordiv": _promoted(torch.floor_divide), "mod": _promoted(torch.remainder),
    "max": _promoted(torch.maximum), "min": _promoted(torch.minimum),
    "log": _of_real(torch.log),
    "log1p": _of_real(torch.log1p), "sqrt": _of_real(torch.sqrt), "rsqrt": _of_real(torch.rsqrt),
    "tanh": _of_real(torch.tanh), "sigmoid": _of_real(torch.sigmoid), "relu": _exact(torch.relu),
    "abs": _exact(torch.abs), "floor": _exact(torch.floor), "ceil": _exact(torch.ceil),
    "round": _exact(torch.round), "sign": _exact(torch.sign), "erf": _of_real(torch.erf),
    "sin": _of_real(torch.sin), "cos": _of_real(torch.cos),
    "gelu": _of_real(torch.nn.functional.gelu), "silu": _of_real(torch.nn.functional.silu),
    "softplus": _of_real(lambda a: torch.logaddexp(a, torch.zeros_like(a))),
    "reciprocal": _of_real(torch.reciprocal),
    "isneginf": _of_real(torch.isneginf),
    "clip": lambda a, low, high: _promoted(torch.minimum)(_promoted(torch.maximum)(a, low), high),
    **{f"cast_{name}": _cast(name) for name in (*_FLOATS, *FLOAT8, *_INTEGERS, "bool")},
}  # fmt: skip
