"""The forms that a site may take: our own in standard operators, and ONNX Runtime's operators.

An `Offer` computes the site exactly.  The portable target takes the first, our own; for ONNX
Runtime on a CPU `choice.choose` takes the cheapest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from attn_rewrite.backends.onnx.blocks import BlockPlan
from attn_rewrite.backends.onnx.cached import OPERATOR
from attn_rewrite.backends.onnx.choice import Ranges, branch, choose, lengths_of
from attn_rewrite.backends.onnx.contrib import MULTI_HEAD, emit_multi_head, price_of, why_not
from attn_rewrite.backends.onnx.cost import Form
from attn_rewrite.backends.onnx.dense import (
    SdpaOptions,
    causal_form,
    emit_sdpa,
    fits_tiles,
    fits_whole,
    sdpa_form,
)
from attn_rewrite.backends.onnx.graph import Recorder
from attn_rewrite.backends.onnx.grouped import emit_whole, price_of_whole, why_not_whole
from attn_rewrite.backends.onnx.lowering import SPARSE, SiteLowering
from attn_rewrite.backends.onnx.sparse import BLOCK, block_lists, emit_sparse
from attn_rewrite.backends.onnx.tile_plans import (
    HeadPlan,
    Plan,
    TilePlan,
    choose_plan,
    fixed_lengths,
    plan_tiles,
)
from attn_rewrite.backends.onnx.tiles import emit_attention
from attn_rewrite.cascade.attention import SoftmaxAttention
from attn_rewrite.cascade.simplify import is_causal_term

TILED, SDPA = "tiled_attention", "scaled_dot_product_attention"
NO_SPARSE = "SparseAttention computes the dense product on the CPU"
UNMEASURED = "not measured on CUDA"
Values = Sequence[ir.Value]


@dataclass(frozen=True, eq=False)
class Offer:
    """A form of a site: how it is lowered, what its price is counted by, how it is recorded."""

    lowering: SiteLowering
    price: Form
    emit: Callable[[Recorder], ir.Value]

    @property
    def name(self) -> str:
        """What the form is called."""
        return self.lowering.form


def tiled_offers(
    name: str, form: SoftmaxAttention, formal: Values, given: Values, rows: int
) -> tuple[list[Offer], list[str]]:
    """Forms of a tiled attention over ``formal`` (constants are looked up in ``given``), our own
    first, and why operators of ONNX Runtime's own are none."""
    plan = choose_plan(form, given, rows)
    said = tiled_lowering(name, form, plan, None not in fixed_lengths(given))
    own = Offer(said, plan, lambda r: emit_attention(r, formal, form, plan))
    against = why_not_whole(form, formal)
    if against is not None:
        return [own], [NO_SPARSE, against]
    return [own, _whole(name, TILED, form, formal)], [NO_SPARSE]


def tiled_lowering(name: str, form: SoftmaxAttention, plan: Plan, fixed: bool) -> SiteLowering:
    """What is said of ``form`` in the tiles of ``plan``; ``fixed``: its lengths are."""
    if isinstance(plan, BlockPlan):
        counts = (plan.executed, plan.total)
        return SiteLowering(name, TILED, "blocks", str(plan), plan.block, tiles=counts)
    kind, detail = "half" if plan.reach else "tiles", str(plan)
    if plan.dense:
        kind = "dense mask"
        why = "the mask leaves out no whole blocks at this length"
        why = why if fixed else f"no fixed band in {form.guard}"
        detail = f"every key of {_rows(plan)} queries a step: {why}"
    width = plan.width if isinstance(plan, TilePlan) else None
    covered = fixed or is_causal_term(form.guard) is not None
    return SiteLowering(name, TILED, kind, detail, _rows(plan), width, covered=covered)


def _rows(plan: TilePlan | HeadPlan) -> int:
    return plan.rows if isinstance(plan, TilePlan) else plan.parts[0][1].rows


def _whole(name: str, operator: str, form: SoftmaxAttention, formal: Values) -> Offer:
    """``GroupQueryAttention`` without a cache."""
    said = SiteLowering(name, operator, OPERATOR, "ONNX Runtime's operator over the whole sequence")
    return Offer(said, price_of_whole(form), lambda r: emit_whole(r, formal, form))


