"""What the kernels of a bundle read besides a site's operands, as arrays of one file for each site.

``0/tiles`` and ``0/columns`` are the lists of a site's first kernel, where that leaves tiles out by
lists (`make_lists`), made for the lengths of the site; the tables of the plan that a guard reads
come under their own names; ``order_q``, ``order_kv`` and ``place`` are the tokens of a reordered
attention: the kernel takes ``Q[..., order_q[h, q], :]``, K and V likewise, and the output of query
``q`` is row ``place[h, q]`` of its result.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from attn_rewrite.backends.triton.emit import Source
from attn_rewrite.backends.triton.lists import blockwise_tables, make_lists
from attn_rewrite.backends.triton.program import Program
from attn_rewrite.cascade.expr import ranks_of
from attn_rewrite.cascade.oracle import interpret
from attn_rewrite.cascade.reordered import Reordered
from attn_rewrite.site import Site
from attn_rewrite.tables import Table

Array = npt.NDArray[np.generic]
_ORDERS = {"order_q": ("h", "q"), "order_kv": ("hkv", "kv"), "place": ("h", "q")}


@dataclass(frozen=True, eq=False)
class SiteTables:
    """Arrays by name, each with the names of its dimensions; one of extent 1 is shared."""

    arrays: Mapping[str, Array]
    ranks: Mapping[str, tuple[str, ...]]

    def write(self, path: Path) -> None:
        """A safetensors file; its metadata has the ranks, as JSON."""
        from safetensors.numpy import save_file

        ranks = {n: list(self.ranks[n]) for n in self.arrays}
        arrays = {n: np.ascontiguousarray(a) for n, a in self.arrays.items()}
        save_file(arrays, path, metadata={"ranks": json.dumps(ranks)})


def batch_of(site: Site) -> object:
    """Batch entries of a site; a symbol where their number is dynamic."""
    return next((f.extent for f in site.factors if f.role == "b"), 1)


def missing_extents(program: Program, site: Site) -> tuple[str, ...]:
    """Ranks without a fixed extent that lists of tiles for this site would depend on."""
    sizes: dict[str, object] = {**site.extents(), "b": batch_of(site)}
    used = {"q", "kv"}.union(*map(ranks_of, program.guards())) & {"b", "h", "q", "kv"}
    return tuple(sorted(r for r in used if not isinstance(sizes[r], int)))


def site_tables(
    sources: tuple[Source, ...],
    site: Site,
    tables: Mapping[str, Table],
    reordered: Reordered | None,
) -> SiteTables:
    """The arrays for the kernels of ``site``; ``tables`` are those of its plan.

    A site whose lengths a list depends on must have fixed ones (`missing_extents`).
    """
    arrays: dict[str, Array] = dict(tables)
    ranks: dict[str, tuple[str, ...]] = dict(_ORDERS)
    for place, source in enumerate(sources):
        ranks |= {t.name: t.ranks for t in source.program.cascade.inputs if t.name in tables}
        ranks |= {f"{place}/tiles": ("b", "h", "block", "place"), f"{place}/columns": ("item",)}
        if source.schedule.skipping == "lists":
            made = _lists(source, site, tables)
            arrays |= {f"{place}/{n}": a for n, a in made.items()}
    if reordered is not None:
        arrays |= _orders(reordered, site)
    return SiteTables(arrays, {n: ranks[n] for n in arrays})


def _lists(source: Source, site: Site, tables: Mapping[str, Table]) -> dict[str, Array]:
    (guard,) = source.program.guards()
    sizes = {r: n for r, n in site.extents().items() if isinstance(n, int)}
    batch = batch_of(site)
    found = make_lists(
        guard, source.schedule, q_len=sizes["q"], kv_len=sizes["kv"], heads=sizes.get("h", 1),
        batch=batch if isinstance(batch, int) else 1, rows=source.program.roles.row,
        tables={n: tables[n] for n in blockwise_tables(guard) if n in tables},
    )  # fmt: skip
    columns = found.columns if found.kept else np.zeros(1, np.int32)
    return {"tiles": found.tiles, "columns": columns}


def _orders(reordered: Reordered, site: Site) -> dict[str, Array]:
    """Positions sent through the gathers of the cascade itself, by its oracle."""
    import torch

    sizes = {r: int(n) for r, n in site.extents().items()}
    key_head = reordered.inner.inputs[1].ranks[1]

    def positions(heads: str, length: str) -> torch.Tensor:
        at = torch.arange(sizes[length], dtype=torch.float64)
        return at.view(1, 1, -1, 1).repeat(1, sizes[heads], 1, 1)

    keys = positions(key_head, "kv")
    gathered = interpret(reordered.before(), {"Q": positions("h", "q"), "K": keys, "V": keys})
    back = interpret(reordered.after(), {"AVP": positions("h", "q")})
    found = {"order_q": gathered["QP"], "order_kv": gathered["KP"], "place": back["AV"]}
    return {n: t[0, :, :, 0].numpy().astype(np.int32) for n, t in found.items()}
