"""The log-sum-exp of a Site, checked as its output is: raising, then the kernel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from attn_rewrite.apply import Emits
from attn_rewrite.cascade.ir import Cascade
from attn_rewrite.chunked import oracle_lse
from attn_rewrite.conditioning import lse_rounding
from attn_rewrite.graph import EagerBuilder, arrange, extents
from attn_rewrite.measuring import implementation_bound, measure
from attn_rewrite.region import in_float64
from attn_rewrite.report import LseErrors
from attn_rewrite.rounding import plain_lse
from attn_rewrite.site import Refusal, Site


def canonical_lse(site: Site, values: Mapping[fx.Node, Any], lse: Tensor) -> Tensor:
    """A value of the Site's log-sum-exp as LSE[b, h, q]."""
    build = EagerBuilder()
    assert site.lse is not None
    held = {n: (o, values[o.node]) for n, o in site.inputs.items()}
    result: Tensor = arrange(build, site.lse, lse, site.groups("LSE"), extents(build, held))
    return result


def kept_lse(
    site: Site, values: Mapping[fx.Node, Any], inputs: Mapping[str, Tensor], limit: int
) -> Refusal | None:
    """Why the Site stays as it is: in float64 its nodes and its cascade differ in the log-sum-exp.

    They may by 4 eps x max|reference| in float32, as the outputs may.
    """
    assert site.lse is not None
    wide = canonical_lse(site, values, in_float64(site, values)[site.lse.node])
    found = measure(oracle_lse(site.cascade, inputs, limit), wide)
    allowed = 4 * torch.finfo(torch.float32).eps * found.max_reference
    if found.max_abs <= allowed:
        return None
    reason = (
        "the cascade this attention was raised to does not have the log-sum-exp that its nodes "
        f"compute: in float64 they differ by {found.max_abs:.3g}, allowed is {allowed:.3g}; the "
        "Site is kept"
    )
    return Refusal("raise-mismatch", reason, str(site.anchor), site.source, site.name)


def measured_lse(
    site: Site,
    cascade: Cascade,
    kernel: Emits,
    values: Mapping[fx.Node, Any],
    inputs: Mapping[str, Tensor],
    limit: int,
) -> LseErrors:
    """The errors of the log-sum-exp that ``kernel`` gives for ``cascade``.

    The bound is that of outputs: what the original computation, a plain evaluation of the same
    cascade or the rounding of scores explains.
    """
    assert site.lse is not None
    original = canonical_lse(site, values, values[site.lse.node])
    reference = oracle_lse(site.cascade, {n: inputs[n] for n in site.inputs}, limit)
    rewritten = cascade != site.cascade
    wanted = oracle_lse(cascade, inputs, limit) if rewritten else reference
    _, result = kernel.emit(EagerBuilder(), list(inputs.values()))
    found = measure(result.to(original.dtype), wanted)
    allowed = implementation_bound(original, reference, wanted)
    if found.max_abs > allowed:
        plain = measure(plain_lse(cascade, inputs, limit), wanted)
        allowed = max(allowed, 2 * plain.max_abs)
    if found.max_abs > allowed:
        allowed = max(allowed, 2 * lse_rounding(cascade, inputs, limit))
    return LseErrors(found, allowed, measure(wanted, reference) if rewritten else None)
