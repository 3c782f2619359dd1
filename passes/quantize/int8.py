"""int8: integer products of queries and keys, and of probabilities and values if asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from attn_rewrite.cascade.staged import StagedAttention
from attn_rewrite.passes.quantize.base import Quantisation
from attn_rewrite.passes.quantize.invariance import rows_sum_to_one
from attn_rewrite.passes.quantize.quantisers import (
    GRANULARITIES,
    Float8,
    Granularity,
    Integer,
    Kind,
)
from attn_rewrite.passes.quantize.scheme import Coding, Scheme
from attn_rewrite.passes.transform import Option

if TYPE_CHECKING:
    from attn_rewrite.site import Refusal, Site

Grain = Literal["tensor", "head", "block", "warp", "thread", "token", "channel"]


@dataclass(frozen=True)
class IntegerProducts(Quantisation):
    """Integer codes of ``bits`` bits for Q and K; subclasses choose the defaults."""

    bits: ClassVar[int] = 8

    pv: Annotated[
        bool | Literal["int8", "fp8"],
        Option("also the product with V: true for int8, or fp8 (E4M3); P below its row maximum"),
    ] = False
    granularity: Annotated[
        Grain,
        Option("elements of Q and K with one scale: tensor, head, block, warp, thread, token"),
    ] = "block"
    q_block: Annotated[int, Option("queries in a block", minimum=1)] = 128
    k_block: Annotated[int, Option("keys in a block", minimum=1)] = 64
    smooth_k: Annotated[bool, Option("take the mean over the keys off K")] = True
    smooth_q: Annotated[bool, Option("take the mean of each block of queries off Q")] = False
    smooth_v: Annotated[
        bool | None,
        Option("take the mean over the keys off V; none: with int8 P, where rows sum to one"),
    ] = None
    rotate: Annotated[bool, Option("multiply Q and K by a Hadamard matrix first")] = False
    rounding: Annotated[
        Literal["even", "away"], Option("where halves go: to even, or away from zero")
    ] = "even"
    v_granularity: Annotated[
        Literal["tensor", "head", "channel", "token"], Option("elements of V with one scale")
    ] = "channel"
    q_scale: Annotated[tuple[float, ...], Option("fixed scales of Q, one or one per head")] = ()
    k_scale: Annotated[tuple[float, ...], Option("fixed scales of K, one or one per key head")] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.q_scale) != bool(self.k_scale):
            raise ValueError(f"{self.name}: give q_scale and k_scale, or neither")
        if any(s <= 0 for s in (*self.q_scale, *self.k_scale)):
            raise ValueError(f"{self.name}: a scale is positive")

    def _smooths_values(self, staged: StagedAttention) -> bool:
        """Small probabilities that round to zero then count as the mean of V, not as nothing."""
        if self.smooth_v is not None:
            return self.smooth_v
        return self.pv in (True, "int8") and rows_sum_to_one(staged)

    def scheme(self, staged: StagedAttention, site: Site) -> Scheme | str:
        """What the options say for ``site``, or a sentence on what does not fit."""
        code = Integer(self.bits, self.rounding)
        wrong = _static_problem(self.q_scale, site.hq) or _static_problem(self.k_scale, site.hkv)
        if wrong:
            return wrong
        pv = ("int8" if self.pv else None) if isinstance(self.pv, bool) else self.pv
        v = None if pv is None else Integer(8, self.rounding) if pv == "int8" else Float8()
        return Scheme(
            q=self._coding(code, self.q_block, self.q_scale),
            k=self._coding(code, self.k_block, self.k_scale),
            v=None if v is None else Coding(v, Granularity(self.v_granularity)),
            p=v,
            smooth_q=self.smooth_q,
            smooth_k=self.smooth_k,
            smooth_v=v is not None and self._smooths_values(staged),
            rotate=self.rotate,
            smooth_block=self.q_block,
        )

    def _coding(self, code: Integer, block: int, static: tuple[float, ...]) -> Coding:
        if static:
            kind: Kind = "tensor" if len(static) == 1 else "head"
            return Coding(code, Granularity(kind), static)
        return Coding(code, Granularity(self.granularity, block if self._blocked else 0))

    @property
    def _blocked(self) -> bool:
        return self.granularity == "block"

    def rewrite(
        self, staged: StagedAttention, site: Site, heads: tuple[int, ...] | None
    ) -> StagedAttention | Refusal:
        """Codes and scales as the options say."""
        scheme = self.scheme(staged, site)
        if isinstance(scheme, str):
            return self.refuse(site, "quantise-scales", f"{self.name}: {scheme}")
        return self.schemed(staged, site, heads, scheme)


def _static_problem(scales: tuple[float, ...], heads: int) -> str | None:
    if len(scales) in (0, 1, heads):
        return None
    return f"{len(scales)} fixed scales were given for {heads} heads; give one, or one per head"


@dataclass(frozen=True)
class Int8(IntegerProducts):
    """Multiply int8 codes of Q and K (SageAttention); with pv also of P and V."""

    name: ClassVar[str] = "int8"
    source: ClassVar[str] = (
        "Zhang et al. 2025 (SageAttention), sections 3-4; pv='fp8': SageAttention2, section 3.4"
    )


@dataclass(frozen=True)
class Int4(IntegerProducts):
    """Multiply int4 codes of Q and K (SageAttention2); visible loss on some models: opt in."""

    name: ClassVar[str] = "int4"
    bits: ClassVar[int] = 4
    source: ClassVar[str] = "Zhang et al. 2025b (SageAttention2), sections 3.1-3.3"

    granularity: Annotated[
        Grain,
        Option("elements of Q and K with one scale: tensor, head, block, warp, thread, token"),
    ] = "thread"
    smooth_q: Annotated[bool, Option("take the mean of each block of queries off Q")] = True


__all__ = ["GRANULARITIES", "Int4", "Int8", "IntegerProducts"]
