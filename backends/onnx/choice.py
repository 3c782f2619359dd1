"""Which form a site takes in ONNX Runtime: the cheapest by measured prices, and an ``If`` between
two where the length decides.

Prices are of the CPU provider (`cost`).  Only forms that compute the site exactly are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from attn_rewrite.backends.onnx.contrib import DOMAIN
from attn_rewrite.backends.onnx.cost import Form, Sizes, estimate
from attn_rewrite.backends.onnx.graph import Recorder

# The longest length that is looked at: prices were measured up to half of it.
LONGEST = 1 << 13
# A second form must save this share somewhere before a file gets both.
WORTH_BRANCH = 0.1
# An export runs the file on both sides of a switch, in float64 as well: up to this many tokens.
LONGEST_SWITCH = 2048

Emit = Callable[[Recorder], ir.Value]
Ranges = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Lengths:
    """Sizes of a site whose length is any of ``first`` to ``last``.

    ``axis`` is the symbol of that length, empty where it is fixed or no single symbol: then no
    ``If`` is made.
    """

    sizes: Sizes
    first: int
    last: int
    axis: str = ""

    def at(self, length: int) -> Sizes:
        """The sizes at one length; the given ones where it is fixed."""
        if self.first == self.last:
            return self.sizes
        return replace(self.sizes, q_len=length, kv_len=length)

    def samples(self) -> list[int]:
        """Lengths to look at: the ends and the powers of two between."""
        between = (1 << n for n in range(LONGEST.bit_length()))
        inside = {n for n in between if self.first < n < self.last}
        return sorted({self.first, self.last, *inside})


@dataclass(frozen=True)
class Choice:
    """The form ``name``, or ``short`` up to ``switch`` tokens; ``why`` says what was compared."""

    name: str
    why: str
    short: str | None = None
    switch: int = 0


def lengths_of(inputs: Sequence[ir.Value], ranges: Ranges) -> Lengths | None:
    """The sizes of q, k, v [b, h, s, n]; None where heads or widths are not fixed.

    Queries and keys with dynamic lengths of their own are looked at with equal ones.
    """
    shapes = [x.shape for x in inputs[:3]]
    if any(s is None or len(s) != 4 for s in shapes):
        return None
    q, k, v = (list(s) for s in shapes if s is not None)
    fixed = (q[1], k[1], q[3], v[3])
    heads, key_heads, width, out = (n if isinstance(n, int) else 0 for n in fixed)
    if not all((heads, key_heads, width, out)):
        return None
    batch = q[0] if isinstance(q[0], int) else 1
    sizes = Sizes(heads, key_heads, 0, 0, width, out, batch)
    if isinstance(q[2], int) and isinstance(k[2], int):
        return Lengths(replace(sizes, q_len=q[2], kv_len=k[2]), k[2], k[2])
    symbol = str(q[2])
    if symbol != str(k[2]) or symbol not in ranges:
        return Lengths(sizes, 1, LONGEST)
    low, high = max(ranges[symbol][0], 1), ranges[symbol][1]
    return Lengths(sizes, low, max(low, min(high, LONGEST)), symbol)


def choose(forms: Mapping[str, Form], lengths: Lengths) -> Choice:
    """The cheapest of ``forms`` at the longest length, and another up to some length where that is
    much cheaper."""
    samples = lengths.samples()
    prices = {n: [estimate(f, lengths.at(s)) for s in samples] for n, f in forms.items()}
    best = min(prices, key=lambda n: prices[n][-1])
    short = min(prices, key=lambda n: prices[n][0])
    said = _compared(prices, samples[-1])
    if short == best or not lengths.axis:
        return Choice(best, said)

    def cheaper(length: int) -> bool:
        at = lengths.at(length)
        return estimate(forms[short], at) <= estimate(forms[best], at)

    if cheaper(samples[-1]):  # equal there
        return Choice(short, said)
    switch = _last(cheaper, samples)
    saved = max(
        1 - a / b
        for a, b, s in zip(prices[short], prices[best], samples, strict=True)
        if s <= switch
    )
    if saved < WORTH_BRANCH or switch > LONGEST_SWITCH:
        return Choice(best, said)
    return Choice(best, f"{said}; up to {switch} tokens {short} is cheaper", short, switch)


def _compared(prices: Mapping[str, Sequence[float]], length: int) -> str:
    """What every form costs at ``length``, the cheapest first."""
    ends = sorted((found[-1], name) for name, found in prices.items())
    (best, name), *others = ends
    said = f"{name} is estimated at {_ms(best)} at {length} tokens"
    rest = ", ".join(f"{other} slower by measured prices ({_ms(cost)})" for cost, other in others)
    return f"{said}; {rest}" if rest else said


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.{2 if seconds < 0.01 else 0}f} ms"


def _last(holds: Callable[[int], bool], samples: Sequence[int]) -> int:
    """The last length up to which ``holds`` is true, between two of the ``samples``."""
    after = next(i for i, s in enumerate(samples) if not holds(s))
    low, high = samples[after - 1], samples[after]
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def branch(r: Recorder, like: ir.Value, switch: int, short: Emit, long: Emit) -> ir.Value:
    """An ``If``: ``short`` where q (``like`` [b, h, s, n]) has up to ``switch`` rows, else
    ``long``."""
    graphs = []
    for emit, name in ((short, "short"), (long, "long")):
        inner = r.inner()
        out = inner.op("Identity", emit(inner))
        out.dtype = like.dtype
        imports = {"": r.opset, DOMAIN: 1}
        graphs.append(
            ir.Graph([], [out], nodes=inner.nodes, name=f"{r.prefix}/{name}", opset_imports=imports)
        )
    few = r.scalar(r.op("LessOrEqual", r.extent(like, 2), r.integers([switch])))
    return r.op("If", few, then_branch=graphs[0], else_branch=graphs[1])
