"""A cache of keys and values that is stored in few bits: what `kv_int4` computes with, packed.

Keys have a scale per channel and ``group`` tokens, values one per token and ``group`` channels; the
last ``residual`` tokens stay as they are (Liu et al. 2024, KIVI, sections 3.2-3.3).  A group of
keys is coded once its last token leaves the window, and never again, so codes do not depend on how
the tokens came in.  The state is this object: `reset` empties it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from attn_rewrite.passes.quantize.packing import pack, unpack
from attn_rewrite.passes.quantize.quantisers import EPSILON

_WIDE = 1024  # coded tokens that are numbers at once while a step attends to them


@dataclass
class Packed:
    """Codes [..., words] as bytes, and low end and step [...] of the groups, along ``axis``."""

    codes: Tensor
    low: Tensor
    step: Tensor

    @classmethod
    def of(cls, x: Tensor, bits: int, kind: torch.dtype) -> Packed:
        """``x`` [..., n] with one low end and step for each row; `EPSILON` for a constant row."""
        wide = x.double()
        low = wide.amin(-1).to(kind)
        step = ((wide.amax(-1) - low.double()).clamp_min(EPSILON) / (2**bits - 1)).to(kind)
        tiny = torch.finfo(kind).tiny
        step = step.clamp_min(tiny)
        codes = torch.round((wide - low.double()[..., None]) / step.double()[..., None])
        packed = pack(codes.clamp(0, 2**bits - 1), bits).to(torch.uint8)
        return cls(packed, low, step)

    def numbers(self, bits: int, count: int) -> Tensor:
        """What the codes stand for, [..., count], in the type of the steps."""
        kind = self.step.dtype
        # A code times its step may be twice as far as the numbers reach, which float16 has no room
        # for.
        work = kind if kind.itemsize > 2 else torch.float32
        codes = unpack(self.codes, bits, count).to(work)
        return (codes * self.step.to(work)[..., None] + self.low.to(work)[..., None]).to(kind)

    def part(self, start: int, stop: int) -> Packed:
        """Entries ``start`` to ``stop`` of dimension 2."""
        cut = (t[:, :, start:stop] for t in (self.codes, self.low, self.step))
        return Packed(*cut)

    def rows(self, index: Tensor) -> Packed:
        """The batch entries of ``index``."""
        return Packed(*(t.index_select(0, index) for t in (self.codes, self.low, self.step)))

    def then(self, more: Packed) -> Packed:
        """Both, one behind the other along dimension 2."""
        return Packed(
            *(torch.cat([getattr(self, n), getattr(more, n)], 2) for n in ("codes", "low", "step"))
        )

    @property
    def nbytes(self) -> int:
        """Bytes of storage."""
        return sum(t.nbytes for t in (self.codes, self.low, self.step))


@dataclass
class PackedCache:
    """Keys [b, h, n, d] and values [b, h, n, f] of one attention, coded in ``bits`` bits (2, 4, 8).

    ``append`` adds tokens, ``attend`` is a step of decoding, ``keys`` and ``values`` give numbers.
    Scales have the type of the operands.
    """

    bits: int = 4
    group: int = 32
    residual: int = 128
    coded_keys: Packed | None = None  # [b, h, groups, d, words], a scale per channel
    coded_values: list[Packed] = field(default_factory=list)  # of ``group`` channels each
    recent_keys: Tensor | None = None
    recent_values: Tensor | None = None

    def __post_init__(self) -> None:
        if self.bits not in (2, 4, 8):
            raise ValueError(f"a packed cache has 2, 4 or 8 bits, got {self.bits}")
        if self.group < 1 or self.residual < 0:
            raise ValueError(
                f"a packed cache has groups of at least 1 and a window of at least 0 tokens, got "
                f"group={self.group}, residual={self.residual}"
            )

    @property
    def length(self) -> int:
        """Tokens held."""
        recent = 0 if self.recent_values is None else self.recent_values.shape[2]
        return recent + (self.coded_values[0].low.shape[2] if self.coded_values else 0)

    @property
    def nbytes(self) -> int:
        """Bytes of storage, window included."""
        coded = [*self.coded_values, *([] if self.coded_keys is None else [self.coded_keys])]
        recent = [t for t in (self.recent_keys, self.recent_values) if t is not None]
        return sum(p.nbytes for p in coded) + sum(t.nbytes for t in recent)

    def reset(self) -> None:
        """Forget everything."""
        self.coded_keys, self.coded_values = None, []
        self.recent_keys = self.recent_values = None

    def select(self, index: Tensor) -> None:
        """Keep the batch entries of ``index``, in its order (beams)."""
        if self.recent_keys is None or self.recent_values is None:
            return
        self.recent_keys = self.recent_keys.index_select(0, index)
        self.recent_values = self.recent_values.index_select(0, index)
        self.coded_values = [p.rows(index) for p in self.coded_values]
        if self.coded_keys is not None:
            self.coded_keys = self.coded_keys.rows(index)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add tokens; what leaves the window is coded.  Raises `ValueError` for other lengths."""
        if keys.shape[:3] != values.shape[:3]:
            raise ValueError(
                f"keys {list(keys.shape)} and values {list(values.shape)} differ in batch, heads "
                "or tokens"
            )
        if self.recent_keys is not None and self.recent_values is not None:
            keys = torch.cat([self.recent_keys, keys], 2)
            values = torch.cat([self.recent_values, values], 2)
        whole = max(keys.shape[2] - self.residual, 0) // self.group * self.group
        old = max(values.shape[2] - self.residual, 0)
        if whole:
            b, h, _, d = keys.shape
            parts = keys[:, :, :whole].reshape(b, h, -1, self.group, d).mT
            made = Packed.of(parts, self.bits, keys.dtype)
            self.coded_keys = made if self.coded_keys is None else self.coded_keys.then(made)
        if old:
            split = torch.split(values[:, :, :old], self.group, -1)
            new = [Packed.of(part, self.bits, values.dtype) for part in split]
            have = self.coded_values
            self.coded_values = [a.then(b) for a, b in zip(have, new, strict=True)] if have else new
        # Copies: a view would keep what was coded in memory.
        self.recent_keys = keys[:, :, whole:].clone()
        self.recent_values = values[:, :, old:].clone()

    # Numbers

    def keys(self) -> Tensor:
        """All keys [b, h, n, d] as numbers."""
        assert self.recent_keys is not None
        return torch.cat([*self._old_keys(0, self._coded()[0]), self.recent_keys], 2)

    def values(self) -> Tensor:
        """All values [b, h, n, f] as numbers."""
        assert self.recent_values is not None
        return torch.cat([*self._old_values(0, self._coded()[1]), self.recent_values], 2)

    def _coded(self) -> tuple[int, int]:
        """Coded keys and coded values, in tokens."""
        keys = 0 if self.coded_keys is None else self.coded_keys.low.shape[2] * self.group
        return keys, self.coded_values[0].low.shape[2] if self.coded_values else 0

    def _old_keys(self, start: int, stop: int) -> Iterator[Tensor]:
        if self.coded_keys is None or start >= stop:
            return
        part = self.coded_keys.part(start // self.group, -(-stop // self.group))
        found = part.numbers(self.bits, self.group).mT.flatten(2, 3)
        begin = start // self.group * self.group
        yield found[:, :, start - begin : stop - begin]

    def _old_values(self, start: int, stop: int) -> Iterator[Tensor]:
        if not self.coded_values or start >= stop:
            return
        assert self.recent_values is not None
        total = self.recent_values.shape[3]
        bounds = pairwise([*range(0, total, self.group), total])
        yield torch.cat(
            [
                p.part(start, stop).numbers(self.bits, b - a)
                for p, (a, b) in zip(self.coded_values, bounds, strict=True)
            ],
            -1,
        )

    def _between(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values of some tokens as numbers: coded ones, then the window."""
        assert self.recent_keys is not None
        assert self.recent_values is not None
        found = []
        for old, coded, recent in (
            (self._old_keys, self._coded()[0], self.recent_keys),
            (self._old_values, self._coded()[1], self.recent_values),
        ):
            first = max(start, coded) - coded
            parts = [*old(start, min(stop, coded)), recent[:, :, first : max(stop - coded, first)]]
            found.append(torch.cat(parts, 2))
        return found[0], found[1]

    # Attention

    def attend(self, q: Tensor, scale: float | None = None) -> Tensor:
        """Softmax attention of queries [b, h, q, d], the last tokens held, to all before them.

        Each query sees the tokens up to its own.  Heads of q may be several per key head.  Only a
        tile of the cache is ever in floating point.  Reassociated.
        """
        if not 0 < q.shape[2] <= self.length:
            raise ValueError(f"{q.shape[2]} queries are no last tokens of {self.length} held")
        scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
        work = torch.float64 if q.dtype == torch.float64 else torch.float32
        assert self.recent_keys is not None
        group = q.shape[1] // self.recent_keys.shape[1]
        wide = q.to(work) * scale
        at = torch.arange(self.length - q.shape[2], self.length, device=q.device)
        top = total = out = None
        step = max(_WIDE // self.group, 1) * self.group
        for start in range(0, self.length, step):
            stop = min(start + step, self.length)
            k, v = (x.to(work).repeat_interleave(group, 1) for x in self._between(start, stop))
            s = wide @ k.mT
            later = torch.arange(start, stop, device=q.device) > at[:, None]
            s = s.masked_fill(later, -math.inf)
            high = s.amax(-1, keepdim=True)
            if top is not None:
                high = torch.maximum(high, top)
            p = (s - high.masked_fill(high == -math.inf, 0)).exp()
            sums, part = p.sum(-1, keepdim=True), p @ v
            if top is not None and total is not None and out is not None:
                keep = (top - high).exp()
                sums, part = sums + total * keep, part + out * keep
            top, total, out = high, sums, part
        assert out is not None
        assert total is not None
        return (out / total).to(q.dtype)
