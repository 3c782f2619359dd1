"""calibrated: the cheapest of several schemes for each head, measured on the user's own inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from attn_rewrite.cascade.staged import StagedAttention
from attn_rewrite.passes.quantize.base import Quantisation
from attn_rewrite.passes.transform import Option

if TYPE_CHECKING:
    from attn_rewrite.site import Refusal, Site

# Cheapest first: what a GPU multiplies fastest, then what keeps more digits.
LADDER = ("int8(pv=true)", "int8(pv='fp8')", "int8", "int8(rotate=true)")


@dataclass(frozen=True)
class Calibrated(Quantisation):
    """For each head the first scheme of a list that stays within the budget on calibration inputs.

    One half of the inputs chooses, the other half has to confirm.  The plan that results names the
    chosen schemes; heads that none of them suits stay in floating point and are listed.
    """

    name: ClassVar[str] = "calibrated"
    source: ClassVar[str] = "Zhang et al. 2025 (SageAttention), section 4.5: adaptive quantisation"

    tiers: Annotated[tuple[str, ...], Option("schemes to try, cheapest first")] = LADDER

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tiers:
            raise ValueError("calibrated: tiers is empty; name at least one scheme")
        self.schemes()

    def schemes(self) -> tuple[Quantisation, ...]:
        """The tiers as transforms; `ValueError` for one that is no quantising scheme."""
        from attn_rewrite.policy_text import parse_pipeline

        found = []
        for text in self.tiers:
            steps = parse_pipeline(text)
            one = steps[0]
            if len(steps) > 1 or not isinstance(one, Quantisation) or isinstance(one, Calibrated):
                raise ValueError(f"calibrated: tier {text!r} is not one quantising scheme")
            found.append(one)
        return tuple(found)

    def rewrite(
        self, staged: StagedAttention, site: Site, heads: tuple[int, ...] | None
    ) -> StagedAttention | Refusal:
        """Refused: a plan names the schemes that were chosen, never this."""
        reason = f"{self.name} chooses by measuring: give calibration inputs"
        return self.refuse(site, "not-calibrated", reason)
