"""What is modelled: the attention (and the linear layers) of one encoder layer.

Sources: shapes of the four evaluated models from FuseMax (MICRO 2024), section VI-A, after FLAT.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attn_rewrite.site import Site


@dataclass(frozen=True)
class Workload:
    """Attention with ``heads`` query heads over Q[b, h, q_len, d_qk], K and V of kv_len rows.

    ``d_model`` and ``hidden`` size the linear layers around it (projections and feed-forward);
    None where only the attention is known.

    Raises:
        ValueError: an extent is not positive.
    """

    name: str
    batch: int
    heads: int
    q_len: int
    kv_len: int
    d_qk: int
    d_v: int
    d_model: int | None = None
    hidden: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch", "heads", "q_len", "kv_len", "d_qk", "d_v", "d_model", "hidden"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"workload {self.name}: {name} is {value}; give a positive number")

    @property
    def rows(self) -> int:
        """Independent attentions: batch times heads."""
        return self.batch * self.heads

    def gemms(self) -> tuple[tuple[int, int, int], ...] | None:
        """(m, k, n) of Q, K, V, output and both feed-forward layers; None if unknown."""
        if self.d_model is None or self.hidden is None:
            return None
        q, kv = self.batch * self.q_len, self.batch * self.kv_len
        d, wide, values = self.d_model, self.heads * self.d_qk, self.heads * self.d_v
        projections = ((q, d, wide), (kv, d, wide), (kv, d, values), (q, values, d))
        return (*projections, (q, d, self.hidden), (q, self.hidden, d))


def _published(name: str, d_model: int, heads: int, hidden: int) -> Workload:
    d = d_model // heads
    return Workload(name, 64, heads, 1024, 1024, d, d, d_model, hidden)


#: The evaluated models at batch 64; `at_length` sets the sequence length.
MODELS = {
    "bert": _published("bert", 768, 12, 3072),
    "trxl": _published("trxl", 1024, 16, 4096),
    "t5": _published("t5", 512, 8, 2048),
    "xlm": _published("xlm", 2048, 16, 8192),
}
#: The evaluated sequence lengths.
LENGTHS = tuple(2**n for n in (10, 12, 14, 16, 18, 20))


def at_length(workload: Workload, length: int, batch: int | None = None) -> Workload:
    """The same model on ``length`` queries and keys, and on another batch size if given."""
    return replace(workload, q_len=length, kv_len=length, batch=batch or workload.batch)


# Refusals of sites that compute more maps than one for each head, or products between them.
_MIXED = {"talking-heads": "mixes its heads", "probabilities-summed": "adds several maps"}


def why_not_modelled(site: Site) -> str | None:
    """What the attention of ``site`` does that the model has no cycles for; None if nothing."""
    if site.family != "softmax":
        return f"is {site.family} attention"
    return next((_MIXED[r.code] for r in site.refusals if r.code in _MIXED), None)


def site_workload(site: Site, *, batch: int, length: int | None = None) -> Workload:
    """The attention of ``site``; ``length`` replaces both sequence lengths.

    Key heads that several query heads share are modelled as read once per query head: the mapping
    of FuseMax shares nothing between heads.

    Raises:
        ValueError: the site is not plain softmax attention, or a length of it is dynamic and no
            ``length`` is given.
    """
    reason = why_not_modelled(site)
    if reason is not None:
        raise ValueError(f"site {site.name} {reason}; only plain softmax attention is modelled")
    sizes = [site.q_len, site.kv_len] if length is None else [length, length]
    if not all(isinstance(size, int) for size in sizes):
        raise ValueError(f"site {site.name} has dynamic lengths {sizes}; give a length")
    q_len, kv_len = (int(size) for size in sizes)
    return Workload(site.name, batch, site.hq, q_len, kv_len, site.d_qk, site.d_v)


def distinct(workloads: Iterable[Workload]) -> tuple[tuple[Workload, int], ...]:
    """Workloads of equal shape once, with how many there are; the first name stays."""
    seen: dict[Workload, tuple[Workload, int]] = {}
    for workload in workloads:
        key = replace(workload, name="")
        first, count = seen.get(key, (workload, 0))
        seen[key] = (first, count + 1)
    return tuple(seen.values())
