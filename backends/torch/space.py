"""The spaces the tiled kernel evaluates expressions in: items of a score tile, or its columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attn_rewrite.backends.torch.emit import Emitter
from attn_rewrite.backends.torch.schedule import Row, Span, clipped
from attn_rewrite.cascade.expr import Const, Expr, Rank, Read

# Dimensions of a tile: items (batch entry and key head, or several rows), query heads of a key
# head, queries, keys.  Batch and head coordinates vary with the item.
ITEM, GROUP, QUERY, KEY = range(4)


@dataclass(frozen=True)
class TileSpace:
    """The points of one score tile [items, group, queries, keys].

    With ``row`` every item has the queries and keys of that row and ``batch`` x ``heads`` (query
    heads) are the items; else ``coordinates`` has every coordinate, each broadcastable to the tile.
    """

    device: torch.device
    dtype: torch.dtype
    extents: Mapping[str, int]
    tensors: Mapping[str, Tensor]
    group: int
    batch: Span
    heads: Span
    row: Row | None = None
    coordinates: Mapping[str, Tensor] | None = None

    def columns(self, start: int, stop: int) -> TileSpace:
        """The same tile with fewer keys."""
        if self.row is not None:
            return replace(self, row=replace(self.row, keys=clipped(self.row.keys, start, stop)))
        assert self.coordinates is not None
        keys = self.coordinates["kv"][..., start:stop]
        return replace(self, coordinates={**self.coordinates, "kv": keys})

    def coordinate(self, rank: str) -> Tensor:
        """Coordinates of ``b``, ``h``, ``q`` or ``kv``."""
        if self.coordinates is not None:
            return self.coordinates[rank]
        assert self.row is not None
        if rank == "q":
            return self._arange(self.row.queries).view(1, 1, -1, 1)
        if rank == "kv":
            parts = [self._arange(s) for s in self.row.keys]
            return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(1, 1, 1, -1)
        batch, heads = self._arange(self.batch), self._arange(self.heads).view(-1, self.group)
        if rank == "h":
            return heads.repeat(len(batch), 1).view(-1, self.group, 1, 1)
        if rank == "b":
            return batch.repeat_interleave(len(heads)).view(-1, 1, 1, 1)
        raise ValueError(f"rank {rank} has no coordinate in a score tile; it has b, h, q and kv")

    def extent(self, rank: str) -> int:
        """The extent of a rank of the attention."""
        return self.extents[rank]

    def _arange(self, span: Span) -> Tensor:
        return torch.arange(span[0], span[1], device=self.device)

    def read(self, read: Read, emitter: Emitter) -> Tensor:
        """Elements of a tensor: slices where its indices are plain ranks, else an indexed read."""
        tensor = self.tensors[read.tensor]
        names = [i.name if isinstance(i, Rank) else "" for i in read.index]
        plain = all(names) and len(set(names)) == len(names) and set(names) <= set("bhq") | {"kv"}
        if plain and self.row is not None:
            return self._sliced(tensor, names)
        return gather(tensor, read.index, emitter)

    def _sliced(self, tensor: Tensor, names: Sequence[str]) -> Tensor:
        """A view of the tensor over the tile (a copy only of several key ranges or batches)."""
        assert self.row is not None
        spans = {
            "b": (self.batch,),
            "h": (self.heads,),
            "q": (self.row.queries,),
            "kv": self.row.keys,
        }
        for dim, name in enumerate(names):
            tensor = take(tensor, dim, spans[name])
        order = sorted(range(len(names)), key=lambda d: ("b", "h", "q", "kv").index(names[d]))
        sizes = dict(zip(names, tensor.shape, strict=True))
        shape = [sizes.get(n, 1) for n in ("b", "h", "q", "kv")]
        tensor = tensor.permute(order).reshape(shape)
        items = (self.heads[1] - self.heads[0]) // self.group
        if shape[1] == 1:
            if shape[0] == 1:
                return tensor
            return tensor.repeat_interleave(items, 0)
        batch = self.batch[1] - self.batch[0]
        tensor = tensor.expand(batch, *shape[1:])
        return tensor.reshape(batch * items, self.group, *shape[2:])


def take(tensor: Tensor, dim: int, spans: Sequence[Span]) -> Tensor:
    """Ranges of a dimension one after the other; a dimension of extent one broadcasts."""
    if tensor.shape[dim] == 1:
        return tensor
    if len(spans) == 1:
        return tensor.narrow(dim, spans[0][0], spans[0][1] - spans[0][0])
    return torch.cat([tensor.narrow(dim, low, high - low) for low, high in spans], dim)


def gather(tensor: Tensor, index: Sequence[Expr], emitter: Emitter) -> Tensor:
    """Indexed read; an index outside the tensor (at a point the guard leaves out) is clamped."""
    at: list[Any] = []
    for dim, expr in enumerate(index):
        last = tensor.shape[dim] - 1
        if last == 0:
            at.append(torch.zeros((1, 1, 1, 1), dtype=torch.int64, device=tensor.device))
        elif isinstance(expr, Const):
            at.append(torch.full((1, 1, 1, 1), int(expr.value), device=tensor.device))
        else:
            at.append(emitter.tensor(expr, torch.int64).clamp(0, last))
    return tensor[tuple(at)] if at else tensor.view(1, 1, 1, 1)
