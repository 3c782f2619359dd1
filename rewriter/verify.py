"""Verification: each Site on the user's own activations, against a float64 oracle.

Two errors are never mixed.  The *implementation error* compares a kernel with the oracle of the
same rewritten cascade; beyond what rounding explains it is our bug (`VerifyError`).  The
*approximation error* compares the rewritten cascade with the original one; beyond the user's budget
the Site goes back to exact.  Before either, raising is checked: the original nodes and the original
cascade, both in float64, must agree.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from attn_rewrite.apply import Emits
from attn_rewrite.budget import Bound
from attn_rewrite.cascade.ir import Cascade
from attn_rewrite.chunked import LIMIT_BYTES, oracle
from attn_rewrite.conditioning import score_rounding
from attn_rewrite.errors import VerifyError
from attn_rewrite.graph import EagerBuilder, arrange, extents
from attn_rewrite.measuring import implementation_bound as implementation_bound
from attn_rewrite.measuring import measure as measure
from attn_rewrite.region import boundary, in_float64
from attn_rewrite.report import ErrorMeasure, LseErrors
from attn_rewrite.rounding import plain_attention
from attn_rewrite.site import Operand, Refusal, Site
from attn_rewrite.tables import Table
from attn_rewrite.tracing import buffers_kept
from attn_rewrite.walk import Walk, flat_inputs


@dataclass(frozen=True, eq=False)
class Candidate:
    """A Site, the cascade it was rewritten to, and the kernel that was made of that.

    Without a kernel only raising is checked.  ``exact`` is the kernel of the Site's own cascade;
    where given it is measured when the rewritten one goes over the budget.  ``tables`` are inputs
    of the rewritten cascade that the plan holds.  ``parts`` are the approximate parts of its
    pipeline by name, each with the cascade that stands after it; the last is ``cascade``.
    """

    site: Site
    cascade: Cascade
    kernel: Emits | None
    exact: Emits | None = None
    tables: Mapping[str, Table] = field(default_factory=dict)
    parts: tuple[tuple[str, Cascade], ...] = ()


@dataclass(frozen=True)
class SiteCheck:
    """What was measured on one Site, and what follows.

    ``verdict``: ``"accepted"``, ``"reverted"`` (over the budget, or not finite where the original
    is: use the exact kernel, or the original nodes), ``"kept"`` (raising is not sound, see
    ``refusals``) or ``"raised"`` (it is, and there is no kernel).  ``implementation`` is that of
    the kernel to use; it is None where none can be measured (``note`` says why).  ``parts`` has the
    error of each approximate part against what stood before it.  ``lse`` has the errors of the
    log-sum-exp, where the Site gives one and a kernel was measured.
    """

    site: str
    verdict: str
    raising: ErrorMeasure | None = None
    implementation: ErrorMeasure | None = None
    implementation_bound: float | None = None
    approximation: ErrorMeasure | None = None
    refusals: tuple[Refusal, ...] = ()
    parts: tuple[tuple[str, ErrorMeasure], ...] = ()
    note: str = ""
    seconds: float = field(default=0.0, compare=False)
    lse: LseErrors | None = None

    @property
    def over_bound(self) -> bool:
        """True when the implementation error is more than rounding explains, of the output or of
        the log-sum-exp."""
        if self.lse is not None and not self.lse.implementation.max_abs <= self.lse.bound:
            return True
        if self.implementation is None or self.implementation_bound is None:
            return False
        return not self.implementation.max_abs <= self.implementation_bound


def check_sites(
    host: fx.GraphModule,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    candidates: Iterable[Candidate],
    *,
    bound: Bound | None = None,
    limit: int = LIMIT_BYTES,
) -> tuple[SiteCheck, ...]:
    """Run ``host`` (the graph the Sites were found in, not yet rewritten) and check each Site.

    Values are freed after their last use, so memory is that of one run and one Site.  ``limit``
    bounds the bytes of float64 scores at a time.  Raises `VerifyError` naming every Site whose
    implementation error is over its bound, with the numbers.
    """
    by_output: dict[fx.Node, list[Candidate]] = {}
    for candidate in candidates:
        by_output.setdefault(candidate.site.results[-1], []).append(candidate)
    walk = _Observed(by_output, bound, limit)
    with torch.no_grad(), buffers_kept(host):
        Walk(host, walk).run(*flat_inputs(host, args, kwargs), enable_io_processing=False)
    missing = [c.site.name for c in walk.waiting()]
    if missing:
        raise VerifyError(f"the graph ran without computing {', '.join(missing)}: it was changed")
    require_bounds(walk.checks)
    return tuple(walk.checks)


def require_bounds(checks: Iterable[SiteCheck]) -> None:
    """Raise `VerifyError` if a kernel is further from its oracle than rounding explains."""
    wrong = [_over(c) for c in checks if c.over_bound]
    if wrong:
        raise VerifyError(
            "a kernel differs from the float64 value of its cascade by more than rounding "
            f"explains: {'; '.join(wrong)}; this is a bug in attn-rewrite"
        )


def _over(check: SiteCheck) -> str:
    found = check.implementation
    said = f"{check.site}: "
    if found is not None and check.implementation_bound is not None:
        said += f"max error {found.max_abs:.3g}, bound {check.implementation_bound:.3g}"
    if check.lse is not None:
        said += f"; of its log-sum-exp {check.lse.implementation.max_abs:.3g}, bound "
        said += f"{check.lse.bound:.3g}"
    return said


class _Observed:
    """Candidates by output node, and the checks made so far; shared by nested graphs."""

    def __init__(
        self, candidates: dict[fx.Node, list[Candidate]], bound: Bound | None, limit: int
    ) -> None:
        self.candidates, self.bound, self.limit = candidates, bound, limit
        self.sites = {node: [c.site for c in cs] for node, cs in candidates.items()}
        self.graphs = {node.graph for node in candidates}
        self.checks: list[SiteCheck] = []
        self.done: set[fx.Node] = set()

    def waiting(self) -> list[Candidate]:
        """Candidates that were not reached."""
        return [c for n, cs in self.candidates.items() if n not in self.done for c in cs]

    def computed(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> None:
        """Check the Sites whose output is ``node``; a graph that runs twice is checked once."""
        if node in self.done:
            return
        self.done.add(node)
        for candidate in self.candidates[node]:
            needed = (*boundary(candidate.site), *candidate.site.results)
            values = {n: env[n] for n in needed}
            self.checks.append(check_site(candidate, values, bound=self.bound, limit=self.limit))


def check_site(
    candidate: Candidate,
    values: Mapping[fx.Node, Any],
    *,
    bound: Bound | None = None,
    limit: int = LIMIT_BYTES,
) -> SiteCheck:
    """Check one Site on the values of `region.boundary` and of its results."""
    start = time.perf_counter()
    check = _check(candidate, values, bound, limit)
    if candidate.site.lse is not None:
        check = _with_lse(check, candidate, values, limit)
    return replace(check, seconds=time.perf_counter() - start)


def _check(
    candidate: Candidate, values: Mapping[fx.Node, Any], bound: Bound | None, limit: int
) -> SiteCheck:
    site = candidate.site
    inputs = canonical_inputs(site, values)
    original = canonical_output(site, values, values[site.output.node])
    reference = oracle(site.cascade, inputs, limit)
    raising, refusal = check_raising(site, values, reference)
    if refusal is not None:
        return SiteCheck(site.name, "kept", raising, refusals=(refusal,))
    if candidate.kernel is None:
        return SiteCheck(site.name, "raised", raising)
    # Rows where the original gives NaN say nothing about a rewrite.
    reference = reference.masked_fill(original.isnan().any(dim=-1, keepdim=True), torch.nan)
    check = SiteCheck(site.name, "accepted", raising)
    kernel, target = candidate.kernel, reference
    if candidate.cascade != site.cascade:
        tables = {n: torch.from_numpy(t) for n, t in candidate.tables.items()}
        own, inputs = inputs, {**inputs, **tables}
        wanted = oracle(candidate.cascade, inputs, limit)
        wanted = wanted.masked_fill(reference.isnan(), torch.nan)
        check = replace(
            check,
            approximation=measure(wanted, reference),
            parts=_parts(candidate, inputs, reference, wanted, limit),
        )
        if lost := int((reference.isfinite() & ~wanted.isfinite()).sum()):
            check = replace(check, note=_not_finite(lost, wanted.numel()))
        elif bound is None or bound.allows(check.approximation):  # type: ignore[arg-type]
            target = wanted
        if target is not wanted:
            check = replace(check, verdict="reverted")
            if candidate.exact is None:
                return check
            kernel, inputs = candidate.exact, own
    if site.dropout > 0:
        note = (
            f"dropout {site.dropout} is active: no two runs are equal, the kernel is not measured"
        )
        return replace(check, note="; ".join(filter(None, (check.note, note))))
    result = run_kernel(kernel, inputs, original.dtype)
    found = measure(result, target)
    allowed = implementation_bound(original, reference, target)
    if check.verdict == "accepted":
        allowed = rounding_bound(
            candidate.cascade, inputs, target, allowed, found.max_abs, limit=limit
        )
    return replace(check, implementation=found, implementation_bound=allowed)


def _with_lse(
    check: SiteCheck, candidate: Candidate, values: Mapping[fx.Node, Any], limit: int
) -> SiteCheck:
    """``check`` and what is measured of the log-sum-exp: raising, and the kernel that is used."""
    from attn_rewrite.lse_check import kept_lse, measured_lse

    if check.verdict == "kept":
        return check
    site = candidate.site
    inputs = canonical_inputs(site, values)
    refusal = kept_lse(site, values, inputs, limit)
    if refusal is not None:
        return SiteCheck(site.name, "kept", check.raising, refusals=(refusal,))
    accepted = check.verdict == "accepted"
    kernel = candidate.kernel if accepted else candidate.exact
    if check.verdict == "raised" or kernel is None:
        return check
    cascade = candidate.cascade if accepted else site.cascade
    if cascade != site.cascade:
        inputs = {**inputs, **{n: torch.from_numpy(t) for n, t in candidate.tables.items()}}
    return replace(check, lse=measured_lse(site, cascade, kernel, values, inputs, limit))


def _not_finite(lost: int, total: int) -> str:
    return (
        f"the rewrite gives {lost} of {total} values that are not finite where the original's are; "
        "no budget allows that: the Site goes back to exact"
    )


def _parts(
    candidate: Candidate,
    inputs: Mapping[str, Tensor],
    reference: Tensor,
    wanted: Tensor,
    limit: int,
) -> tuple[tuple[str, ErrorMeasure], ...]:
    """What each part adds: the output after it against the output before it."""
    found = []
    for name, cascade in candidate.parts:
        last = cascade == candidate.cascade
        held = {t.name: inputs[t.name] for t in cascade.inputs}
        after = wanted if last else oracle(cascade, held, limit)
        found.append((name, measure(after.masked_fill(reference.isnan(), torch.nan), reference)))
        reference = after.masked_fill(reference.isnan(), torch.nan)
    return tuple(found)


def rounding_bound(
    cascade: Cascade,
    inputs: Mapping[str, Tensor],
    target: Tensor,
    allowed: float,
    error: float,
    *,
    limit: int = LIMIT_BYTES,
) -> float:
    """What ``error`` may be: ``allowed``, or more where rounding explains more.

    ``target`` is the value of ``cascade``.  Asked in turn, as long as ``error`` is over the bound:
    twice the error of the same attention computed plainly in the dtype of its inputs, and twice
    what rounding its scores may change.  Only ``allowed`` for a cascade that is no softmax
    attention: there is no plain form to compare with.
    """
    if error > allowed:
        plain = plain_attention(cascade, inputs, limit)
        allowed = allowed if plain is None else max(allowed, 2 * measure(plain, target).max_abs)
    if error > allowed:
        moved = score_rounding(cascade, inputs, limit)
        allowed = allowed if moved is None else max(allowed, 2 * moved)
    return allowed


def check_raising(
    site: Site, values: Mapping[fx.Node, Any], reference: Tensor
) -> tuple[ErrorMeasure | None, Refusal | None]:
    """Compare the original nodes with the original cascade, both in float64.

    They may differ by 4 eps x max|reference|, with eps that of float32, or of the model's dtype
    where a bias was rounded to it before the Site saw it (the cascade may write that as an
    expression).
    """
    anchor = (str(site.anchor), site.source, site.name)
    try:
        wide = canonical_output(site, values, in_float64(site, values)[site.output.node])
    except RuntimeError as error:
        first = (str(error).strip().splitlines() or ["no message"])[0]
        reason = (
            f"the original computation does not run in float64, so it cannot be checked: {first}"
        )
        return None, Refusal("raise-unchecked", reason, *anchor)
    found = measure(reference, wide)
    operands = {o.node for o in site.inputs.values()}
    others = [values[n] for n in boundary(site) if n not in operands]
    coarse = [torch.finfo(v.dtype).eps for v in others if _is_rounded(v)]
    allowed = 4 * max([torch.finfo(torch.float32).eps, *coarse]) * found.max_reference
    if found.max_abs <= allowed:
        return found, None
    reason = (
        "the cascade this attention was raised to does not compute what its nodes do: in float64 "
        f"they differ by {found.max_abs:.3g}, allowed is {allowed:.3g}; the Site is kept"
    )
    return found, Refusal("raise-mismatch", reason, *anchor)


def _is_rounded(value: Any) -> bool:
    """A float tensor with more in it than the zeros, ones and huge values of a mask."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    size = value.abs()
    return bool(((size != 0) & (size != 1) & (size < 1e3)).any())


