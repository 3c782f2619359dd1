"""The cascades of the FuseMax paper (Nayak et al., MICRO 2024), as text.

Ranks: p queries, m keys, e the head dim of Q and K, f that of V; batch and heads are omitted and
so is the factor 1/sqrt(#e), as in the paper (a raised Site keeps its scale).
Q[e, p], K[e, m], V[f, m] -> AV[f, p].
"""

from __future__ import annotations

HEADER = """
ranks p, m, e, f
inputs Q[e, p], K[e, m], V[f, m]
"""

TILED_HEADER = """
ranks p, m (m1, m0), m1, m0, e, f
inputs Q[e, p], K[e, m], V[f, m]
"""

SCORES = """
QK[m, p] = Q[e, p] * K[e, m]
"""

STABLE = """
tensor GM[p] default -inf
GM[p] = QK[m, p] :: reduce_m max
SN[m, p] = exp(QK[m, p] - GM[p])
SD[p] = SN[m, p]
"""

UNSTABLE = """
SN[m, p] = exp(QK[m, p])
SD[p] = SN[m, p]
"""

NORMALISED = """
A[m, p] = SN[m, p] / SD[p]
AV[f, p] = A[m, p] * V[f, m]
"""

# Division deferral (section IV-D): F x P divisions instead of M x P.
DEFERRED = """
SNV[f, p] = SN[m, p] * V[f, m]
AV[f, p] = SNV[f, p] / SD[p]
"""

# Local maxima per tile; the paper describes this form in words only.
LOCAL = """
tensor LM[m1, p] default -inf
tensor GM[p] default -inf
BK[e, m1, m0] = K[e, m1 * #m0 + m0]
BV[f, m1, m0] = V[f, m1 * #m0 + m0]
BQK[m1, m0, p] = Q[e, p] * BK[e, m1, m0]
LM[m1, p] = BQK[m1, m0, p] :: reduce_m0 max
GM[p] = LM[m1, p] :: reduce_m1 max
SLN[m1, m0, p] = exp(BQK[m1, m0, p] - LM[m1, p])
SLD[m1, p] = SLN[m1, m0, p]
PLM[m1, p] = exp(LM[m1, p] - GM[p])
SD[p] = SLD[m1, p] * PLM[m1, p]
"""

TWO_PASS = (
    TILED_HEADER
    + LOCAL
    + """
A[m1, m0, p] = SLN[m1, m0, p] * PLM[m1, p] / SD[p]
AV[f, p] = A[m1, m0, p] * BV[f, m1, m0]
"""
)

TWO_PASS_DEFERRED = (
    TILED_HEADER
    + LOCAL
    + """
SNV[f, p] = SLN[m1, m0, p] * PLM[m1, p] * BV[f, m1, m0]
AV[f, p] = SNV[f, p] / SD[p]
"""
)

# Cascade 5, the form of FlashAttention-2: the corrections are per tile.
ONE_PASS = (
    TILED_HEADER
    + """
tensor LM[m1, p] default -inf
tensor RM[m1, p] default -inf
loop m1:
  init:
    BK[e, m1, m0] = K[e, m1 * #m0 + m0]
    BV[f, m1, m0] = V[f, m1 * #m0 + m0]
    RM[0, p] = -inf
    RD[0, p] = 0.0
    RNV[f, 0, p] = 0.0
  body:
    BQK[m1, m0, p] = Q[e, p] * BK[e, m1, m0]
    LM[m1, p] = BQK[m1, m0, p] :: reduce_m0 max
    RM[m1 + 1, p] = max(RM[m1, p], LM[m1, p])
    SLN[m1, m0, p] = exp(BQK[m1, m0, p] - RM[m1 + 1, p])
    SLD[m1, p] = SLN[m1, m0, p]
    SLNV[f, m1, p] = SLN[m1, m0, p] * BV[f, m1, m0]
    PRM[m1, p] = exp(RM[m1, p] - RM[m1 + 1, p])
    SPD[m1, p] = RD[m1, p] * PRM[m1, p]
    RD[m1 + 1, p] = SLD[m1, p] + SPD[m1, p]
    SPNV[f, m1, p] = RNV[f, m1, p] * PRM[m1, p]
    RNV[f, m1 + 1, p] = SLNV[f, m1, p] + SPNV[f, m1, p]
  stop: m1 >= #m1
AV[f, p] = RNV[f, #m1, p] / RD[#m1, p]
"""
)

# Section III: A[k], B[k] -> Z.  The iterative one divides by RY[0] = 0, which is an empty divisor:
# the correction of the empty prefix is 0.  It fails where a later prefix of Y is 0; the deferred
# one never does.
CASCADE_1 = """
ranks k
inputs A[k], B[k]
Y = A[k] * B[k]
Z = Y * A[k]
"""

CASCADE_2 = """
ranks k
inputs A[k], B[k]
Y = A[k] * B[k]
X = A[k]
Z = Y * X
"""

CASCADE_3 = """
ranks k
inputs A[k], B[k]
loop k:
  init:
    RY[0] = 0.0
    RZ[0] = 0.0
  body:
    RY[k + 1] = RY[k] + A[k] * B[k]
    RZ[k + 1] = RZ[k] * RY[k + 1] / RY[k] + RY[k + 1] * A[k]
  stop: k >= #k
Z = RZ[#k]
"""

TEXTS = {
    "attention-3pass": HEADER + SCORES + STABLE + NORMALISED,
    "attention-3pass-deferred": HEADER + SCORES + STABLE + DEFERRED,
    "attention-2pass": TWO_PASS,
    "attention-2pass-deferred": TWO_PASS_DEFERRED,
    "attention-1pass": ONE_PASS,
    "attention-unstable": HEADER + SCORES + UNSTABLE + NORMALISED,
    "attention-unstable-deferred": HEADER + SCORES + UNSTABLE + DEFERRED,
    "dependent-sums": CASCADE_1,
    "dependent-sums-deferred": CASCADE_2,
    "dependent-sums-iterative": CASCADE_3,
}
