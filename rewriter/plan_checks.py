"""Does a policy, or a plan that was read, name only what the model has?"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from attn_rewrite.errors import PolicyError
from attn_rewrite.passes.transform import spans_text
from attn_rewrite.policy import Policy, glob_matches

if TYPE_CHECKING:
    from attn_rewrite.plan import Plan
    from attn_rewrite.site import Findings


def check_policy(findings: Findings, policy: Policy) -> None:
    """Raise `PolicyError` for a layer glob or a head that no Site has."""
    _check_globs(findings, policy)
    _check_heads(findings, policy)


def _check_globs(findings: Findings, policy: Policy) -> None:
    """A layer glob that names nothing is a mistake, not a rule without effect."""
    for index, rule in enumerate(policy.rules):
        for glob in rule.where.layer:
            if any(glob_matches(glob, site) for site in findings.sites):
                continue
            names = list(dict.fromkeys(n for s in findings.sites for n in (s.name, s.module)))
            near = difflib.get_close_matches(glob, names, n=5, cutoff=0.3) or names[:5]
            hint = f"nearest: {', '.join(near)}" if near else "the model has no attention Site"
            raise PolicyError(f"rule {index + 1}: layer {glob!r} matches no Site; {hint}")


def _check_heads(findings: Findings, policy: Policy) -> None:
    for index, rule in enumerate(policy.rules):
        sites = [s for s in findings.sites if rule.where.matches(s)]
        if rule.where.heads is None or not sites:
            continue
        most = max(s.hq for s in sites)
        wrong = tuple(h for h in rule.where.heads if h >= most)
        if wrong:
            raise PolicyError(
                f"rule {index + 1}: there is no head {spans_text(wrong)}; "
                f"the Sites it matches have heads 0-{most - 1}"
            )


def check_sites(plan: Plan, findings: Findings) -> None:
    """Raise `PolicyError` unless a plan that was read fits the Sites of this model."""
    known = {s.name: s for s in findings.sites}
    for index, step in enumerate(plan.steps):
        site = known.get(step.site)
        if site is None:
            near = difflib.get_close_matches(step.site, known, n=3, cutoff=0.3) or list(known)[:3]
            raise PolicyError(
                f"plan, steps[{index}]: the model has no Site {step.site!r}; "
                f"nearest: {', '.join(near) or 'none'}"
            )
        if step.heads is not None and max(step.heads) >= site.hq:
            raise PolicyError(
                f"plan, steps[{index}]: {step.site} has heads 0-{site.hq - 1}, "
                f"not {spans_text(step.heads)}"
            )