def canonical_inputs(site: Site, values: Mapping[fx.Node, Any]) -> dict[str, Tensor]:
    """The operands of a Site by cascade input name, in the cascade's layout."""
    build = EagerBuilder()
    held = {name: (o, values[o.node]) for name, o in site.inputs.items()}
    sizes = extents(build, held)
    return {n: arrange(build, o, v, site.groups(n), sizes) for n, (o, v) in held.items()}


def canonical_output(site: Site, values: Mapping[fx.Node, Any], output: Tensor) -> Tensor:
    """A value of the Site's output as AV[b, h, q, f]."""
    build = EagerBuilder()
    held: dict[str, tuple[Operand, Any]] = {n: (o, values[o.node]) for n, o in site.inputs.items()}
    result = arrange(build, site.output, output, site.groups("AV"), extents(build, held))
    assert isinstance(result, Tensor)
    return result


def run_kernel(kernel: Emits, inputs: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """AV of a kernel on canonical operands, in the dtype of the Site's output."""
    result = kernel.emit(EagerBuilder(), list(inputs.values()))
    output: Tensor = result[0] if isinstance(result, tuple) else result
    return output.to(dtype)


def worst_site(errors: Mapping[str, ErrorMeasure], bound: Bound) -> str | None:
    """The Site to send back to exact first when the whole model is over ``bound``; None if none."""
    if not errors:
        return None
    sign = -1 if bound.metric == "cosine" else 1
    return max(errors, key=lambda name: sign * float(getattr(errors[name], bound.metric)))
