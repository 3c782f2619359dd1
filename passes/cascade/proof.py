"""What a rewrite of reductions returns besides the cascade: proofs, refusals, the result."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from attn_rewrite.site import Refusal

if TYPE_CHECKING:
    from attn_rewrite.cascade.expr import Expr
    from attn_rewrite.cascade.ir import Cascade
    from attn_rewrite.passes.cascade.separability import Counterexample


@dataclass(frozen=True)
class FusionRefusal(Refusal):
    """Why a reduction was not fused: ``rule`` names the rule that failed.

    ``tensor`` is the Einsum it is about; ``counterexample`` the numbers that refute separability,
    where the claim is that there is none.
    """

    rule: str = ""
    tensor: str = ""
    counterexample: Counterexample | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values; the counterexample as the numbers and the two sides of the identity."""
        found = self.counterexample
        return {
            **super().to_json(),
            "rule": self.rule,
            "tensor": self.tensor,
            "counterexample": None if found is None else asdict(found),
        }


@dataclass(frozen=True)
class Proof:
    """One application of a rule to the reduction that made ``tensor``.

    The body of the reduction is ``G * H`` (``G + H`` where ``action`` is ``"add"``); ``H`` depends
    on the complete values ``upstream``.  Of a ``"scan"``, ``G`` is an item and ``H`` the fold of
    none.  ``correction`` re-bases an accumulated value from old to
    new (primed) states and is None where the factor is deferred to the end instead.
    """

    rule: str
    tensor: str
    rank: str
    upstream: tuple[str, ...]
    G: Expr
    H: Expr
    action: str = "mul"
    correction: Expr | None = None
    side_conditions: tuple[str, ...] = ()
    cancellation_risk: bool = False

    @property
    def text(self) -> str:
        """The proof as a few lines."""
        body = {
            "mul": f"body = G * H with G = {self.G}, H = {self.H}",
            "add": f"body = G + H with G = {self.G}, H = {self.H}",
            "scan": f"item = {self.G}, the fold of no item = {self.H}",
        }
        lines = [f"{self.tensor} over {self.rank}: {self.rule}", f"  {body[self.action]}"]
        if self.upstream:
            lines.append(f"  depends on {', '.join(self.upstream)}")
        if self.correction is not None:
            lines.append(f"  correction of the past: {self.correction}")
        lines += [f"  {condition}" for condition in self.side_conditions]
        if self.cancellation_risk:
            lines.append("  cancellation risk: large terms may cancel at the end")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Fusion:
    """A rewritten cascade with fewer passes over ``rank``, and why it computes the same.

    ``refusals`` say what kept further reductions apart (the cascade then still has more than one
    pass).  ``partial``, ``merge`` and ``finish`` are the split-K form: ``partial`` computes the
    states of one part of the rank, ``merge`` joins the states of two parts (suffixes ``_a`` and
    ``_b``), ``finish`` makes the outputs of joined states; None where no state is carried.
    """

    cascade: Cascade
    proofs: tuple[Proof, ...]
    rank: str
    passes_before: int
    passes: int
    refusals: tuple[FusionRefusal, ...] = ()
    partial: Cascade | None = field(default=None, repr=False)
    merge: Cascade | None = field(default=None, repr=False)
    finish: Cascade | None = field(default=None, repr=False)

    @property
    def text(self) -> str:
        """Derivation, proofs and the result, readable."""
        head = f"{self.cascade.name}: {self.passes_before} -> {self.passes} passes over {self.rank}"
        parts = [head, *(p.text for p in self.proofs), *(str(r) for r in self.refusals)]
        return "\n".join([*parts, str(self.cascade)])

    def __str__(self) -> str:
        return self.text
