"""Softmax attention whose operands are computed first, and whose probabilities may be mapped.

A `StagedAttention` generalises `SoftmaxAttention`: *stages* are Einsums over queries or keys alone
(means, scales, integer codes) that run before the product of queries and keys; ``q``, ``k`` and
``v`` name the tensors that enter the two products; ``probability`` maps what multiplies V.  Scales
of codes are reads in the score, so a staged cascade needs no new kind of Einsum::

    stages        KS[b, h, kv // 64] = max(abs(K[b, h, kv, d]), eps) / 127 :: max ...
                  KI[b, h, kv, d] = cast_i8(round(K / KS[b, h, kv // 64]))
    product       QK[b, h, q, kv] = QI[b, h, q, d] * KI[b, h, kv, d]
    score         S = QK * QS[b, h, q // 128] * KS[b, h, kv // 64] * scale
    softmax       GM, SN, SD as always
    probability   PI = cast_i8(round(SN * 127))        (or of A = SN / SD, then in two passes)
    output        PV = PI * VI;  AV = PV / SD * VS[b, h, f]
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from attn_rewrite.cascade.attention import (
    POINT,
    SoftmaxAttention,
    as_softmax,
    softmax_cascade,
)
from attn_rewrite.cascade.expr import (
    KV,
    B,
    Const,
    D,
    Expr,
    F,
    H,
    Q,
    Rank,
    Read,
    call,
    ranks_of,
    tensors_of,
)
from attn_rewrite.cascade.ir import Cascade, Einsum, RankDecl, TensorDecl

ROW = (B, H, Q)
SN, A, PI = Read("SN", POINT), Read("A", POINT), Read("PI", POINT)
SD = Read("SD", ROW)
PV = Read("PV", (*ROW, F))


@dataclass(frozen=True)
class StagedAttention:
    """The parts of a staged attention.

    ``form`` has the score, guard, weight, sink, group and further inputs; its score reads stage
    tensors freely.  ``stages`` are the Einsums that come first, ``tensors`` declare what they
    write and ``ranks`` the ranks that only they use.  ``probability`` is an expression over `SN`
    (exponentials below the row maximum) or `A` (normalised); None is plain `A`.  ``peak`` is a
    statistic of `A` that the probability reads.  ``output`` is AV as an expression over `PV`, `SD`
    and reads; it belongs to a mapped probability.
    """

    form: SoftmaxAttention
    stages: tuple[Einsum, ...] = ()
    q: str = "Q"
    k: str = "K"
    v: str = "V"
    probability: Expr | None = None
    peak: Einsum | None = None
    output: Expr | None = None
    tensors: tuple[TensorDecl, ...] = ()
    ranks: tuple[RankDecl, ...] = ()

    @property
    def kv_head(self) -> Expr:
        """The key head of query head ``h``."""
        return H if self.form.group == 1 else call("floordiv", H, self.form.group)

    @property
    def head(self) -> Rank:
        """The rank that counts key heads in the stages."""
        return H if self.form.group == 1 else Rank("hkv")

    @property
    def normalised(self) -> bool:
        """Does the probability need complete rows (a second pass over the keys)?"""
        return self.probability is None or "A" in tensors_of(self.probability)

    def declaration(self, tensor: str) -> TensorDecl:
        """The declaration of a stage tensor, or of one of the three operands."""
        head = self.head.name
        inputs = (
            TensorDecl("Q", ("b", "h", "q", "d")),
            TensorDecl("K", ("b", head, "kv", "d")),
            TensorDecl("V", ("b", head, "kv", "f")),
        )
        return next(t for t in (*self.tensors, *inputs, *self.form.reads) if t.name == tensor)


def staged_cascade(staged: StagedAttention, name: str = "attention") -> Cascade:
    """The cascade of ``staged``; that of `softmax_cascade` where nothing is staged or mapped."""
    base = softmax_cascade(staged.form, name)
    guard = staged.form.guard
    q = Read(staged.q, (B, H, Q, D))
    k = Read(staged.k, (B, staged.kv_head, KV, D))
    v = Read(staged.v, (B, staged.kv_head, KV, F))
    scores = base.body[0]
    assert isinstance(scores, Einsum)
    product = replace(scores, expr=q * k)
    shares, last = base.body[-2:]
    assert isinstance(shares, Einsum)
    assert isinstance(last, Einsum)
    weight = staged.form.weight
    tail: tuple[Einsum, ...]
    if staged.probability is None:
        tail = (shares, replace(last, expr=_weighted(A, weight) * v))
    else:
        assert staged.output is not None
        peak = () if staged.peak is None else (staged.peak,)
        tail = (
            *((shares, *peak) if staged.normalised else ()),
            Einsum(PI, staged.probability, (), guard),
            Einsum(PV, _weighted(PI, weight) * v, (("kv", "add"),), guard),
            Einsum(last.out, staged.output),
        )
    ranks = base.ranks + staged.ranks
    # Ranks that only stages have, as those of the blocks that share a scale.
    known = {r.name for r in ranks} | {part for r in ranks for part in r.parts}
    own = dict.fromkeys(r for t in staged.tensors for r in t.ranks if r not in known)
    return replace(
        base,
        ranks=(*ranks, *map(RankDecl, own)),
        body=(*staged.stages, product, *base.body[1:-2], *tail),
        tensors=base.tensors + staged.tensors,
    )


def _weighted(probability: Expr, weight: Expr | None) -> Expr:
    return probability if weight is None else probability * weight


def as_staged(cascade: Cascade) -> StagedAttention | None:
    """The parts of ``cascade`` if it is exactly what `staged_cascade` writes, else None."""
    plain = as_softmax(cascade)
    if plain is not None:
        return StagedAttention(plain)
    keys, score, last = (cascade.producer(t) for t in ("QK", "S", "AV"))
    values = cascade.producer("PV") or last
    if keys is None or score is None or last is None or values is None:
        return None
    operands = (*keys.reads(), *(r for r in values.reads() if KV in r.index and F in r.index))
    if len(operands) != 3 or not all(isinstance(s, Einsum) for s in cascade.body):
        return None
    q, k, v = (r.tensor for r in operands)
    group = _group(operands[1])
    mapped = cascade.producer("PI")
    weighted = values.expr.children[0]
    form = SoftmaxAttention(
        score=score.expr,
        guard=score.guard,
        weight=None if isinstance(weighted, Read) else weighted.children[1],
        sink=_sink(cascade),
        group=group,
        reads=cascade.inputs[3:],
    )
    base = softmax_cascade(form, cascade.name)
    staged = StagedAttention(
        form,
        tuple(cascade.einsums())[: cascade.body.index(keys)],
        q, k, v,
        None if mapped is None else mapped.expr,
        _peak(cascade),
        None if mapped is None else last.expr,
        cascade.tensors[len(base.tensors) :],
        cascade.ranks[len(base.ranks) :],
    )  # fmt: skip
    return staged if staged_cascade(staged, cascade.name) == cascade else None


def _group(keys: Read) -> int:
    head = keys.index[1]
    if isinstance(head, Rank) or not head.children:
        return 1
    divisor = head.children[-1]
    return int(divisor.value) if isinstance(divisor, Const) else 1


def _sink(cascade: Cascade) -> Expr | None:
    top = cascade.producer("GM")
    if top is None or cascade.producer("LM") is None or len(top.expr.children) != 2:
        return None
    return top.expr.children[1]


def _peak(cascade: Cascade) -> Einsum | None:
    """The Einsum between the normalised probabilities and their map."""
    names = [e.out.tensor for e in cascade.einsums()]
    if not {"A", "PI"} <= set(names) or names.index("PI") - names.index("A") != 2:
        return None
    return tuple(cascade.einsums())[names.index("A") + 1]


def attention_form(cascade: Cascade) -> SoftmaxAttention | None:
    """Score, guard and heads of a softmax attention, staged, reordered or not; None for another."""
    from attn_rewrite.cascade.reordered import in_order

    staged = as_staged(in_order(cascade))
    return None if staged is None else staged.form


def shares_scales(cascade: Cascade) -> bool:
    """Does a stage, or a statistic of the probabilities, fold heads into one number?"""
    from attn_rewrite.cascade.reordered import in_order

    staged = as_staged(in_order(cascade))
    if staged is None:
        return False
    folds = (*staged.stages, *(() if staged.peak is None else (staged.peak,)))
    return any(rank in ("h", "hkv") for e in folds for rank, _ in e.reduce)


def stages_of(staged: StagedAttention, name: str = "stages") -> Cascade:
    """The stages alone: their outputs are the tensors that the rest of the attention reads."""
    wanted = read_stages(staged)
    base = softmax_cascade(staged.form, name)
    used = {r.tensor for e in staged.stages for r in e.reads()}
    inputs = tuple(t for t in base.inputs if t.name in used)
    ranks = {r for e in staged.stages for r in _ranks(e)} | {r for t in inputs for r in t.ranks}
    ranks |= {part for r in staged.ranks for part in r.parts}
    known = (*base.ranks, *staged.ranks)
    return Cascade(
        name, tuple(r for r in known if r.name in ranks), inputs, staged.stages, wanted,
        staged.tensors,
    )  # fmt: skip


def core_of(staged: StagedAttention, name: str = "attention") -> Cascade:
    """The attention with the results of the stages as inputs."""
    whole = staged_cascade(staged, name)
    stages = read_stages(staged)
    own = tuple(
        t
        for t in whole.inputs[:3]
        if t.name in (staged.q, staged.k, staged.v) or t.name in core_reads(staged)
    )
    made = tuple(staged.declaration(t) for t in stages)
    return replace(
        whole,
        ranks=tuple(r for r in whole.ranks if r not in staged.ranks),
        inputs=(*own, *made, *staged.form.reads),
        body=whole.body[len(staged.stages) :],
        tensors=tuple(t for t in whole.tensors if t not in staged.tensors or _is_core(staged, t)),
    )


def _is_core(staged: StagedAttention, decl: TensorDecl) -> bool:
    return all(e.out.tensor != decl.name for e in staged.stages)


def read_stages(staged: StagedAttention) -> tuple[str, ...]:
    """Stage tensors that the attention itself reads, in the order they are written."""
    wanted = core_reads(staged)
    written = dict.fromkeys(e.out.tensor for e in staged.stages)
    return tuple(t for t in written if t in wanted)


def core_reads(staged: StagedAttention) -> frozenset[str]:
    """Every tensor that the attention reads once its stages are done."""
    form = staged.form
    parts = [form.score, form.guard, form.weight, form.sink, staged.probability, staged.output]
    if staged.peak is not None:
        parts += [staged.peak.expr, staged.peak.guard]
    found = {staged.q, staged.k, staged.v}
    return frozenset(found.union(*(tensors_of(p) for p in parts if p is not None)))


def _ranks(e: Einsum) -> Iterable[str]:
    parts = (*e.out.index, e.expr, e.guard)
    return frozenset[str]().union(*map(ranks_of, parts), (r for r, _ in e.reduce))
