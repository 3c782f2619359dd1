"""Schemes: which operands of an attention are quantised, how, and what is taken off them before.

`quantised` rewrites a `StagedAttention`: it adds the stages that make scales and codes, puts the
scales into the score and into the output, and maps the probabilities.  Limited to some heads, the
others keep what they had, with a scale of 1: one cascade says what every head does.

Sources: Zhang et al. 2025 (SageAttention; smoothing of K, static scale of P), Zhang et al. 2025b
(SageAttention2; smoothing of Q and V, section 3.1 and 3.4), Shah et al. 2024 (FlashAttention-3,
section 3.3: rotation).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from attn_rewrite.cascade.attention import QK, inline_scores
from attn_rewrite.cascade.expr import (
    KV,
    TRUE,
    B,
    Const,
    D,
    Expr,
    Extent,
    F,
    H,
    Q,
    Rank,
    Read,
    call,
    substitute,
    where,
)
from attn_rewrite.cascade.ir import Einsum, RankDecl, TensorDecl
from attn_rewrite.cascade.staged import PV, ROW, SD, SN, StagedAttention
from attn_rewrite.passes.quantize.invariance import drops_row_constants
from attn_rewrite.passes.quantize.quantisers import (
    Float4,
    Float8,
    Granularity,
    Integer,
    rounded,
)
from attn_rewrite.passes.transform import outside

Code = Integer | Float8
Stored = Integer | Float8 | Float4
CODE_OF = {"q": "QI", "k": "KI", "v": "VI"}


@dataclass(frozen=True)
class Coding:
    """How one operand is quantised: a number format and which elements share a scale.

    ``static`` fixes the scale of every head in advance (calibrated); None computes it from the
    operand itself.  ``expanded``: codes become numbers again before the product (microscaling), so
    their scales may differ along the summed rank.
    """

    quantiser: Stored
    granularity: Granularity
    static: tuple[float, ...] | None = None
    expanded: bool = False


@dataclass(frozen=True)
class Scheme:
    """What happens to Q, K, V and the probabilities P; None leaves an operand in floating point.

    P is quantised below the row maximum, where it is at most 1, so its scale is fixed; the sum
    that divides it is not rounded.  ``smooth_k``/``smooth_v`` subtract the mean over the keys,
    ``smooth_q`` that over each block of ``smooth_block`` queries; ``rotate`` multiplies Q and K
    by a Hadamard matrix.
    """

    q: Coding | None = None
    k: Coding | None = None
    v: Coding | None = None
    p: Code | None = None
    smooth_q: bool = False
    smooth_k: bool = False
    smooth_v: bool = False
    rotate: bool = False
    smooth_block: int = 128


def quantised(
    staged: StagedAttention, scheme: Scheme, heads: tuple[int, ...] | None = None, d_qk: int = 0
) -> StagedAttention:
    """``staged`` with the operands of ``heads`` (None: all) quantised as ``scheme`` says.

    Heads must be whole groups that share key heads.  ``d_qk`` is needed to rotate.  Whether scales
    may stand where they stand is not decided here: see `placement`.
    """
    writer = _Writer(staged, scheme, heads, d_qk)
    form, v, probability, output = staged.form, staged.v, staged.probability, staged.output
    q = writer.queries() if scheme.q else staged.q
    k = writer.keys() if scheme.k else staged.k
    score = inline_scores(form.score, writer.product())
    if scheme.v is not None:
        v = writer.values()
    if scheme.p is not None or (scheme.v is not None and not scheme.v.expanded):
        probability = writer.probability(SN if probability is None else probability)
        output = writer.output(PV / SD if output is None else output)
        writer.declare_probability()
    return replace(
        staged, form=replace(form, score=score), stages=(*staged.stages, *writer.stages),
        q=q, k=k, v=v, probability=probability, output=output,
        tensors=(*staged.tensors, *writer.tensors), ranks=(*staged.ranks, *writer.ranks),
    )  # fmt: skip


@dataclass
class _Writer:
    """Collects the stages of one scheme on one attention."""

    staged: StagedAttention
    scheme: Scheme
    heads: tuple[int, ...] | None
    d_qk: int
    stages: list[Einsum] = field(default_factory=list)
    tensors: list[TensorDecl] = field(default_factory=list)
    ranks: list[RankDecl] = field(default_factory=list)
    factors: list[Expr] = field(default_factory=list)
    terms: list[Expr] = field(default_factory=list)

    def __post_init__(self) -> None:
        taken = {e.out.tensor for e in self.staged.stages}
        self.suffix = ""
        while any(f"{name}{self.suffix}" in taken for name in (*CODE_OF.values(), "KM", "QM")):
            self.suffix = str(int(self.suffix or 1) + 1)

    # Names and heads

    def name(self, stem: str) -> str:
        """A tensor name that no other scheme on the same attention has."""
        return stem + self.suffix

    def others(self, head: Expr) -> Expr:
        """Which heads are left alone; ``head`` counts query heads or key heads."""
        if self.heads is None:
            return TRUE
        group = 1 if head == H else self.staged.form.group
        return outside(tuple(h // group for h in self.heads), head)

    def only(self, head: Expr, value: Expr, otherwise: Expr | float) -> Expr:
        """``value`` on the heads that are quantised."""
        return value if self.heads is None else where(self.others(head), otherwise, value)

    def add(self, out: Read, expr: Expr, reduce: tuple[tuple[str, str], ...] = ()) -> Read:
        """A stage."""
        self.stages.append(Einsum(out, expr, reduce))
        return out

    # Operands

    def queries(self) -> str:
        """Codes of Q; the rest of the sum goes into the score."""
        x: Expr = Read("Q", (B, H, Q, D))
        if self.scheme.smooth_q:
            x = x - self._query_means()
        return self._coded("q", self._rotated("QR", x, H, Q), H, Q, D)

    def keys(self) -> str:
        """Codes of K, its mean taken off first."""
        head = self.staged.head
        x: Expr = Read("K", (B, head, KV, D))
        if self.scheme.smooth_k:
            mean = self._mean("KM", x, D)
            x = self.add(Read(self.name("KC"), (B, head, KV, D)), x - mean)
            if not drops_row_constants(self.staged):
                self._keep_row_constant(mean)
        if self.scheme.smooth_q:
            self._keep_query_means(x)
        return self._coded("k", self._rotated("KR", x, head, KV), head, KV, D)

    def values(self) -> str:
        """Codes of V, its mean taken off first."""
        head = self.staged.head
        x: Expr = Read("V", (B, head, KV, F))
        if self.scheme.smooth_v:
            x = self.add(Read(self.name("VC"), (B, head, KV, F)), x - self._mean("VM", x, F))
        return self._coded("v", x, head, KV, F)

    def _coded(self, operand: str, x: Expr, head: Rank, token: Rank, channel: Rank) -> str:
        coding: Coding = getattr(self.scheme, operand)
        whole = getattr(self.staged, operand)
        name, scales = self.name(CODE_OF[operand]), self.name(f"{operand.upper()}S")
        index = coding.granularity.index(head, token, channel)
        space = (B, head, token, channel)
        bound = coding.quantiser.scale(x)
        if not index:
            bound = self.only(head, bound, 0.0)
        kept = {i.name for i in index if isinstance(i, Rank)}
        reduce = tuple((r.name, "max") for r in reversed(space) if r.name not in kept)
        if coding.static is not None:
            bound, reduce = _chosen(coding.static, head), ()
        self.add(Read(scales, index), bound, reduce)
        code = coding.quantiser.code(x, Read(scales, index))
        if coding.expanded:
            code = code * Read(scales, index)
        self.add(Read(name, space), self.only(head, code, Read(whole, space)))
        self.tensors += [
            TensorDecl(
                scales, coding.granularity.ranks(head.name, token.name, channel.name),
                sign="positive",
            ),
            TensorDecl(
                name, tuple(r.name for r in space), scale=None if coding.expanded else scales,
                dtype=coding.quantiser.dtype if self.heads is None else "float",
            ),
        ]  # fmt: skip
        here = tuple(substitute(i, {self.staged.head: self.staged.kv_head}) for i in index)
        if operand != "q":
            index = here
        if operand != "v" and not coding.expanded:
            owner = H if operand == "q" else self.staged.kv_head
            self.factors.append(self.only(owner, Read(scales, index), 1.0))
        return name

    def _mean(self, stem: str, x: Expr, channel: Rank) -> Read:
        """Mean over the keys, per key head and channel."""
        head = self.staged.head
        name = self.name(stem)
        self.tensors.append(TensorDecl(name, ("b", head.name, channel.name)))
        total = Einsum(Read(name, (B, head, channel)), x / Extent("kv"), (("kv", "add"),))
        self.stages.append(total)
        return total.out

    # Terms that smoothing leaves behind

    def _keep_row_constant(self, mean: Read) -> None:
        """q . mean(K): it cancels in a plain softmax, and has to stay in any other score."""
        row = Read(self.name("QKM"), ROW)
        read = substitute(mean, {self.staged.head: self.staged.kv_head})
        self.add(row, Read("Q", (B, H, Q, D)) * read, (("d", "add"),))
        self.tensors.append(TensorDecl(row.tensor, ("b", "h", "q")))
        self.terms.append(self.only(H, row, 0.0))

    def _query_means(self) -> Expr:
        """Mean over each block of queries, per channel."""
        block = call("floordiv", Q, self.scheme.smooth_block)
        members = Read(self.name("QN"), (block,))
        means = Read(self.name("QM"), (B, H, block, D))
        # The last block may be short, so its queries are counted.
        self.add(members, where(Q >= 0, 1.0, 0.0), (("q", "add"),))
        self.add(means, Read("Q", (B, H, Q, D)) / members, (("q", "add"),))
        self.ranks.append(RankDecl(self.name("qb")))
        self.tensors += [
            TensorDecl(members.tensor, (self.name("qb"),)),
            TensorDecl(means.tensor, ("b", "h", self.name("qb"), "d")),
        ]
        return means

    def _keep_query_means(self, keys: Expr) -> None:
        """mean(Q) . K: it differs from key to key, so it must be added to the product."""
        head, block = self.staged.head, Rank(self.name("qb"))
        own = substitute(keys, {head: self.staged.kv_head})
        term = Read(self.name("DS"), (B, H, block, KV))
        self.add(term, Read(self.name("QM"), (B, H, block, D)) * own, (("d", "add"),))
        self.tensors.append(TensorDecl(term.tensor, ("b", "h", block.name, "kv")))
        here = call("floordiv", Q, self.scheme.smooth_block)
        self.terms.append(self.only(H, Read(term.tensor, (B, H, here, KV)), 0.0))

    def _rotated(self, stem: str, x: Expr, head: Rank, token: Rank) -> Expr:
        """``x`` times a Hadamard matrix over the channels, orthogonal and symmetric."""
        if not self.scheme.rotate:
            return x
        inner = Rank("dr")
        if not any(r.name == "dr" for r in (*self.staged.ranks, *self.ranks)):
            self.ranks.append(RankDecl("dr", self.d_qk))
        term = substitute(x, {D: inner}) * hadamard(inner, D, self.d_qk)
        return self.add(Read(self.name(stem), (B, head, token, D)), term, (("dr", "add"),))

    # The two products

    def product(self) -> Expr:
        """The product of queries and keys from that of their codes."""
        value: Expr = QK
        for factor in self.factors:
            value = value * factor
        for term in self.terms:
            value = value + term
        return value

    def probability(self, plain: Expr) -> Expr:
        """What multiplies the codes of V: P in units of its static scale."""
        p = self.scheme.p
        if p is None:
            return plain
        return self.only(H, _static_code(p, SN), plain)

    def output(self, plain: Expr) -> Expr:
        """AV from the product of codes: divided, scaled, and the mean of V back."""
        value = plain
        if self.scheme.p is not None:
            value = value / self.only(H, Const(self.scheme.p.limit), 1.0)
        group: dict[Expr, Expr] = {self.staged.head: self.staged.kv_head}
        if self.scheme.v is not None and not self.scheme.v.expanded:
            index = self.scheme.v.granularity.index(self.staged.kv_head, KV, F)
            value = value * self.only(H, Read(self.name("VS"), index), 1.0)
        if self.scheme.smooth_v:
            mean = substitute(Read(self.name("VM"), (B, self.staged.head, F)), group)
            # A query without keys gives 0, not the mean.
            value = value + self.only(H, where(SD > 0, mean, 0.0), 0.0)
        return value

    def declare_probability(self) -> None:
        """The codes of P are stored in the type of their format where every head has them."""
        if self.scheme.p is not None and self.heads is None:
            self.tensors.append(TensorDecl("PI", ("b", "h", "q", "kv"), dtype=self.scheme.p.dtype))


def _static_code(p: Code, probability: Expr) -> Expr:
    """The code of a number from 0 to 1 at the scale 1 / limit: nothing to saturate."""
    if isinstance(p, Integer):
        return call("cast_i8", rounded(probability * p.limit, p.rounding))
    return call(f"cast_{p.dtype}", probability * p.limit)


def _chosen(values: tuple[float, ...], head: Rank) -> Expr:
    """The entry of a head: one value is for all."""
    chosen: Expr = Const(values[-1])
    for number, value in reversed(tuple(enumerate(values[:-1]))):
        chosen = where(call("eq", head, number), value, chosen)
    return chosen


def hadamard(row: Rank, column: Rank, size: int) -> Expr:
    """Entry of the orthonormal Hadamard matrix of ``size``, block by block of its power of two.

    The sign is the parity of the bits that row and column share.
    """
    width = size & -size
    entry: Expr = where(call("eq", row // width, column // width), width**-0.5, 0.0)
    bit = 1
    while bit < width:
        both = ((row // bit) % 2) * ((column // bit) % 2)
        entry = entry * (1 - 2 * both)
        bit *= 2
    return entry