def sdpa_offers(
    name: str, inputs: Values, options: SdpaOptions, opset: int
) -> tuple[list[Offer], list[str]]:
    """Forms of torch's operator, our own first, and why ONNX Runtime's operators are none."""
    if not options.causal:
        return _plain_offers(name, inputs, options, opset)
    form = causal_form(inputs, options) if fits_whole(inputs) else None
    own = _dense(name, inputs, options, opset)
    if form is not None and fits_tiles(inputs):
        plan = plan_tiles(form)
        said = SiteLowering(name, SDPA, "half", str(plan), plan.rows, covered=True)
        own = Offer(said, plan, lambda r: emit_attention(r, inputs, form, plan))
    against = f"{MULTI_HEAD} computes the upper half"
    if form is None:
        return [own], [f"{OPERATOR} takes batch, heads, length and width", against]
    reason = why_not_whole(form, inputs)
    if reason is not None:
        return [own], [reason, against]
    return [own, _whole(name, SDPA, form, inputs)], [against]


def _plain_offers(
    name: str, inputs: Values, options: SdpaOptions, opset: int
) -> tuple[list[Offer], list[str]]:
    own = _dense(name, inputs, options, opset)
    against = why_not(inputs)
    if against is not None:
        return [own], [against]
    masked = len(inputs) > 3
    detail = f"ONNX Runtime's operator, {'a mask' if masked else 'no mask'}"
    said = SiteLowering(name, SDPA, MULTI_HEAD, detail)
    multi = Offer(said, price_of(MULTI_HEAD, masked), lambda r: emit_multi_head(r, inputs, options))
    return [own, multi], []


def _dense(name: str, inputs: Values, options: SdpaOptions, opset: int) -> Offer:
    kind, detail = sdpa_form(inputs, options, opset)
    price = price_of("dense", options.causal or len(inputs) > 3)
    said = SiteLowering(name, SDPA, kind, detail)
    return Offer(said, price, lambda r: emit_sdpa(r, inputs, options))


def offer_for_cuda(
    own: Offer, form: SoftmaxAttention | None, formal: Values, given: Values
) -> Offer:
    """``SparseAttention`` where it is exactly ``form``, else our ``own``: no price decides there.

    ``form`` None: the site is no tiled attention.
    """
    if form is None:
        return replace(own, lowering=replace(own.lowering, choice=f"our own form: {UNMEASURED}"))
    lists = block_lists(form, given, shared=given[1] is given[2])
    if isinstance(lists, str):
        choice = f"{lists}; our own form: {UNMEASURED}"
        return replace(own, lowering=replace(own.lowering, choice=choice))
    choice = (
        "it reads only the blocks of its lists, and shares memory between past and present "
        f"caches if the runtime keeps the kernel's in-place pair; {UNMEASURED}"
    )
    said = SiteLowering(
        own.lowering.name, TILED, SPARSE, str(lists), BLOCK, tiles=(lists.kept, lists.total),
        choice=choice, covered=True,
    )  # fmt: skip
    return Offer(said, own.price, lambda r: emit_sparse(r, formal, form, lists))


def record(
    r: Recorder, offers: Sequence[Offer], against: Sequence[str], inputs: Values, ranges: Ranges
) -> tuple[ir.Value, SiteLowering]:
    """Record the cheapest of ``offers``, or two of them under an ``If``; what was done and why.

    ``against`` says why forms that are no offers are none; ``ranges`` the lengths an axis may have.
    """
    forms, lengths = {o.name: o for o in offers}, lengths_of(inputs, ranges)
    own = offers[0]
    if len(offers) == 1 or lengths is None:
        return own.emit(r), replace(own.lowering, choice="; ".join(against))
    found = choose({n: o.price for n, o in forms.items()}, lengths)
    long, choice = forms[found.name], "; ".join((found.why, *against))
    if found.short is None:
        return long.emit(r), replace(long.lowering, choice=choice)
    short = forms[found.short]
    value = branch(r, inputs[0], found.switch, short.emit, long.emit)
    detail = f"{long.lowering.detail}; up to {found.switch} tokens {short.lowering.detail}"
    lowering = replace(
        long.lowering,
        detail=detail,
        choice=choice,
        short=short.name,
        switch=found.switch,
        axis=lengths.axis,
    )
    return value, lowering
