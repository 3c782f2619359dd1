"""Choose a kernel for a cascade: `lower(cascade, ...) -> Kernel | Refusal`.

=========  =====================================================================================
``sdpa``   ``scale * QK`` with a bias or mask PyTorch's fused kernels take
``tiled``  a guard that leaves out whole blocks: the operator ``attn_rewrite::tiled_attention``
``dense``  everything else, as plain ATen operators
``mapped`` probabilities that are rounded or clipped: ``attn_rewrite::mapped_attention``
=========  =====================================================================================
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import fx

from attn_rewrite.backends.torch.dense import emit_dense
from attn_rewrite.backends.torch.einsums import emit_cascade, why_not_unrolled
from attn_rewrite.backends.torch.emit import cast, dtype_of
from attn_rewrite.backends.torch.form import (
    is_causal,
    is_causal_with_offset,
)
from attn_rewrite.backends.torch.mapped import mapped_attention
from attn_rewrite.backends.torch.ops import tiled_attention
from attn_rewrite.backends.torch.reordered import emit_in_order
from attn_rewrite.backends.torch.schedule import block_tables, make_schedule
from attn_rewrite.backends.torch.sdpa import (
    Plan,
    is_square,
    plain_score,
    plan_masked_sdpa,
    plan_sdpa,
)
from attn_rewrite.backends.torch.staged import emit_mapped, emit_prepared, prepared, rounds
from attn_rewrite.cascade.attention import (
    SoftmaxAttention,
    as_softmax,
    softmax_cascade,
    usual_length,
)
from attn_rewrite.cascade.expr import TRUE, ranks_of, walk
from attn_rewrite.cascade.ir import Cascade
from attn_rewrite.cascade.lse import why_no_lse
from attn_rewrite.cascade.reordered import Reordered, as_reordered
from attn_rewrite.cascade.staged import StagedAttention, as_staged
from attn_rewrite.graph import Builder, GraphBuilder
from attn_rewrite.passes.transform import Exactness
from attn_rewrite.site import Refusal

Emit = Callable[[Builder, Sequence[Any]], Any]

# A guard must leave out this share of the blocks before tiles are worth their overhead.
WORTHWHILE = 0.1
# The length a guard is tried at where the graph does not fix one.
_TYPICAL_LENGTH = 4096
_ANY_TYPE = "float16, bfloat16, float32, float64"
_CONTRACT = {"dtypes": _ANY_TYPE, "head dims": "any", "query without keys": "0", "dropout": "0"}


@dataclass(frozen=True)
class Kernel:
    """A lowered cascade.

    ``name`` is ``sdpa | tiled | dense``; ``contract`` says what it takes (types, head dimensions,
    dropout) and what a query without keys gives; ``why`` is one sentence on the choice.
    """

    name: str
    cascade: Cascade
    exactness: Exactness
    why: str
    contract: Mapping[str, str] = field(hash=False)
    _emit: Emit = field(repr=False, compare=False)

    def emit(self, build: Builder, inputs: Sequence[Any]) -> Any:
        """The output from ``inputs`` = [q, k, v, *reads] in canonical layout, with its log-sum-exp
        where the kernel was asked for that.

        For a cascade that is not a softmax attention the inputs are the cascade's, in order, and
        the value is its first output.
        """
        return self._emit(build, inputs)

    @property
    def source(self) -> str:
        """The kernel as text: its operators over inputs of a small example, and the cascade."""
        cascade = "".join(f"# {line}\n" for line in str(self.cascade).splitlines())
        return f"# {self.name}: {self.why}\n{cascade}{_as_code(self)}"


def lower(
    cascade: Cascade,
    *,
    dropout: float = 0.0,
    block: int = 128,
    extents: Mapping[str, int | None] | None = None,
    lse: bool = False,
) -> Kernel | Refusal:
    """Lower ``cascade`` to the kernel that suits it.

    ``extents`` gives fixed extents of ranks (None: dynamic); ``block`` the tile side of the tiled
    kernel; ``dropout`` the probability applied to the attention probabilities while training.
    With ``lse`` the kernel gives (output, log-sum-exp [b, h, q]).
    """
    if lse:
        return _lower_with_lse(cascade, dropout, block)
    found = as_reordered(cascade)
    if found is not None:
        inner = lower(found.inner, dropout=dropout, block=block, extents=extents)
        return inner if isinstance(inner, Refusal) else in_new_order(inner, found, cascade)
    form, known = as_softmax(cascade), extents or {}
    if form is None:
        staged = as_staged(cascade)
        if staged is None:
            return _lower_einsums(cascade, dropout)
        return _lower_staged(cascade, staged, dropout, block, known)
    stray = _stray_rank(form)
    if stray is not None:
        return Refusal(
            "rank-not-iterated", f"the score or mask of {cascade.name} depends on {stray}"
        )
    plan = plan_sdpa(form, known) or _tiled(cascade, form, known, block, dropout)
    plan = plan or plan_masked_sdpa(form) or Plan("dense", "no fused kernel takes its score", None)
    emit = plan.emit or (lambda build, inputs: emit_dense(build, form, inputs, dropout))
    if plan.name == "sdpa":
        emit = partial(emit, dropout)
    contract = {
        "dtypes": _ANY_TYPE,
        "head dims": "any",
        "query without keys": "0",
        "dropout": str(dropout),
    }
    return Kernel(plan.name, cascade, Exactness.REASSOCIATED, plan.why, contract, emit)


def in_new_order(kernel: Kernel, found: Reordered, cascade: Cascade) -> Kernel:
    """The kernel of an inner attention between the gathers that reorder its tokens."""
    why = f"{kernel.why}; over tokens in another order"
    emit = partial(emit_in_order, kernel.emit, found)
    return replace(kernel, cascade=cascade, why=why, _emit=emit)


def _stray_rank(form: SoftmaxAttention) -> str | None:
    """A rank that scores cannot depend on."""
    parts = [e for e in (form.score, form.guard, form.weight, form.sink) if e is not None]
    used = frozenset().union(*map(ranks_of, parts)) - {"b", "h", "q", "kv"}
    return min(used) if used else None


# Log-sum-exp


def _lower_with_lse(cascade: Cascade, dropout: float, block: int) -> Kernel | Refusal:
    """The operator that gives both: no fused operator of PyTorch's does under every mask."""
    reason = why_no_lse(cascade)
    if reason is None and dropout:
        reason = f"it has dropout {dropout}, which the operator that gives it does not have"
    if reason is not None:
        return Refusal("logsumexp-used", f"the log-sum-exp is used, and {reason}")
    found = as_reordered(cascade)
    if found is not None:
        inner = _lower_with_lse(found.inner, dropout, block)
        return inner if isinstance(inner, Refusal) else in_new_order(inner, found, cascade)
    staged = as_staged(cascade)
    assert staged is not None
    if staged.form.sink is not None:
        reason = "the log-sum-exp is used, and a logit that is no score of a key joins the sum"
        return Refusal("logsumexp-used", reason)
    held = prepared(staged)
    stray = _stray_rank(held.form)
    if stray is not None:
        reason = f"the score or mask of {cascade.name} depends on {stray}"
        return Refusal("rank-not-iterated", reason)
    text = str(softmax_cascade(held.form, cascade.name))
    plain = as_softmax(cascade) is not None

    def emit(build: Builder, inputs: Sequence[Any]) -> tuple[Any, Any]:
        operands, kind = list(inputs), dtype_of(inputs[0])
        if not plain:
            operands, kind = emit_prepared(build, held, cascade.inputs, inputs)
        assert kind is not None
        q, k, v, *reads = operands
        op = torch.ops.attn_rewrite.tiled_attention_lse.default
        both = build.call(op, q, k, v, reads, text, block)
        out, sums = (build.call(operator.getitem, both, place) for place in (0, 1))
        return cast(build, out, kind), sums

    why = f"its log-sum-exp is used: blocks of {block} that the guard keeps, with both results"
    return Kernel("tiled", cascade, Exactness.REASSOCIATED, why, _CONTRACT, emit)


