"""Neighborhood attention: windows on the axes of a grid that shift at borders and never shrink."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from attn_rewrite.cascade.expr import TRUE, Call, Const, Expr, call, eq
from attn_rewrite.passes.sparse.laid_out import (
    Grid,
    LaidOut,
    PerAxis,
    clamp,
    per_axis,
    same_count,
)
from attn_rewrite.passes.transform import Option
from attn_rewrite.site import Refusal

if TYPE_CHECKING:
    from attn_rewrite.site import Site

PerAxisBool = bool | tuple[bool, ...]


@dataclass(frozen=True)
class Span:
    """The window of one axis: ``size`` keys, queries in groups of ``stride`` sharing a window."""

    size: int
    stride: int = 1
    dilation: int = 1
    causal: bool = False

    def problem(self, extent: int | None) -> str | None:
        """Why the window does not fit an axis of ``extent`` positions, or None."""
        if self.stride > self.size:
            return f"stride {self.stride} is larger than the window {self.size}"
        if extent is not None and self.size * self.dilation > extent:
            return f"window {self.size} with dilation {self.dilation} is larger than {extent}"
        return None

    def keeps(self, q: Expr, kv: Expr, extent: Expr) -> Expr:
        """The kept pairs of coordinates on an axis of ``extent`` positions.

        Dilation splits the axis by remainder; each part has its own length and its own windows.
        """
        if self.dilation == 1:
            return self._window(q, kv, extent)
        if isinstance(extent, Const):  # one digit of the position, on the first axis too
            q, kv = _digit(q, extent), _digit(kv, extent)
        d = self.dilation
        length = (extent - q % d + (d - 1)) // d
        return eq(q % d, kv % d) & self._window(q // d, kv // d, length)

    def _window(self, q: Expr, kv: Expr, length: Expr) -> Expr:
        group = q // self.stride * self.stride if self.stride > 1 else q
        if self.causal:
            leader = call("min", group + (self.stride - 1), length - 1) if self.stride > 1 else q
            return (kv >= leader - (self.size - 1)) & (kv <= q)
        leader = call("min", group + self.stride // 2, length - 1) if self.stride > 1 else q
        start = clamp(leader - self.size // 2, 0, length - self.size)
        return (kv >= start) & (kv < start + self.size)


def _digit(coordinate: Expr, extent: Const) -> Expr:
    """The coordinate modulo its extent, which changes nothing inside the grid."""
    match coordinate:
        case Call("mod", (_, modulus)) if modulus == extent:
            return coordinate
    return coordinate % extent


@dataclass(frozen=True)
class Neighborhood(LaidOut):
    """Keep the window around each query on every axis of the grid.

    Even windows reach one further back.  Windows shift inward at the borders, so that every query
    sees ``window`` keys; a causal axis sees only its past and shrinks.  Text is dense.
    """

    name: ClassVar[str] = "neighborhood"
    source: ClassVar[str] = (
        "Hassani et al. 2023 (Neighborhood Attention Transformer, 2204.07143), section 3; "
        "dilation: 2209.15001"
    )

    window: Annotated[int | tuple[int, ...], Option("keys per axis", minimum=1)]
    dilation: Annotated[int | tuple[int, ...], Option("distance of keys per axis", minimum=1)] = 1
    causal: Annotated[bool | tuple[bool, ...], Option("axes that see their past only")] = False

    @property
    def strides(self) -> PerAxis:
        """Queries that share a window, per axis."""
        return 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("window", "stride", "dilation"):
            value = getattr(self, name, 1)
            if min(per_axis(value, 1), default=0) < 1:
                raise ValueError(f"{self.name}: {name} is {value}, expected at least 1")
        self.axes()

    def axes(self) -> int | None:
        """As many as the lists have entries; a single number means every axis."""
        return same_count(
            self.name,
            window=self.window,
            stride=self.strides,
            dilation=self.dilation,
            causal=self.causal,
        )

    def spans(self, axes: int) -> tuple[Span, ...]:
        """The window of each axis."""
        causal = (self.causal,) * axes if isinstance(self.causal, bool) else self.causal
        numbers = (per_axis(v, axes) for v in (self.window, self.strides, self.dilation))
        return tuple(Span(*entry) for entry in zip(*numbers, causal, strict=True))

    def between(self, grid: Grid, site: Site) -> Expr | Refusal:
        """Inside the window on every axis."""
        mask: Expr = TRUE
        spans = self.spans(len(grid.q))
        for axis, (span, extent) in enumerate(zip(spans, grid.sizes(), strict=True)):
            if problem := span.problem(extent):
                return self.misfit(site, f"axis {axis}: {problem}")
            kept = span.keeps(grid.q[axis], grid.kv[axis], grid.extents[axis])
            mask = kept if mask == TRUE else mask & kept
        return mask


@dataclass(frozen=True)
class Gna(Neighborhood):
    """Neighborhood attention with a stride: groups of queries share one window.

    A stride of 1 is `neighborhood`, a stride of ``window`` is attention in blocks.  Where windows
    are multiples of key tiles and strides of query tiles, every tile is empty or full.
    """

    name: ClassVar[str] = "gna"
    source: ClassVar[str] = "Hassani et al. 2025 (Generalized Neighborhood Attention, 2504.16922)"

    stride: Annotated[int | tuple[int, ...], Option("queries that share a window, per axis")] = 1

    @property
    def strides(self) -> PerAxis:
        """The stride."""
        return self.stride
