"""Combiner as cascades: direct tokens plus summaries of groups, under one softmax.

A group Omega is one term of a query's softmax: its key is the maximum of its keys, its value the
softmax over Omega of the products of its keys with the maximum of its queries, times its values::

    p(j | i) = exp(q_i . k_j) / Z_i                              j direct
    p(j | i) = exp(q_i . k_Omega) / Z_i * softmax_Omega(q_Omega . k_j)    j in Omega

Every query has full (causal) support, but the number of terms is O(sqrt L) or O(log L).  Summaries
are Einsums of their own, computed once, so nothing iterates over all pairs.

Source: Ren et al. 2021 (Combiner, 2107.05768), sections 3 and 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

from attn_rewrite.cascade.attention import QK
from attn_rewrite.cascade.expr import Expr, substitute, to_text
from attn_rewrite.cascade.ir import Cascade
from attn_rewrite.cascade.text import parse, parse_expr


@dataclass(frozen=True)
class Shared:
    """What every Combiner has: ``score`` over the product `QK`, ``group`` query heads per key head.

    ``causal``: a query sees its own position and what is before it.
    """

    score: Expr
    group: int = 1
    causal: bool = True

    def of(self, product: str) -> str:
        """The score of a product of a query and a key."""
        return to_text(substitute(self.score, {QK: parse_expr(product)}))

    @property
    def head(self) -> str:
        """The rank of key heads."""
        return "h" if self.group == 1 else "hkv"

    @property
    def own(self) -> str:
        """The key head of query head ``h``."""
        return "h" if self.group == 1 else f"h // {self.group}"

    def cascade(self, ranks: str, lines: str) -> Cascade:
        """The cascade of the text ``lines`` over Q, K, V."""
        heads = "h" if self.group == 1 else "h, hkv"
        header = f"""cascade combiner
ranks b, {heads}, {ranks}, d, f
inputs Q[b, h, q, d], K[b, {self.head}, kv, d], V[b, {self.head}, kv, f]
output AV
"""
        return parse(header + lines)


def fixed(parts: Shared, segment: int) -> Cascade:
    """Segments of ``segment`` positions: the own one directly, every earlier (other) one summed up.

    Lengths may be dynamic; the last segment may be shorter.  O(L (segment + L / segment)).
    """
    n, of, kv, own = segment, parts.of, parts.head, parts.own
    near = "r <= t" if parts.causal else f"s * {n} + r < #kv"
    far = "z < s" if parts.causal else "z != s"
    ranks = f"q (s, t), kv (z, r), s, t = {n}, z, r = {n}"
    return parts.cascade(
        ranks,
        f"""