# Tiles


def _tiled(
    cascade: Cascade,
    form: SoftmaxAttention,
    extents: Mapping[str, int | None],
    block: int,
    dropout: float,
) -> Plan | None:
    if dropout:
        return None
    if form.guard == TRUE:
        listed = form.weight is not None and bool(block_tables(form.weight))
        why = "its factor is a list of blocks, which no whole map is needed for"
        return Plan("tiled", why, partial(emit_tiled, str(cascade), block)) if listed else None
    if is_causal_with_offset(form.guard) and plain_score(form) is not None:
        return None  # queries at the end of a cache: mostly one, and SDPA is made for it
    if block_tables(form.guard):
        # Block lists are made to leave blocks out.
        why = f"the guard is a list of blocks, which is read in every call, in blocks of {block}"
        return Plan("tiled", why, partial(emit_tiled, str(cascade), block))
    share, length = _skipped(form, extents, block)
    if share < WORTHWHILE:
        return None
    why = _left_out(share, length, extents, block)
    return Plan("tiled", why, partial(emit_tiled, str(cascade), block))


def _left_out(share: float, length: int, extents: Mapping[str, int | None], block: int) -> str:
    said = f"the guard leaves out {share:.0%} of the blocks of {block}"
    return said if extents.get("kv") is not None else f"{said} where there are {length} keys"


def emit_tiled(text: str, block: int, build: Builder, inputs: Sequence[Any]) -> Any:
    """Call the operator that computes the softmax attention ``text`` in blocks of ``block``."""
    q, k, v, *reads = inputs
    op = torch.ops.attn_rewrite.tiled_attention.default
    return build.call(op, q, k, v, reads, text, block)


