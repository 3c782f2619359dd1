"""Patterns that need to know what positions mean: a grid of tokens, with text around it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from attn_rewrite.cascade.expr import KV, Const, Expr, Extent, call
from attn_rewrite.errors import PolicyError
from attn_rewrite.passes.transform import Option, SparsePattern, position
from attn_rewrite.site import Refusal
from attn_rewrite.token_layout import TokenLayout

if TYPE_CHECKING:
    from attn_rewrite.site import Site

PerAxis = int | tuple[int, ...]


@dataclass(frozen=True)
class Grid:
    """Coordinates of a query and a key, and the extent of each axis, slowest axis first.

    ``layout`` is None for a plain text, whose length may be dynamic.
    """

    q: tuple[Expr, ...]
    kv: tuple[Expr, ...]
    extents: tuple[Expr, ...]
    layout: TokenLayout | None

    def sizes(self) -> tuple[int | None, ...]:
        """Extents as numbers; None where dynamic."""
        return tuple(int(e.value) if isinstance(e, Const) else None for e in self.extents)


@dataclass(frozen=True, kw_only=True)
class LaidOut(SparsePattern):
    """A pattern over the grid of a `TokenLayout`; text sees everything and is seen by all.

    Without ``layout`` the grid is taken from the captured graph (patch embeddings, windows), and a
    pattern of one axis takes a plain text.  Where the length may change, the pattern holds at the
    length of the layout, and other lengths are dense.  Subclasses give `between`, and the number of
    `axes` they want where they know it.
    """

    layout: Annotated[
        str | None, Option("what positions mean, as grid=30x48x80,text=256; none: from the model")
    ] = None

    framed: ClassVar[bool] = False  # wants frames x tokens, whatever the grid

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layout is not None:
            try:
                TokenLayout.parse(self.layout)
            except PolicyError as error:
                raise ValueError(f"{self.name}: {error}") from None

    @property
    def reads_grid(self) -> bool:
        """True if positions are taken for those of the grid that the model shows."""
        return self.layout is None and self.axes() != 1

    def axes(self) -> int | None:
        """How many axes the grid must have; None: any."""
        return None

    def between(self, grid: Grid, site: Site) -> Expr | Refusal:
        """The kept pairs of grid positions."""
        raise TypeError(f"{type(self).__name__} must define between()")

    def mask(self, site: Site) -> Expr | Refusal:
        """`between` on the grid, with everything else dense."""
        layout = self.token_layout(site)
        if isinstance(layout, Refusal):
            return layout
        q = position(site)
        if layout is None:
            length = Const(site.kv_len) if isinstance(site.kv_len, int) else Extent("kv")
            return self.between(Grid((q,), (KV,), (length,), None), site)
        layout = layout.frames() if self.framed else layout
        extents = tuple(Const(n) for n in layout.grid)
        inside = self.between(Grid(layout.axes(q), layout.axes(KV), extents, layout), site)
        if isinstance(inside, Refusal):
            return inside
        mask = layout.around_grid(q, KV, inside)
        if isinstance(site.q_len, int) and isinstance(site.kv_len, int):
            return mask
        # Another length has another layout, which nobody gave: there, every pair is kept.
        return mask | call("ne", Extent("kv"), layout.kv_len)

    def token_layout(self, site: Site) -> TokenLayout | Refusal | None:
        """The layout given, else found, else None for a plain text."""
        given = None if self.layout is None else TokenLayout.parse(self.layout)
        wanted = self.axes()
        if given is not None:
            problem = given.misfit(_example(site.q_len), _example(site.kv_len))
            if problem is None and wanted not in (None, len(given.grid)):
                problem = f"the layout {given} has {len(given.grid)} axes, expected {wanted}"
            return given if problem is None else self.refuse(site, "layout-misfit", problem)
        if wanted == 1:
            return None
        from attn_rewrite.passes.token_grid import found_layout  # needs torch

        found = found_layout(site)
        if found is not None and wanted in (None, len(found.grid)):
            return found
        shown = f"the grid found is {found}" if found else "no grid was found in the graph"
        if found is None and wanted is None and not self.framed:
            return None
        axes = f"{self.name} wants {wanted} axes" if wanted else f"{self.name} wants a grid"
        return self.refuse(
            site,
            "layout-unknown",
            f"{axes}, but {shown}; say what the {site.q_len} positions mean with "
            'layout="grid=FxHxW,text=N"',
        )

    def admits(self, site: Site, named_kinds: tuple[str, ...] = ()) -> Refusal | None:
        """Joint attention has positions where its layout is given: text beside the grid."""
        joint = ("joint",) if self.layout is not None else ()
        return super().admits(site, (*named_kinds, *joint))

    def misfit(self, site: Site, reason: str) -> Refusal:
        """A Refusal because the options do not fit the grid."""
        return self.refuse(site, f"{self.name}-misfit", f"{self.name}: {reason}")


def _example(size: Any) -> Any:
    """A length, or what a dynamic one was on the example inputs."""
    return size if isinstance(size, int) else getattr(getattr(size, "node", None), "hint", size)


def per_axis(value: PerAxis, axes: int) -> tuple[int, ...]:
    """One number per axis; a single one holds for all."""
    return (value,) * axes if isinstance(value, int) else value


def same_count(name: str, **options: PerAxis | tuple[bool, ...] | bool) -> int | None:
    """The number of axes that lists among ``options`` give; `ValueError` where they differ."""
    counts = {k: len(v) for k, v in options.items() if isinstance(v, tuple)}
    if len(set(counts.values())) > 1:
        shown = ", ".join(f"{k} {n}" for k, n in counts.items())
        raise ValueError(f"{name}: lists of different lengths: {shown}; give one entry per axis")
    return next(iter(counts.values()), None)


def within(distance: Expr, reach: int) -> Expr:
    """``-reach <= distance <= reach``."""
    return (distance <= reach) & (distance >= -reach)


def clamp(value: Expr, low: Expr | int, high: Expr | int) -> Expr:
    """``value`` moved into ``low .. high``."""
    return call("min", call("max", value, low), high)
