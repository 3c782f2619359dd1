"""Quantisers: number formats as frozen values that write codes and scales as expressions.

A quantiser knows its range, its rounding and the formulas of scale, code and value; a
`Granularity` knows which elements share a scale.  Both speak the language of cascades, so the
oracle, the placement rule, the fusion analysis and every backend read the same formulas.

Formulas: Zhang et al. 2025 (SageAttention, section 3), Liu et al. 2024 (KIVI, section 3.2),
Micikevicius et al. 2022 (8-bit floats), Zhang et al. 2025c (SageAttention3, section 3),
Ryu et al. 2025 (DGQ, section 4.2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from attn_rewrite.cascade.expr import FLOAT8, Const, Expr, Rank, call, where

# No scale is smaller than this over the largest code: a block of zeros has codes of 0, not 0 / 0.
EPSILON = 1e-30

Rounding = Literal["even", "away"]


def rounded(x: Expr, mode: Rounding = "even") -> Expr:
    """``x`` to the nearest integer; halves to the even one, or away from zero."""
    if mode == "even":
        return call("round", x)
    return call("sign", x) * call("floor", call("abs", x) + 0.5)


@dataclass(frozen=True)
class Integer:
    """Signed integers of ``bits`` bits, symmetric about 0 (the lowest code is never used)."""

    bits: int = 8
    rounding: Rounding = "even"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"an integer quantiser has 2 to 8 bits, got {self.bits}")

    @property
    def limit(self) -> float:
        """The largest code: 127 for 8 bits, 7 for 4."""
        return float(2 ** (self.bits - 1) - 1)

    @property
    def dtype(self) -> str:
        """How codes are stored; 4 bits are packed two in a byte."""
        return "i4" if self.bits == 4 else "i8"

    def scale(self, x: Expr) -> Expr:
        """The scale that one element asks for; that of a group is the largest."""
        return call("max", call("abs", x), EPSILON) / self.limit

    def code(self, x: Expr, scale: Expr) -> Expr:
        """The code of ``x``: rounded, saturated."""
        return self.clipped(rounded(x / scale, self.rounding))

    def clipped(self, x: Expr) -> Expr:
        """An integer saturated to the range, in its type."""
        return call("cast_i8", call("clip", x, -self.limit, self.limit))


@dataclass(frozen=True)
class Float8:
    """8-bit floats, E4M3 (largest 448) or E5M2 (largest 57344); half to even, saturating."""

    kind: Literal["e4m3", "e5m2"] = "e4m3"
    limit: float = 0.0  # the value the largest element is scaled to; 0: the format's largest

    def __post_init__(self) -> None:
        largest = FLOAT8[self.dtype][2]
        if not 0 <= self.limit <= largest:
            raise ValueError(f"{self.kind} reaches {largest:g}, got a limit of {self.limit:g}")
        if not self.limit:
            object.__setattr__(self, "limit", largest)

    @property
    def dtype(self) -> str:
        """How codes are stored."""
        return f"f8{self.kind}"

    def scale(self, x: Expr) -> Expr:
        """The scale that one element asks for; that of a group is the largest."""
        return call("max", call("abs", x), EPSILON) / self.limit

    def code(self, x: Expr, scale: Expr) -> Expr:
        """The code of ``x``: the nearest 8-bit float of ``x / scale``."""
        return call(f"cast_{self.dtype}", x / scale)

    def clipped(self, x: Expr) -> Expr:
        """A number in the type."""
        return call(f"cast_{self.dtype}", x)


# Where the magnitude of a 4-bit float begins, and whether a tie goes up to it (to an even code).
_E2M1 = ((0.25, 0.5, False), (0.75, 1.0, True), (1.25, 1.5, False), (1.75, 2.0, True),
         (2.5, 3.0, False), (3.5, 4.0, True), (5.0, 6.0, False))  # fmt: skip


@dataclass(frozen=True)
class Float4:
    """4-bit floats E2M1 (0, 0.5, 1, 1.5, 2, 3, 4, 6) with an E4M3 scale for a group (NVFP4).

    A group whose largest element is under 6 * 2^-10 has a scale of 0 and is lost.
    """

    limit: float = 6.0
    dtype: str = "float"  # no backend stores these codes: they become numbers again at once

    def scale(self, x: Expr) -> Expr:
        """The scale that one element asks for, rounded to E4M3; that of a group is the largest."""
        return call("cast_f8e4m3", call("abs", x) / self.limit)

    def code(self, x: Expr, scale: Expr) -> Expr:
        """The code of ``x``: nearest, ties to the even one, saturating."""
        smallest = 2.0**-9  # of E4M3: nothing is divided by a scale of 0
        size = call("abs", x) / call("max", scale, smallest)
        code: Expr = Const(0.0)
        for begin, value, up in _E2M1:
            code = where(size >= begin if up else size > begin, value, code)
        return call("sign", x) * code


@dataclass(frozen=True)
class Affine:
    """Unsigned integers of ``bits`` bits between the smallest and the largest of a group.

    value = code * step + low, with step = (high - low) / (2^bits - 1); a constant group has code 0.
    """

    bits: int = 4

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"an affine quantiser has 2 to 8 bits, got {self.bits}")

    @property
    def levels(self) -> int:
        """The largest code."""
        return int(2**self.bits - 1)

    def step(self, low: Expr, high: Expr) -> Expr:
        """The distance of neighbouring values."""
        return call("max", high - low, EPSILON) / float(self.levels)

    def code(self, x: Expr, low: Expr, high: Expr) -> Expr:
        """The code of ``x``."""
        code = call("round", (x - low) / self.step(low, high))
        return call("clip", code, 0.0, float(self.levels))

    def value(self, code: Expr, low: Expr, high: Expr) -> Expr:
        """What a code stands for."""
        return code * self.step(low, high) + low


@dataclass(frozen=True)
class Log2:
    """Powers of one half of a maximum: value = peak * 2^-code, codes 0 to 2^bits - 1.

    The format has no zero: without a case of its own a masked key would get peak * 2^-(2^bits - 1),
    which adds up at 4 bits.  Zeros stay zeros here.
    """

    bits: int = 8
    steps: int = 1  # codes for each halving; 2: powers of the root of one half (RepQ-ViT)
    linear: bool = False  # round ratios, up from 1.5 * 2^n (FQ-ViT), not their logarithms
    flush: bool = False  # what is below the last code becomes 0 (both of them), not that code

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"a logarithmic quantiser has 2 to 8 bits, got {self.bits}")
        if self.steps not in (1, 2) or (self.linear and self.steps > 1):
            raise ValueError(
                "a logarithmic quantiser has 1 step a halving, or 2 with rounded logarithms, got "
                f"{self.steps}"
            )

    @property
    def levels(self) -> float:
        """The largest code."""
        return float(2**self.bits - 1)

    def whole(self, x: Expr, peak: Expr) -> Expr:
        """round(-log2(x / peak)) in steps, not saturated; ``x`` is positive."""
        steps: Expr = call("log", x / peak) * (-self.steps / math.log(2))
        nearest: Expr = call("round", steps)
        if not self.linear:
            return nearest
        # A ratio peak / x under 1.5 * 2^(n - 1) goes down, which no logarithm is needed for.
        return nearest - where(peak < 0.75 * call("exp2", nearest) * x, 1.0, 0.0)

    def code(self, x: Expr, peak: Expr) -> Expr:
        """The code of ``x``, saturated."""
        return call("clip", self.whole(x, peak), 0.0, self.levels)

    def value(self, x: Expr, peak: Expr) -> Expr:
        """What ``x`` becomes; 0 stays 0."""
        code = self.code(x, peak)
        found = peak * call("exp2", -code if self.steps == 1 else code * (-1 / self.steps))
        kept = (x > 0) & (self.whole(x, peak) <= self.levels) if self.flush else x > 0
        return where(kept, found, 0.0)


GRANULARITIES = ("tensor", "head", "block", "warp", "thread", "token", "group", "channel")
Kind = Literal["tensor", "head", "block", "warp", "thread", "token", "group", "channel"]


@dataclass(frozen=True)
class Granularity:
    """Which elements of X[b, head, token, channel] share a scale.

    =============  ===========================================================================
    ``tensor``     all of them
    ``head``       those of a batch entry and head
    ``block``      ``size`` consecutive tokens
    ``warp``       32 tokens (queries of a warp); 64 for keys
    ``thread``     what a thread of a tensor-core tile reads (Zhang et al. 2025, SageAttention2,
                   section 3.2): of 32 queries those equal modulo 8, of 64 keys those whose token
                   modulo 8 halves to the same; ``size`` is another number of tokens (Hopper: 16
                   queries of a warp, 128 keys of a tile)
    ``token``      one token
    ``group``      ``size`` consecutive channels of a token
    ``channel``    a channel of ``size`` consecutive tokens; of all tokens where size is 0
    =============  ===========================================================================
    """

    kind: Kind
    size: int = 0

    def __post_init__(self) -> None:
        if self.kind not in GRANULARITIES:
            raise ValueError(
                f"unknown granularity {self.kind!r}; known: {', '.join(GRANULARITIES)}"
            )
        if self.size < 0 or (self.kind in ("block", "group") and self.size < 1):
            raise ValueError(f"a {self.kind} has at least 1 element, got {self.size}")

    def index(self, head: Expr, token: Rank, channel: Expr) -> tuple[Expr, ...]:
        """Where the scale of an element is: the coordinates of the scale tensor."""
        batch = Rank("b")
        if self.kind == "tensor":
            return ()
        if self.kind == "head":
            return (batch, head)
        if self.kind == "group":
            return (batch, head, token, call("floordiv", channel, self.size))
        if self.kind == "channel":
            blocks = (call("floordiv", token, self.size),) if self.size else ()
            return (batch, head, *blocks, channel)
        return (batch, head, self._tokens(token))

    def _tokens(self, token: Rank) -> Expr:
        if self.kind == "token":
            return token
        queries = token == Rank("q")
        if self.kind == "block":
            return call("floordiv", token, self.size)
        if self.kind == "warp":
            return call("floordiv", token, 32 if queries else 64)
        size = self.size or (32 if queries else 64)
        if queries:
            return call("floordiv", token, size) * 8 + call("mod", token, 8)
        return call("floordiv", token, size) * 4 + call("floordiv", call("mod", token, 8), 2)

    def ranks(self, head: str, token: str, channel: str) -> tuple[str, ...]:
        """Names of the ranks of the scale tensor; ``qg`` counts groups of ``q``."""
        if self.kind == "tensor":
            return ()
        if self.kind == "head":
            return ("b", head)
        if self.kind == "group":
            return ("b", head, token, f"{channel}g")
        if self.kind == "channel":
            return ("b", head, *((f"{token}g",) if self.size else ()), channel)
        return ("b", head, token if self.kind == "token" else f"{token}g")