def _skipped(
    form: SoftmaxAttention, extents: Mapping[str, int | None], block: int
) -> tuple[float, int]:
    """Share of blocks the guard leaves out, and the keys that it is of: typical ones if dynamic."""
    known = extents.get("kv") or usual_length(form.guard)
    kv_len = known or max(_TYPICAL_LENGTH, extents.get("q") or 0)
    q_len = extents.get("q") or kv_len
    heads = extents.get("h") or form.group
    schedule = make_schedule(
        form.guard, q_len=q_len, kv_len=kv_len, block=block, heads=heads, group=form.group
    )
    return 1.0 - schedule.counts().density, kv_len


# Operands with stages, mapped probabilities


def _lower_staged(
    cascade: Cascade,
    staged: StagedAttention,
    dropout: float,
    block: int,
    extents: Mapping[str, int | None],
) -> Kernel | Refusal:
    """Stages as plain operators before the kernel of the rest; or the operator that maps P."""
    if dropout:
        reason = f"{cascade.name} has dropout {dropout}, which no kernel of rounded operands has"
        return Refusal("not-lowered", reason)
    if staged.probability is not None and any(map(rounds, walk(staged.probability))):
        why = (
            "its probabilities are rounded before they multiply V; exact, not fast, on this backend"
        )
        return _lower_mapped(cascade, block, why)
    if staged.probability is not None:
        # Float64 tiles pay for what a mask leaves out beyond the half that a causal one does.
        guard = staged.form.guard
        causal = is_causal(guard, square=is_square(extents)) or is_causal_with_offset(guard)
        share, length = (0.0, 0) if causal else _skipped(staged.form, extents, block)
        if share >= WORTHWHILE:
            why = f"its probabilities are mapped, and {_left_out(share, length, extents, block)}"
            return _lower_mapped(cascade, block, why)
        why = "its probabilities are mapped before they multiply V"
        plan = partial(emit_mapped, cascade.inputs, staged)
        return Kernel("dense", cascade, Exactness.REASSOCIATED, why, _CONTRACT, plan)
    held = prepared(staged)
    inner = lower(softmax_cascade(held.form, cascade.name), block=block, extents=extents)
    if isinstance(inner, Refusal):
        return inner

    def emit(build: Builder, inputs: Sequence[Any]) -> Any:
        operands, kind = emit_prepared(build, held, cascade.inputs, inputs)
        return cast(build, inner.emit(build, operands), kind)

    why = f"{inner.why}; codes times their scales, as integer products gain no time on this backend"
    return replace(inner, cascade=cascade, why=why, _emit=emit)


def _lower_mapped(cascade: Cascade, block: int, why: str) -> Kernel:
    text = str(cascade)

    def emit(build: Builder, inputs: Sequence[Any]) -> Any:
        q, k, v, *reads = inputs
        op = torch.ops.attn_rewrite.mapped_attention.default
        return build.call(op, q, k, v, reads, text, block)

    return Kernel("mapped", cascade, Exactness.REASSOCIATED, why, _CONTRACT, emit)


# Cascades that are not softmax attention


def _lower_einsums(cascade: Cascade, dropout: float) -> Kernel | Refusal:
    reason = why_not_unrolled(cascade)
    if reason is None and dropout:
        reason = "dropout has no place in a cascade that is not a softmax attention"
    if reason is not None:
        return Refusal("not-lowered", reason)

    def emit(build: Builder, inputs: Sequence[Any]) -> Any:
        named = dict(zip((t.name for t in cascade.inputs), inputs, strict=True))
        return emit_cascade(build, cascade, named)[cascade.outputs[0]]

    why = "it is not a softmax attention, so its Einsums run one by one"
    return Kernel("dense", cascade, Exactness.REASSOCIATED, why, _CONTRACT, emit)


# Text

_EXAMPLE = {"b": 1, "q": 256, "p": 256, "kv": 256, "m": 256, "d": 64, "e": 64, "f": 64}
_TYPES = {"bool": torch.bool, "i64": torch.int64, "i32": torch.int32, "i8": torch.int8}


def _as_code(kernel: Kernel) -> str:
    """Python code of the operators, traced over fake inputs."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    form = as_softmax(kernel.cascade)
    group = 1 if form is None else form.group
    sizes = {"h": 2 * group, "hkv": 2} | _EXAMPLE
    sizes |= {r.name: r.size for r in kernel.cascade.ranks if r.size is not None}
    graph = fx.Graph()
    inputs = []
    with FakeTensorMode():
        for decl in kernel.cascade.inputs:
            node = graph.placeholder(decl.name)
            shape = [sizes.get(r, 1) for r in decl.ranks]
            node.meta["val"] = torch.empty(shape, dtype=_TYPES.get(decl.dtype, torch.float32))
            inputs.append(node)
        end = graph.output(None)
        end.args = (kernel.emit(GraphBuilder(graph).at(end), inputs),)
    return str(fx.GraphModule({}, graph).code).strip() + "\n"


__all__ = ["Kernel", "lower", "mapped_attention", "tiled_attention"]
