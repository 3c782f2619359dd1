"""reorder: the attention over its tokens in another order; the same numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar

from attn_rewrite.cascade.expr import KV, Expr, H, Q, Rank
from attn_rewrite.cascade.reordered import in_order, per_head, reorder
from attn_rewrite.cascade.staged import as_staged
from attn_rewrite.errors import PolicyError
from attn_rewrite.passes.transform import Exactness, Option, Transform, spans_text
from attn_rewrite.site import Refusal
from attn_rewrite.token_layout import TokenLayout
from attn_rewrite.token_order import TokenOrder, axis_order, tile_order

if TYPE_CHECKING:
    from attn_rewrite.cascade.ir import Cascade
    from attn_rewrite.site import Site


@dataclass(frozen=True)
class Reorder(Transform):
    """Attend over the grid's tokens along other axes first, or tile by tile.

    Q, K and V are permuted as the attention sees them (after rotary embedding), masks and biases
    with them, and the output is put back, so nothing changes but the order of sums.  A ``dilation``
    brings the tokens of one remainder together, which makes dilated neighborhoods dense in few
    tiles.  Patterns that stand after it in a pipeline speak of the new order:
    ``reorder(order="hwf") | window(size=512)`` is a window over time.  Text around the grid stays
    where it is.
    """

    name: ClassVar[str] = "reorder"
    exactness: ClassVar[Exactness] = Exactness.EXACT
    source: ClassVar[str] = (
        "Zhao et al. 2025 (PAROAttention, 2506.16054), section 3; tiles: Zhang et al. 2025 "
        "(Sliding Tile Attention, 2502.04507)"
    )

    order: Annotated[
        str | tuple[str, ...] | None,
        Option("axes from slowest to fastest, as hwf; a list has one entry per key head"),
    ] = None
    tile: Annotated[tuple[int, ...] | None, Option("extents of a tile, one per axis")] = None
    dilation: Annotated[
        tuple[int, ...] | None,
        Option("distance of the tokens of a tile, one per axis; without a tile: of neighbours"),
    ] = None
    layout: Annotated[
        str | None, Option("what positions mean, as grid=30x48x80,text=256; none: from the model")
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        tiled = self.tile is not None or self.dilation is not None
        if (self.order is not None) == tiled:
            raise ValueError(
                "reorder: give order (as hwf) or tile (as [8, 16], with dilation where wanted), "
                "one of them"
            )
        if () in (self.order, self.tile, self.dilation):
            raise ValueError("reorder: the list is empty")
        for name in ("tile", "dilation"):
            sizes = getattr(self, name)
            if sizes is not None and min(sizes) < 1:
                raise ValueError(f"reorder: {name} is {list(sizes)}, expected positive extents")
        try:
            given = None if self.layout is None else TokenLayout.parse(self.layout)
            if given is not None:
                self.orders(given)
        except PolicyError as error:
            raise ValueError(f"reorder: {error}") from None

    def orders(self, layout: TokenLayout) -> tuple[TokenOrder, ...]:
        """The order of all heads, or one per key head (`PolicyError` where it does not fit)."""
        if self.tile is not None or self.dilation is not None:
            tile = self.tile or (1,) * len(layout.grid)
            return (tile_order(layout, tile, self.dilation),)
        names = (self.order,) if isinstance(self.order, str) else self.order or ()
        return tuple(axis_order(layout, name) for name in names)

    def apply(self, cascade: Cascade, site: Site) -> Cascade | Refusal:
        """Reorder every head."""
        return self._applied(cascade, site, tuple(range(site.hkv)))

    def apply_to_heads(
        self, cascade: Cascade, site: Site, heads: tuple[int, ...]
    ) -> Cascade | Refusal:
        """Reorder the given query heads; they must be all that share a key head."""
        group = site.hq // site.hkv
        wanted = sorted({h // group for h in heads})
        if len(heads) != len(wanted) * group:
            reason = (
                f"heads {spans_text(heads)} cut the {group} query heads that share a key head, "
                "whose keys have one order; name whole groups"
            )
            return self.refuse(site, "reorder-heads", reason)
        return self._applied(cascade, site, tuple(wanted))

    def _applied(
        self, cascade: Cascade, site: Site, key_heads: tuple[int, ...]
    ) -> Cascade | Refusal:
        found = self._orders_of(site)
        if isinstance(found, Refusal):
            return found
        staged = as_staged(in_order(cascade))
        if staged is None or staged.stages or staged.probability is not None:
            reason = (
                f"reorder comes before what quantises or maps {cascade.name}: its codes belong to "
                "blocks of the order they were made in"
            )
            return self.refuse(site, "reorder-late", reason)
        chosen = {h: found[h if len(found) > 1 else 0] for h in key_heads}
        if all(order.is_identity for order in chosen.values()):
            return cascade
        assert isinstance(site.q_len, int)
        assert isinstance(site.kv_len, int)
        group = site.hq // site.hkv
        key_head = Rank("hkv") if group > 1 else H
        head = H // group if group > 1 else H
        uniform = len(key_heads) == site.hkv and len(set(chosen.values())) == 1

        def expression(of: str, rank: Rank, index: Expr) -> Expr:
            each = {h: getattr(order, of)(rank) for h, order in chosen.items()}
            return each[key_heads[0]] if uniform else per_head(each, index, rank)

        return reorder(
            cascade, expression("source", Q, head), expression("source", KV, key_head),
            expression("place", Q, head), (site.q_len, site.kv_len),
        )  # fmt: skip

    def _orders_of(self, site: Site) -> tuple[TokenOrder, ...] | Refusal:
        layout = self.token_layout(site)
        if isinstance(layout, Refusal):
            return layout
        try:
            found = self.orders(layout)
        except PolicyError as error:
            return self.refuse(site, "reorder-misfit", f"reorder: {error}")
        if len(found) not in (1, site.hkv):
            reason = f"reorder has {len(found)} orders, expected one or one per key head"
            return self.refuse(site, "reorder-misfit", f"{reason} ({site.hkv})")
        return found

    def token_layout(self, site: Site) -> TokenLayout | Refusal:
        """The layout given, else the one found in the graph."""
        if self.layout is not None:
            given = TokenLayout.parse(self.layout)
            problem = given.misfit(site.q_len, site.kv_len)
            return given if problem is None else self.refuse(site, "layout-misfit", problem)
        from attn_rewrite.passes.token_grid import found_layout  # needs torch

        found = found_layout(site)
        if found is not None:
            return found
        reason = (
            "reorder wants a grid, but no grid was found in the graph; say what the "
            f'{site.q_len} positions mean with layout="grid=FxHxW,text=N"'
        )
        return self.refuse(site, "layout-unknown", reason)

    def after(self, site: Site) -> Site:
        """In the new order a query's position says nothing about what it may see."""
        return replace(site, causal=False) if site.causal else site

    def admits(self, site: Site, named_kinds: tuple[str, ...] = ()) -> Refusal | None:
        """Refuse what has no sequence of its own, of one known length."""
        if site.family != "softmax":
            reason = f"reorder moves the tokens of softmax attention, but this is {site.family}"
            return self.refuse(site, f"reorder-{site.family}", reason)
        fixed = isinstance(site.q_len, int) and isinstance(site.kv_len, int)
        if not fixed or site.offset != "0":
            reason = (
                f"reorder needs {site.q_len} queries and {site.kv_len} keys of one sequence whose "
                "length is fixed; capture with a fixed length"
            )
            return self.refuse(site, "reorder-dynamic", reason)
        aligned = site.kind == "self" or self.layout is not None or site.kind in named_kinds
        if not aligned:
            reason = (
                f"reorder moves queries and keys alike, but this is {site.kind} attention between "
                'two sequences; give layout="grid=FxHxW,text=N" to say that they are one'
            )
            return self.refuse(site, f"reorder-{site.kind}", reason)
        return None