tensor LM[b, h, z] default -inf
tensor DS[b, h, s, t, r] default -inf
tensor GS[b, h, s, t, z] default -inf
tensor DM[b, h, s, t] default -inf
tensor XM[b, h, s, t] default -inf
tensor GM[b, h, s, t] default -inf
QS[b, h, s, t, d] = Q[b, h, s * {n} + t, d]
KS[b, {kv}, z, r, d] = K[b, {kv}, z * {n} + r, d]
VS[b, {kv}, z, r, f] = V[b, {kv}, z * {n} + r, f]
QX[b, h, s, d] = QS[b, h, s, t, d] :: reduce_t max
KX[b, {kv}, z, d] = KS[b, {kv}, z, r, d] :: reduce_r max
LP[b, h, z, r] = QX[b, h, z, d] * KS[b, {own}, z, r, d]
LS[b, h, z, r] = {of("LP[b, h, z, r]")}
LM[b, h, z] = LS[b, h, z, r] :: reduce_r max
LN[b, h, z, r] = exp(LS[b, h, z, r] - LM[b, h, z])
LD[b, h, z] = LN[b, h, z, r]
LV[b, h, z, f] = LN[b, h, z, r] * VS[b, {own}, z, r, f]
SV[b, h, z, f] = LV[b, h, z, f] / LD[b, h, z]
DP[b, h, s, t, r] = QS[b, h, s, t, d] * KS[b, {own}, s, r, d]
DS[b, h, s, t, r] = {of("DP[b, h, s, t, r]")} where {near}
GP[b, h, s, t, z] = QS[b, h, s, t, d] * KX[b, {own}, z, d]
GS[b, h, s, t, z] = {of("GP[b, h, s, t, z]")} where {far}
DM[b, h, s, t] = DS[b, h, s, t, r] :: reduce_r max where {near}
XM[b, h, s, t] = GS[b, h, s, t, z] :: reduce_z max where {far}
GM[b, h, s, t] = max(DM[b, h, s, t], XM[b, h, s, t])
DN[b, h, s, t, r] = exp(DS[b, h, s, t, r] - GM[b, h, s, t]) where {near}
GN[b, h, s, t, z] = exp(GS[b, h, s, t, z] - GM[b, h, s, t]) where {far}
DD[b, h, s, t] = DN[b, h, s, t, r]
GD[b, h, s, t] = GN[b, h, s, t, z]
DV[b, h, s, t, f] = DN[b, h, s, t, r] * VS[b, {own}, s, r, f]
GV[b, h, s, t, f] = GN[b, h, s, t, z] * SV[b, h, z, f]
AS[b, h, s, t, f] = (DV[b, h, s, t, f] + GV[b, h, s, t, f]) / (DD[b, h, s, t] + GD[b, h, s, t])
AV[b, h, q, f] = AS[b, h, q // {n}, q % {n}, f]
""",
    )


def logsparse(parts: Shared, length: int) -> Cascade:
    """The prefix of a query in its binary digits: one group of 2**l tokens for every bit l set.

    Causal.  O(L log L), written out level by level, so for one length.
    """
    levels = range(max(length - 1, 0).bit_length())
    ranks = chain(
        (f"q = {length}, kv = {length}",),
        (f"g{n} = {length >> n}, r{n} = {1 << n}" for n in levels[1:]),
    )
    lines: list[str] = [f"DP[b, h, q] = Q[b, h, q, d] * K[b, {parts.own}, q, d]"]
    lines += [f"DS[b, h, q] = {parts.of('DP[b, h, q]')}"]
    for level in levels:
        lines += _level(parts, level)
    terms = [f"S{n}[b, h, q]" for n in levels]
    top = "DS[b, h, q]"
    for term in terms:
        top = f"max({top}, {term})"
    lines += [f"GM[b, h, q] = {top}", "DN[b, h, q] = exp(DS[b, h, q] - GM[b, h, q])"]
    lines += [f"N{n}[b, h, q] = exp({term} - GM[b, h, q])" for n, term in enumerate(terms)]
    total = " + ".join(["DN[b, h, q]", *(f"N{n}[b, h, q]" for n in levels)])
    lines += [f"SD[b, h, q] = {total}"]
    values = [f"DN[b, h, q] * V[b, {parts.own}, q, f]", *(_value(parts, n) for n in levels)]
    lines += [f"SV[b, h, q, f] = {' + '.join(values)}"]
    lines += ["AV[b, h, q, f] = SV[b, h, q, f] / SD[b, h, q]"]
    defaults = [f"tensor S{n}[b, h, q] default -inf" for n in levels]
    return parts.cascade(", ".join(ranks), "\n".join([*defaults, *lines, ""]))


def _level(parts: Shared, n: int) -> list[str]:
    """Summaries of the groups of 2**n tokens that are whole, and each query's score of its own."""
    before = f"q // {1 << n} - 1"  # the group that ends where the query's own begins
    seen = f"q // {1 << n} % 2 == 1"
    score = f"S{n}[b, h, q] = {parts.of(f'P{n}[b, h, q]')} where {seen}"
    if n == 0:
        product = f"P0[b, h, q] = Q[b, h, q, d] * K[b, {parts.own}, {before}, d] where {seen}"
        return [product, score]
    kv, own, size = parts.head, parts.own, 1 << n
    q, k = ("Q", "K") if n == 1 else (f"Q{n - 1}", f"K{n - 1}")
    halves = (f"2 * g{n}", f"2 * g{n} + 1")
    pooled_q = ", ".join(f"{q}[b, h, {half}, d]" for half in halves)
    pooled_k = ", ".join(f"{k}[b, {kv}, {half}, d]" for half in halves)
    at = f"b, h, g{n}"
    key = f"b, {own}, g{n} * {size} + r{n}"
    return [
        f"Q{n}[{at}, d] = max({pooled_q})",
        f"K{n}[b, {kv}, g{n}, d] = max({pooled_k})",
        f"LP{n}[{at}, r{n}] = Q{n}[{at}, d] * K[{key}, d]",
        f"LS{n}[{at}, r{n}] = {parts.of(f'LP{n}[{at}, r{n}]')}",
        f"LM{n}[{at}] = LS{n}[{at}, r{n}] :: reduce_r{n} max",
        f"LN{n}[{at}, r{n}] = exp(LS{n}[{at}, r{n}] - LM{n}[{at}])",
        f"LD{n}[{at}] = LN{n}[{at}, r{n}]",
        f"LV{n}[{at}, f] = LN{n}[{at}, r{n}] * V[{key}, f]",
        f"V{n}[{at}, f] = LV{n}[{at}, f] / LD{n}[{at}]",
        f"P{n}[b, h, q] = Q[b, h, q, d] * K{n}[b, {own}, {before}, d] where {seen}",
        score,
    ]


def _value(parts: Shared, n: int) -> str:
    """What the group of level ``n`` adds to the value of a query that has it."""
    head, name = ("h", f"V{n}") if n else (parts.own, "V")
    read = f"{name}[b, {head}, q // {1 << n} - 1, f]"
    return f"where(q // {1 << n} % 2 == 1, N{n}[b, h, q] * {read}, 0.0)"


def axial(parts: Shared, rows: int, columns: int) -> Cascade:
    """Tokens as rows x columns: own row and column directly, one group for every other column.

    Causal, a group is its column above the query's row, and the own row is seen up to the query
    (running maxima from row to row); otherwise it is its column without the query's row.
    O(L (rows + columns)).
    """
    n, of, kv, own = columns, parts.of, parts.head, parts.own
    above = "u < y" if parts.causal else "u != y"
    along = " where w <= x" if parts.causal else ""
    other = "(y > 0) & (w != x)" if parts.causal else "w != x"
    other = "w < 0" if rows == 1 else other  # no other row, nothing to sum up
    ranks = f"q (y, x), kv (u, w), y = {rows}, x = {n}, u = {rows}, w = {n}"
    ranks += f", n = {rows - 1}" if rows > 1 else ""
    row = "b, h, y, x"
    return parts.cascade(
        ranks,
        f"""
tensor LS[b, h, y, w, u] default -inf
tensor LM[b, h, y, w] default -inf
tensor CS[{row}, u] default -inf
tensor RS[{row}, w] default -inf
tensor GS[{row}, w] default -inf
tensor CM[{row}] default -inf
tensor RM[{row}] default -inf
tensor XM[{row}] default -inf
tensor GM[{row}] default -inf
QS[{row}, d] = Q[b, h, y * {n} + x, d]
KS[b, {kv}, u, w, d] = K[b, {kv}, u * {n} + w, d]
VS[b, {kv}, u, w, f] = V[b, {kv}, u * {n} + w, f]
{_without_row("Q", "h", parts.causal, rows)}
{_without_row("K", kv, parts.causal, rows)}
LP[b, h, y, w, u] = QX[b, h, y, w, d] * KS[b, {own}, u, w, d]
LS[b, h, y, w, u] = {of("LP[b, h, y, w, u]")} where {above}
LM[b, h, y, w] = LS[b, h, y, w, u] :: reduce_u max where {above}
LN[b, h, y, w, u] = exp(LS[b, h, y, w, u] - LM[b, h, y, w]) where {above}
LD[b, h, y, w] = LN[b, h, y, w, u]
LV[b, h, y, w, f] = LN[b, h, y, w, u] * VS[b, {own}, u, w, f]
SV[b, h, y, w, f] = LV[b, h, y, w, f] / LD[b, h, y, w]
CP[{row}, u] = QS[{row}, d] * KS[b, {own}, u, x, d]
CS[{row}, u] = {of(f"CP[{row}, u]")} where {above}
RP[{row}, w] = QS[{row}, d] * KS[b, {own}, y, w, d]
RS[{row}, w] = {of(f"RP[{row}, w]")}{along}
GP[{row}, w] = QS[{row}, d] * KX[b, {own}, y, w, d]
GS[{row}, w] = {of(f"GP[{row}, w]")} where {other}
CM[{row}] = CS[{row}, u] :: reduce_u max where {above}
RM[{row}] = RS[{row}, w] :: reduce_w max{along}
XM[{row}] = GS[{row}, w] :: reduce_w max where {other}
GM[{row}] = max(max(CM[{row}], RM[{row}]), XM[{row}])
CN[{row}, u] = exp(CS[{row}, u] - GM[{row}]) where {above}
RN[{row}, w] = exp(RS[{row}, w] - GM[{row}]){along}
GN[{row}, w] = exp(GS[{row}, w] - GM[{row}]) where {other}
CD[{row}] = CN[{row}, u]
RD[{row}] = RN[{row}, w]
GD[{row}] = GN[{row}, w]
CV[{row}, f] = CN[{row}, u] * VS[b, {own}, u, x, f]
RV[{row}, f] = RN[{row}, w] * VS[b, {own}, y, w, f]
GV[{row}, f] = GN[{row}, w] * SV[b, h, y, w, f]
AS[{row}, f] = (CV[{row}, f] + RV[{row}, f] + GV[{row}, f]) / (CD[{row}] + RD[{row}] + GD[{row}])
AV[b, h, q, f] = AS[b, h, q // {n}, q % {n}, f]
""",
    )


def _without_row(name: str, head: str, causal: bool, rows: int) -> str:
    """Maxima of a column above each row, or in all the other rows, by running from row to row."""
    at, tokens = f"b, {head}", f"{name}S"
    pooled = f"{name}X[{at}, y, w, d]"
    if rows == 1:
        return f"{pooled} = {tokens}[{at}, y, w, d]"  # there is no other row; nothing reads it
    down, up = f"{name}A", f"{name}B"
    text = f"""loop n:
  init:
    {down}[{at}, 0, w, d] = {tokens}[{at}, 0, w, d]
  body:
    {down}[{at}, n + 1, w, d] = max({down}[{at}, n, w, d], {tokens}[{at}, n + 1, w, d])
  stop: n >= #n
"""
    if causal:
        return text + f"{pooled} = {down}[{at}, y - 1, w, d] where y > 0"
    last = rows - 1
    text += f"""loop n descending:
  init:
    {up}[{at}, {last}, w, d] = {tokens}[{at}, {last}, w, d]
  body:
    {up}[{at}, n, w, d] = max({up}[{at}, n + 1, w, d], {tokens}[{at}, n, w, d])
  stop: n < 0
"""
    above, below = f"{down}[{at}, y - 1, w, d]", f"{up}[{at}, y + 1, w, d]"
    both = f"where(y == {last}, {above}, max({above}, {below}))"
    return text + f"{pooled} = where(y == 0, {below}, {both})"
