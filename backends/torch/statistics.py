"""What the blocks of an attention map hold, without the map: a two-pass kernel.

The first pass finds the log-sum-exp of every row, the second computes the scores again tile by tile
and reduces the probabilities of each block to a sum, a maximum and a count.  The first pass is the
same for every order of the tokens, as a row's sum does not depend on it; an order only changes
which rows and columns make a tile.  Memory is that of one tile, whatever the length.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_rewrite.backends.torch.emit import Emitter
from attn_rewrite.backends.torch.form import linear_score
from attn_rewrite.backends.torch.space import TileSpace
from attn_rewrite.cascade.attention import QK, SoftmaxAttention
from attn_rewrite.cascade.expr import TRUE, Expr
from attn_rewrite.graph import EagerBuilder

# Scores of a tile, in elements.
_TILE = 1 << 20
_COLUMNS = 4096


@dataclass(frozen=True, eq=False)
class HeadMap:
    """The attention map of one head of one batch entry, to be read in tiles.

    ``inputs`` are Q [b, h, q, d], K [b, hkv, kv, d] and the reads of ``form`` by name.  Half types
    are widened to float32.
    """

    form: SoftmaxAttention
    inputs: Mapping[str, Tensor]
    batch: int
    head: int

    @property
    def q(self) -> Tensor:
        """Queries [q, d]."""
        return _wide(self.inputs["Q"][self.batch, self.head])

    @property
    def k(self) -> Tensor:
        """Keys [kv, d]."""
        return _wide(self.inputs["K"][self.batch, self.head // self.form.group])

    def scores(self, q: Tensor, k: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Scores [rows, columns] of the given tokens; -inf where the guard drops the pair."""
        product = (q[rows] @ k[columns].mT)[None, None]
        space = self._space(product.dtype, rows, columns)
        linear = linear_score(self.form.score)
        known: dict[Expr, Tensor] = {QK: product}
        emitter = Emitter(EagerBuilder(), space, known)
        if linear is None:
            score = emitter.tensor(self.form.score, product.dtype)
        else:
            score = product * linear.scale
            if linear.bias is not None:
                score = score + emitter.tensor(linear.bias)
        if self.form.guard != TRUE:
            score = score.masked_fill(~emitter.truth(self.form.guard), -math.inf)
        whole: Tensor = score.expand(1, 1, len(rows), len(columns))
        return whole[0, 0]

    def sink(self, dtype: torch.dtype, rows: Tensor) -> Tensor | None:
        """The logit of each row that joins its sum, if the attention has one."""
        if self.form.sink is None:
            return None
        emitter = Emitter(EagerBuilder(), self._space(dtype, rows, rows[:1]))
        sink: Tensor = emitter.tensor(self.form.sink, dtype).expand(1, 1, len(rows), 1)
        return sink[0, 0, :, 0]

    def _space(self, dtype: torch.dtype, rows: Tensor, columns: Tensor) -> TileSpace:
        q, k = self.inputs["Q"], self.inputs["K"]
        device = q.device
        extents = {
            r: n
            for t in self.form.reads
            for r, n in zip(t.ranks, self.inputs[t.name].shape, strict=True)
            if n != 1
        } | {"b": len(q), "h": q.shape[1], "hkv": k.shape[1], "q": q.shape[2], "kv": k.shape[2]}
        coordinates = {
            "b": torch.full((1, 1, 1, 1), self.batch, device=device),
            "h": torch.full((1, 1, 1, 1), self.head, device=device),
            "q": rows.view(1, 1, -1, 1),
            "kv": columns.view(1, 1, 1, -1),
        }
        reads = {t.name: self.inputs[t.name] for t in self.form.reads}
        reads = {n: _wide(t) if t.is_floating_point() else t for n, t in reads.items()}
        return TileSpace(device, dtype, extents, reads, 1, (0, 0), (0, 0), coordinates=coordinates)


@dataclass(frozen=True, eq=False)
class BlockStatistics:
    """Of every block of a map: the sum and the maximum of its probabilities, how many are small.

    All are [rows of blocks, columns of blocks], float64; ``areas`` the pairs of each block (the
    last ones may be short).
    """

    sums: Tensor
    tops: Tensor
    small: Tensor
    areas: Tensor


def row_lse(head: HeadMap) -> Tensor:
    """The log-sum-exp of every row [q]; -inf for a row without keys.  The first pass."""
    q, k = head.q, head.k
    every = torch.arange(len(q), device=q.device)
    keys = torch.arange(len(k), device=q.device)
    parts = []
    for rows in _cuts(every, _height(1)):
        total = torch.full((len(rows),), -math.inf, dtype=q.dtype, device=q.device)
        for columns in _cuts(keys, _COLUMNS):
            part = torch.logsumexp(head.scores(q, k, rows, columns), -1)
            total = torch.logaddexp(total, part)
        sink = head.sink(q.dtype, rows)
        parts.append(total if sink is None else torch.logaddexp(total, sink))
    return torch.cat(parts)


def block_statistics(
    head: HeadMap, lse: Tensor, rows: Tensor, columns: Tensor, block: int, epsilon: float
) -> BlockStatistics:
    """Blocks of ``block`` x ``block`` with the tokens in the order ``rows`` and ``columns``.

    ``lse`` is that of `row_lse`; a probability below ``epsilon`` is small.  The second pass.
    """
    q, k = head.q, head.k
    shape = (-(-len(rows) // block), -(-len(columns) // block))
    sums, tops, small = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))
    safe = lse.masked_fill(lse == -math.inf, 0.0)
    wide = max(_COLUMNS // block, 1) * block
    at = 0
    for part in _cuts(rows, _height(block)):
        down = slice(at, at + -(-len(part) // block))
        start = 0
        for keys in _cuts(columns, wide):
            p = torch.exp(head.scores(q, k, part, keys) - safe[part, None])
            across = slice(start, start + -(-len(keys) // block))
            sums[down, across] = _tiled(p, block).sum((1, 3), dtype=torch.float64).cpu()
            tops[down, across] = _tiled(p, block).amax((1, 3)).double().cpu()
            few = _tiled((p < epsilon).to(p.dtype), block)
            small[down, across] = few.sum((1, 3), dtype=torch.float64).cpu()
            start = across.stop
        at = down.stop
    heights, widths = (_extents(len(t), block) for t in (rows, columns))
    return BlockStatistics(sums, tops, small, heights[:, None] * widths[None])


def _tiled(p: Tensor, block: int) -> Tensor:
    """[rows of blocks, block, columns of blocks, block], zeros past the ends."""
    height, width = (-n % block for n in p.shape)
    padded = torch.nn.functional.pad(p, (0, width, 0, height))
    return padded.view(padded.shape[0] // block, block, padded.shape[1] // block, block)


def _extents(length: int, block: int) -> Tensor:
    starts = torch.arange(0, length, block, dtype=torch.float64)
    return (length - starts).clamp(max=block)


def _height(block: int) -> int:
    """Rows of a tile, whole blocks of them."""
    return max(_TILE // _COLUMNS // block, 1) * block


def _cuts(items: Tensor, size: int) -> Iterator[Tensor]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)
