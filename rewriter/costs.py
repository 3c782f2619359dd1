"""Work of a site before and after its rewrite, on the sizes of the measured inputs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from attn_rewrite.backends.torch import tile_counts
from attn_rewrite.cascade.cost import site_cost
from attn_rewrite.cascade.ir import Cascade
from attn_rewrite.cascade.staged import attention_form
from attn_rewrite.graph import op_name, value_of
from attn_rewrite.passes.find.anchor import SDPA
from attn_rewrite.report import WorkCost
from attn_rewrite.target import for_device

if TYPE_CHECKING:
    from attn_rewrite.driver import Decision
    from attn_rewrite.site import Site


def hint(size: Any) -> int:
    """The length a size had on the example inputs."""
    if isinstance(size, int):
        return size
    node = getattr(size, "node", None)
    found = None if node is None else node.hint
    return int(found) if found is not None else 1


def sizes(site: Site) -> dict[str, int]:
    """Extents of the cascade's ranks on the example inputs, the batch included."""
    query = site.inputs["Q"]
    shape = value_of(query.node).shape
    whole = math.prod(hint(s) for s in shape)
    known = {name: hint(value) for name, value in site.extents().items()}
    batch = whole // max(known["h"] * known["q"] * known["d"], 1)
    return {"b": max(batch, 1), **known}


def before_and_after(site: Site, item: Decision) -> tuple[WorkCost | None, WorkCost | None]:
    """(as the model had it, as it is now); None where a cascade is no softmax attention."""
    known = sizes(site)
    fused = op_name(site.anchor) == SDPA
    before = _cost(site.cascade, known, site, fused=fused, tiles=_all_tiles(known, item.block))
    if item.kernel is None or item.cascade is None:
        return before, before
    name = item.kernel.name
    known = known | {
        rank: extent
        for decl in item.cascade.inputs
        if decl.name in item.tables
        for rank, extent in zip(decl.ranks, item.tables[decl.name].shape, strict=True)
    }
    tiles = (
        _tiles(item.cascade, known, item)
        if name in ("tiled", "mapped")
        else _all_tiles(known, item.block)
    )
    return before, _cost(item.cascade, known, site, fused=name != "dense", tiles=tiles)


def _all_tiles(known: dict[str, int], block: int) -> tuple[int, int]:
    total = known["b"] * known["h"] * -(-known["q"] // block) * -(-known["kv"] // block)
    return total, total


def _tiles(cascade: Cascade, known: dict[str, int], item: Decision) -> tuple[int, int]:
    if attention_form(cascade) is None:
        return _all_tiles(known, item.block)
    counts = tile_counts(cascade, known["q"], known["kv"], item.block, known["h"], item.tables)
    return counts.executed * known["b"], counts.total * known["b"]


def _cost(
    cascade: Cascade, known: dict[str, int], site: Site, *, fused: bool, tiles: tuple[int, int]
) -> WorkCost:
    value = value_of(site.inputs["Q"].node)
    fraction = tiles[0] / tiles[1] if tiles[1] else 1.0
    declared = {r.name for r in cascade.ranks}
    extents = {n: v for n, v in known.items() if n in declared}
    cost = site_cost(
        cascade, extents, for_device(value.device.type), dtype=value.dtype, tile_fraction=fraction
    )
    # A cascade of summaries has no scores of pairs, hence no tiles of them.
    shown = None if cascade is not site.cascade and attention_form(cascade) is None else tiles
    return WorkCost(cost.flops, cost.dram_bytes if fused else cost.unfused_bytes, shown)
