"""gated: a learned number for each head and token that multiplies what the head gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from attn_rewrite.passes.transform import Exactness, Option, Transform

if TYPE_CHECKING:
    from attn_rewrite.cascade.ir import Cascade
    from attn_rewrite.site import Refusal, Site


@dataclass(frozen=True)
class Gated(Transform):
    """sigmoid(G(x)) * attention, with x what the queries are projected from: heads may do nothing.

    A change of the model that wants fine-tuning.  Its new parameters belong to the rewritten model
    (``attn_rewrite_gate_*``): they are trained, saved and loaded with it.  Weights begin at 0 and
    biases at logit(pi); the gate is divided by pi where ``identity``, so that a trained model
    begins as it was.  It stands behind the attention, so the cascade stays as it is and every
    kernel and scheme goes with it.  Differentiable.
    """

    name: ClassVar[str] = "gated"
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    source: ClassVar[str] = "Bondarenko et al. 2023 (Quantizable Transformers), section 4.2"

    kind: Annotated[
        Literal["head", "mlp", "all"],
        Option(
            "what a head's gate sees: its own part of x, linearly or through a hidden layer of a "
            "quarter of its width, or all of x"
        ),
    ] = "head"
    pi: Annotated[float, Option("how open a gate is at first", minimum=0.001, maximum=0.999)] = 0.25
    identity: Annotated[bool, Option("divide by pi, for a model that is trained already")] = True

    def apply(self, cascade: Cascade, site: Site) -> Cascade | Refusal:
        """The same object: a gate multiplies the output of the Site."""
        return cascade

    def apply_to_heads(
        self, cascade: Cascade, site: Site, heads: tuple[int, ...]
    ) -> Cascade | Refusal:
        """The same object; the gate of every other head is 1."""
        return cascade

    def admits(self, site: Site, named_kinds: tuple[str, ...] = ()) -> Refusal | None:
        """Refuse what has no softmax, or no activation that its queries are projected from."""
        if site.family != "softmax":
            reason = f"{self.name} is for softmax attention, but this one is {site.family}"
            return self.refuse(site, f"gated-{site.family}", reason)
        from attn_rewrite.passes.quantize.gate_input import gate_input  # needs torch

        found = gate_input(site)
        if isinstance(found, str):
            return self.refuse(site, "gated-input", f"{self.name}: {found}")
        if self.kind != "all" and found.channels % site.hq:
            reason = (
                f"{self.name}: {found.channels} channels are no {site.hq} equal parts, one a "
                'head; write gated(kind="all")'
            )
            return self.refuse(site, "gated-heads", reason)
        return None
