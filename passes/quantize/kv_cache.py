"""kv_int8, kv_int4: the cache of keys and values in few bits, for steps of decoding."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar

from attn_rewrite.cascade.expr import KV, B, D, Expr, Extent, F, Rank, Read, call, where
from attn_rewrite.cascade.ir import Einsum, TensorDecl
from attn_rewrite.cascade.staged import StagedAttention
from attn_rewrite.passes.quantize.base import Quantisation
from attn_rewrite.passes.quantize.quantisers import Affine, Granularity
from attn_rewrite.passes.transform import Option, outside

if TYPE_CHECKING:
    from attn_rewrite.site import Refusal, Site


@dataclass(frozen=True)
class QuantisedCache(Quantisation):
    """Keys per channel in groups of tokens, values per token in groups of channels, the last
    ``residual`` tokens as they are; both become numbers again before the products, which is why a
    scale may differ along the summed channels here.
    """

    bits: ClassVar[int] = 8
    decodes: ClassVar[bool] = True
    source: ClassVar[str] = "Liu et al. 2024 (KIVI), sections 3.2-3.3"

    group: Annotated[int, Option("tokens (keys) or channels (values) of a group", minimum=1)] = 32
    residual: Annotated[int, Option("last tokens kept in floating point", minimum=0)] = 128

    def rewrite(
        self, staged: StagedAttention, site: Site, heads: tuple[int, ...] | None
    ) -> StagedAttention | Refusal:
        """The numbers that the codes stand for, as stages."""
        if staged.stages:
            reason = f"{self.name}: the operands of this Site are quantised already"
            return self.refuse(site, "quantise-twice", reason)
        head = staged.head
        old = call("max", Extent("kv") - self.residual, 0)
        # Keys are coded in whole groups of tokens only, values one token at a time.
        bounds = {"K": call("floordiv", old, self.group) * self.group, "V": old}
        grains = {"K": Granularity("channel", self.group), "V": Granularity("group", self.group)}
        stages: list[Einsum] = []
        tensors: list[TensorDecl] = []
        for name, channel in (("K", D), ("V", F)):
            made = self._coded(
                name, (B, head, KV, channel), grains[name], bounds[name], staged, heads
            )
            stages += made[0]
            tensors += made[1]
        return replace(staged, stages=tuple(stages), tensors=tuple(tensors), k="KD", v="VD")

    def _coded(
        self, name: str, space: tuple[Rank, ...], grain: Granularity, bound: Expr,
        staged: StagedAttention, heads: tuple[int, ...] | None,
    ) -> tuple[list[Einsum], list[TensorDecl]]:  # fmt: skip
        """Smallest and largest of each group, and the numbers of the codes between them."""
        _, head, token, channel = space
        x = Read(name, space)
        index = grain.index(head, token, channel)
        ranks = grain.ranks(head.name, token.name, channel.name)
        low, high = Read(f"{name}L", index), Read(f"{name}H", index)
        folded = token if grain.kind == "channel" else channel
        affine = Affine(self.bits)
        value = where(token < bound, affine.value(affine.code(x, low, high), low, high), x)
        if heads is not None:
            group = staged.form.group
            value = where(outside(tuple(h // group for h in heads), head), x, value)
        stages = [
            Einsum(low, x, ((folded.name, "min"),)),
            Einsum(high, x, ((folded.name, "max"),)),
            Einsum(Read(f"{name}D", space), value),
        ]
        names = tuple(r.name for r in space)
        return stages, [TensorDecl(f"{name}{s}", ranks) for s in "LH"] + [
            TensorDecl(f"{name}D", names)
        ]


@dataclass(frozen=True)
class KvInt8(QuantisedCache):
    """Attend to keys and values as an int8 cache would hold them (KIVI)."""

    name: ClassVar[str] = "kv_int8"


@dataclass(frozen=True)
class KvInt4(QuantisedCache):
    """Attend to keys and values as an int4 cache would hold them (KIVI)."""

    name: ClassVar[str] = "kv_int4"
    bits: ClassVar[int] = 4


@dataclass(frozen=True)
class KvInt2(QuantisedCache):
    """Attend to keys and values as a 2-bit cache would hold them (KIVI)."""

    name: ClassVar[str] = "kv_int2"
    bits: ClassVar[int] = 2
