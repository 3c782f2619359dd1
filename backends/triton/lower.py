"""Lower a cascade to a generated Triton kernel: `lower(cascade, ...) -> Kernel | Refusal`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from attn_rewrite.backends.torch.emit import cast, dtype_of
from attn_rewrite.backends.torch.lower import Kernel
from attn_rewrite.backends.triton.choose import choose_schedule
from attn_rewrite.backends.triton.emit import Source, emit
from attn_rewrite.backends.triton.prepare import DROPOUT, with_lse
from attn_rewrite.backends.triton.schedule import Device, to_text
from attn_rewrite.backends.triton.staged import emit_codes, refused, split
from attn_rewrite.backends.triton.staging import stages_of
from attn_rewrite.cascade.attention import POINT, as_softmax, softmax_cascade
from attn_rewrite.cascade.expr import Read
from attn_rewrite.cascade.ir import Cascade, TensorDecl
from attn_rewrite.cascade.lse import why_no_lse
from attn_rewrite.errors import LowerError
from attn_rewrite.graph import Builder, aten
from attn_rewrite.passes.transform import Exactness
from attn_rewrite.site import Refusal

_CODES = "; codes and scales are made before it"
# The extents a text is shown for where the graph does not fix them.
_SHOWN = {"d": 64, "e": 64, "f": 64}


@dataclass(frozen=True)
class TritonKernel(Kernel):
    """A cascade lowered to Triton; ``sources`` are its kernels, in order."""

    sources: tuple[Source, ...] = ()

    @property
    def source(self) -> str:
        """The generated text of every kernel."""
        return "\n".join(s.text for s in self.sources)


def lower(
    cascade: Cascade,
    *,
    dropout: float = 0.0,
    extents: Mapping[str, int | None] | None = None,
    device: Device | None = None,
    item_bytes: int = 2,
    lse: bool = False,
) -> TritonKernel | Refusal:
    """Lower ``cascade`` to one generated kernel (two where a statistic is folded over rows).

    ``extents`` gives fixed extents of ranks (None: dynamic); ``dropout`` the probability applied to
    the attention probabilities, by Philox; with ``lse`` the kernel gives the log-sum-exp of each
    row as well, as (output, log-sum-exp [b, h, q]).  Reassociated.  A `Refusal` says what the
    emitter cannot express; nothing is replaced by another kernel.
    """
    known = dict(extents or {})
    if dropout:
        randomised = with_dropout(cascade)
        if isinstance(randomised, Refusal):
            return randomised
        cascade = randomised
    held = split(cascade)
    without = why_no_lse(cascade) if lse else None
    if without is not None:
        return Refusal("logsumexp-used", f"the log-sum-exp is used, and {without}")
    core = cascade if held is None else held.core
    wrong = refused(cascade, device or Device())
    found = wrong or stages_of(with_lse(core))
    if isinstance(found, Refusal):
        return found
    if lse and with_lse(core) is core:
        reason = "the log-sum-exp is used, which is only given for operands that are no codes"
        return Refusal("logsumexp-used", reason)
    text = str(core)
    sources = []
    for stage in found:
        lanes = {r: known.get(r) or _SHOWN.get(r, 64) for r in stage.program.roles.lanes}
        schedule = choose_schedule(
            stage.program, lanes, item_bytes, device or Device(), known,
            random=DROPOUT if dropout else None,
        )  # fmt: skip
        try:
            sources.append(emit(stage.program, schedule, lanes))
        except LowerError as problem:
            return Refusal("not-lowered", str(problem))

    def run(build: Builder, inputs: Sequence[Any]) -> Any:
        seed = _seed(build, inputs[0]) if dropout else None
        op = torch.ops.attn_rewrite.triton_cascade.default
        operands = list(inputs)
        if held is not None:
            operands = emit_codes(build, held, cascade.inputs, inputs)
        result = build.call(op, operands, seed, text, "", dropout)
        out = build.call(_result, result, 0)
        kind = dtype_of(inputs[0])
        out = out if held is None or kind is None else cast(build, out, kind)
        return (out, build.call(_result, result, 1)) if lse else out

    # Registered here, so that a program can be built before anything is launched.
    import attn_rewrite.backends.triton.ops  # noqa: F401

    why = _why(sources[-1]) + (_CODES if held is not None else "")
    contract = {
        "dtypes": "float16, bfloat16, float32, float8",
        "head dims": "16 to 256 in registers; larger ones compile, and may spill",
        "architectures": "sm_80, sm_90, sm_100, gfx942",
        "query without keys": "0",
        "dropout": str(dropout),
        "schedule": to_text(sources[-1].schedule),
    }
    return TritonKernel("triton", cascade, Exactness.REASSOCIATED, why, contract, run,
                        tuple(sources))  # fmt: skip


def _result(results: Sequence[Any], place: int) -> Any:
    return results[place]


def _seed(build: Builder, like: Any) -> Any:
    value = (
        like.meta["val"] if hasattr(like, "meta") and "val" in getattr(like, "meta", {}) else like
    )
    return build.call(aten.randint.low, 0, 2**31 - 1, [1], dtype=torch.int64, device=value.device)


def _why(source: Source) -> str:
    skipping = {
        "none": "every tile runs",
        "bounds": "tiles outside the guard are left out by loop bounds",
        "lists": "tiles outside the guard are left out by lists",
    }[source.schedule.skipping]
    passes = len(source.program.passes())
    return (
        f"generated with {passes} {'pass' if passes == 1 else 'passes'} over the keys; {skipping}"
    )


def with_dropout(cascade: Cascade) -> Cascade | Refusal:
    """The cascade with a random factor on its probabilities, an input the kernel makes itself."""
    form = as_softmax(cascade)
    if form is None:
        return Refusal("dropout", "dropout has no place in a cascade that is not softmax attention")
    factor = Read(DROPOUT, POINT)
    weight = factor if form.weight is None else form.weight * factor
    reads = (*form.reads, TensorDecl(DROPOUT, ("b", "h", "q", "kv")))
    return softmax_cascade(replace(form, weight=weight, reads=reads), cascade.name)
