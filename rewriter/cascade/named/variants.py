"""Variants of attention as text: each in the plain form that a definition gives it.

Notation and shapes as in `paper`; a variant that is about heads has Q[h, e, p], K[h, e, m],
V[h, f, m] -> AV[h, f, p].  Parameters are scalar inputs.  The one-pass forms are not written here:
`fuse_reductions` derives them where they exist.
"""

from __future__ import annotations

from attn_rewrite.cascade.named.paper import HEADER, NORMALISED, SCORES, STABLE

HEADS = """
ranks h, p, m, e, f
inputs Q[h, e, p], K[h, e, m], V[h, f, m]
"""

HEAD_SCORES = """
QK[h, m, p] = Q[h, e, p] * K[h, e, m]
"""


def _softmax(score: str = "QK[m, p]", where: str = "", head: str = "") -> str:
    """Softmax of ``score`` over m and its product with V, in three passes, every pair guarded."""
    guard = f" where {where}" if where else ""
    return f"""
tensor S[{head}m, p] default -inf
tensor GM[{head}p] default -inf
S[{head}m, p] = {score}{guard}
GM[{head}p] = S[{head}m, p] :: reduce_m max{guard}
SN[{head}m, p] = exp(S[{head}m, p] - GM[{head}p]){guard}
SD[{head}p] = SN[{head}m, p]{guard}
A[{head}m, p] = SN[{head}m, p] / SD[{head}p]{guard}
AV[{head}f, p] = A[{head}m, p] * V[{head}f, m]{guard}
"""


def _sink(sink: str, head: str = "") -> str:
    """Softmax with a logit that joins the denominator only."""
    return f"""
tensor LM[{head}p] default -inf
LM[{head}p] = QK[{head}m, p] :: reduce_m max
GM[{head}p] = max(LM[{head}p], {sink})
SN[{head}m, p] = exp(QK[{head}m, p] - GM[{head}p])
LS[{head}p] = SN[{head}m, p]
SD[{head}p] = LS[{head}p] + exp({sink} - GM[{head}p])
A[{head}m, p] = SN[{head}m, p] / SD[{head}p]
AV[{head}f, p] = A[{head}m, p] * V[{head}f, m]
"""


def _probabilities(suffix: str) -> str:
    """The attention of one of two maps that share V (differential attention)."""
    s = suffix
    return f"""
tensor GM{s}[p] default -inf
QK{s}[m, p] = Q{s}[e, p] * K{s}[e, m]
GM{s}[p] = QK{s}[m, p] :: reduce_m max
SN{s}[m, p] = exp(QK{s}[m, p] - GM{s}[p])
SD{s}[p] = SN{s}[m, p]
A{s}[m, p] = SN{s}[m, p] / SD{s}[p]
AV{s}[f, p] = A{s}[m, p] * V[f, m]
"""


MASKS = {
    "causal": HEADER + SCORES + _softmax(where="m <= p"),
    "window": HEADER + "input size\n" + SCORES + _softmax(where="(p - m >= 0) & (p - m < size)"),
    "window-with-sinks": HEADER
    + "inputs size, sinks\n"
    + SCORES
    + _softmax(where="(p - m >= 0) & ((p - m < size) | (m < sinks))"),
    "block-sparse": HEADER
    + "ranks pb, mb\ninput blocks[pb, mb] dtype bool\ninput size dtype i64\n"
    + SCORES
    + _softmax(where="blocks[p // size, m // size]"),
}

SCORE_EDITS = {
    "scaled": HEADER + SCORES + _softmax("QK[m, p] / sqrt(#e)"),
    "alibi": HEADS
    + "input slope[h]\n"
    + HEAD_SCORES
    + _softmax("QK[h, m, p] + slope[h] * (m - p)", head="h, "),
    # The table holds the bias of every distance from 1 - #p to #m - 1.
    "relative-bias": HEADER
    + "rank d\ninput bias[d]\n"
    + SCORES
    + _softmax("QK[m, p] + bias[m - p + #p - 1]"),
    "softcap": HEADER + "input cap\n" + SCORES + _softmax("cap * tanh(QK[m, p] / cap)"),
    "qk-norm": HEADER
    + """
input temperature
QS[p] = Q[e, p] * Q[e, p]
KS[m] = K[e, m] * K[e, m]
QN[e, p] = Q[e, p] / sqrt(QS[p])
KN[e, m] = K[e, m] / sqrt(KS[m])
QK[m, p] = QN[e, p] * KN[e, m]
"""
    + _softmax("temperature * QK[m, p]"),
    # Grouped queries: head h reads the keys of head h * #g // #h.
    "grouped-queries": """
ranks h, g, p, m, e, f
inputs Q[h, e, p], K[g, e, m], V[g, f, m]
QK[h, m, p] = Q[h, e, p] * K[h * #g // #h, e, m]
"""
    + _softmax("QK[h, m, p]", head="h, ").replace("V[h, f, m]", "V[h * #g // #h, f, m]"),
}

DENOMINATORS = {
    "softmax1": HEADER + SCORES + _sink("0.0"),
    "sink": HEADS + "input logit[h]\n" + HEAD_SCORES + _sink("logit[h]", "h, "),
}

POINTWISE = {
    "sigmoid": HEADER
    + "input bias\n"
    + SCORES
    + """
A[m, p] = sigmoid(QK[m, p] + bias)
AV[f, p] = A[m, p] * V[f, m]
""",
    "relu-power": HEADER
    + "input power\n"
    + SCORES
    + """
A[m, p] = relu(QK[m, p]) ** power
AV[f, p] = A[m, p] * V[f, m]
""",
    "relu-power-normalised": HEADER
    + "input power\n"
    + SCORES
    + """
SN[m, p] = relu(QK[m, p]) ** power
SD[p] = SN[m, p]
A[m, p] = SN[m, p] / SD[p]
AV[f, p] = A[m, p] * V[f, m]
""",
}

PRODUCT_WITH_V = "AV[f, p] = A[m, p] * V[f, m]"

NUMERATORS = {
    "gated": HEADER
    + "input gate[f, p]\n"
    + SCORES
    + STABLE
    + NORMALISED.replace("AV[f, p]", "O[f, p]")
    + "AV[f, p] = O[f, p] * sigmoid(gate[f, p])\n",
    # A Toeplitz factor per distance (URPE): the denominator keeps the unweighted numerators.
    "urpe": HEADER
    + "rank d\ninput C[d]\n"
    + SCORES
    + STABLE
    + NORMALISED.replace(PRODUCT_WITH_V, "AV[f, p] = A[m, p] * C[m - p + #p - 1] * V[f, m]"),
    "dropout": HEADER
    + "input kept[m, p] dtype bool\ninput keep\n"
    + SCORES
    + STABLE
    + NORMALISED.replace(PRODUCT_WITH_V, "AV[f, p] = A[m, p] * kept[m, p] / keep * V[f, m]"),
    "differential": """
ranks p, m, e, f
inputs Q1[e, p], K1[e, m], Q2[e, p], K2[e, m], V[f, m], lam
"""
    + _probabilities("1")
    + _probabilities("2")
    + "AV[f, p] = AV1[f, p] - lam * AV2[f, p]\n",
    # Heads are mixed after the softmax; V has the mixed heads g.
    "talking-heads": """
ranks h, g, p, m, e, f
inputs Q[h, e, p], K[h, e, m], V[g, f, m], W[g, h]
tensor GM[h, p] default -inf
QK[h, m, p] = Q[h, e, p] * K[h, e, m]
GM[h, p] = QK[h, m, p] :: reduce_m max
SN[h, m, p] = exp(QK[h, m, p] - GM[h, p])
SD[h, p] = SN[h, m, p]
A[h, m, p] = SN[h, m, p] / SD[h, p]
AM[g, m, p] = W[g, h] * A[h, m, p]
AV[g, f, p] = AM[g, m, p] * V[g, f, m]
""",
    "talking-heads-before-softmax": """
ranks h, g, p, m, e, f
inputs Q[h, e, p], K[h, e, m], V[g, f, m], W[g, h]
tensor GM[g, p] default -inf
QK[h, m, p] = Q[h, e, p] * K[h, e, m]
S[g, m, p] = W[g, h] * QK[h, m, p]
GM[g, p] = S[g, m, p] :: reduce_m max
SN[g, m, p] = exp(S[g, m, p] - GM[g, p])
SD[g, p] = SN[g, m, p]
A[g, m, p] = SN[g, m, p] / SD[g, p]
AV[g, f, p] = A[g, m, p] * V[g, f, m]
""",
}

# The threshold TAU solves sum(A) = 1 by Newton steps from the left, where the sum is at least 1.
_NEWTON = """
tensor GM[p] default -inf
X[m, p] = {scale} * QK[m, p]
GM[p] = X[m, p] :: reduce_m max
loop n:
  init:
    TAU[0, p] = GM[p] - 1.0
  body:
    R[n, p] = {value}
    C[n, p] = {slope}
    TAU[n + 1, p] = TAU[n, p] + (R[n, p] - 1.0) / C[n, p]
  stop: n >= #n
A[m, p] = {last}
AV[f, p] = A[m, p] * V[f, m]
"""

NOT_SEPARABLE = {
    "clipped-softmax": HEADER
    + "inputs zeta, gamma\n"
    + SCORES
    + STABLE
    + """
A[m, p] = clip((zeta - gamma) * SN[m, p] / SD[p] + gamma, 0.0, 1.0)
AV[f, p] = A[m, p] * V[f, m]
""",
    "sparsemax": HEADER
    + "rank n = 16\n"
    + SCORES
    + _NEWTON.format(
        scale="1.0",
        value="relu(X[m, p] - TAU[n, p])",
        slope="where(X[m, p] > TAU[n, p], 1.0, 0.0)",
        last="relu(X[m, p] - TAU[#n, p])",
    ),
    # For 1 < alpha <= 2: A = relu((alpha - 1) QK - TAU) ** (1 / (alpha - 1)).
    "entmax": HEADER
    + "rank n = 24\ninput alpha\n"
    + SCORES
    + _NEWTON.format(
        scale="(alpha - 1.0)",
        value="relu(X[m, p] - TAU[n, p]) ** (1.0 / (alpha - 1.0))",
        slope="where(X[m, p] > TAU[n, p], relu(X[m, p] - TAU[n, p]) ** (1.0 / (alpha - 1.0) - 1.0)"
        " / (alpha - 1.0), 0.0)",
        last="relu(X[m, p] - TAU[#n, p]) ** (1.0 / (alpha - 1.0))",
    ),
}

_FEATURES = "where({x} > 0, {x} + 1.0, exp({x}))"  # elu + 1

LINEAR = {
    "linear-attention": HEADER
    + f"""
QF[e, p] = {_FEATURES.format(x="Q[e, p]")}
KF[e, m] = {_FEATURES.format(x="K[e, m]")}
KV[e, f] = KF[e, m] * V[f, m]
KZ[e] = KF[e, m]
QKV[f, p] = QF[e, p] * KV[e, f]
QKZ[p] = QF[e, p] * KZ[e]
AV[f, p] = QKV[f, p] / QKZ[p]
""",
    # Queries and keys are the same positions m.
    "linear-attention-causal": f"""
ranks m, e, f
inputs Q[e, m], K[e, m], V[f, m]
loop m:
  init:
    KV[e, f, 0] = 0.0
    KZ[e, 0] = 0.0
  body:
    QF[e, m] = {_FEATURES.format(x="Q[e, m]")}
    KF[e, m] = {_FEATURES.format(x="K[e, m]")}
    KV[e, f, m + 1] = KV[e, f, m] + KF[e, m] * V[f, m]
    KZ[e, m + 1] = KZ[e, m] + KF[e, m]
    QKV[f, m] = QF[e, m] * KV[e, f, m + 1]
    QKZ[m] = QF[e, m] * KZ[e, m + 1]
    AV[f, m] = QKV[f, m] / QKZ[m]
  stop: m >= #m
""",
}

ORDERED = {
    # A[m] is the share b[m] of the stick that the later keys j <= p left over.
    "stick-breaking": HEADER
    + "rank j\n"
    + SCORES
    + """
tensor REST[m, p] default 1.0
B[m, p] = sigmoid(QK[m, p])
REST[m, p] = 1.0 - B[j, p] :: reduce_j mul where (j > m) & (j <= p)
A[m, p] = B[m, p] * REST[m, p] where m <= p
AV[f, p] = A[m, p] * V[f, m] where m <= p
""",
    # The same, carrying the logarithm of the rest: log(1 - sigmoid(x)) = -softplus(x).
    "stick-breaking-1pass": HEADER
    + """
loop m descending:
  init:
    LOG[#m, p] = 0.0
    RAV[f, #m, p] = 0.0
  body:
    QK[m, p] = Q[e, p] * K[e, m]
    A[m, p] = sigmoid(QK[m, p]) * exp(LOG[m + 1, p]) where m <= p
    LOG[m, p] = LOG[m + 1, p] - where(m <= p, softplus(QK[m, p]), 0.0)
    RAV[f, m, p] = RAV[f, m + 1, p] + A[m, p] * V[f, m]
  stop: m < 0
AV[f, p] = RAV[f, 0, p]
""",
}

OVER_QUERIES = """
tensor CM[m] default -inf
CM[m] = QK[m, p] :: reduce_p max
SN[m, p] = exp(QK[m, p] - CM[m])
CD[m] = SN[m, p]
A[m, p] = SN[m, p] / CD[m]
"""

TRANSPOSED = {
    "softmax-over-queries": HEADER + SCORES + OVER_QUERIES + PRODUCT_WITH_V,
    # Slot attention: the weights of each query are normalised over the keys afterwards.
    "slot-attention": HEADER
    + SCORES
    + OVER_QUERIES
    + """
W[p] = A[m, p]
UV[f, p] = A[m, p] * V[f, m]
AV[f, p] = UV[f, p] / W[p]
""",
}

QUANTISED = {
    # SN <= 1, so a fixed scale of 1/127 is pointwise in the score.
    "quantised-p": HEADER
    + SCORES
    + STABLE
    + """
SQ[m, p] = cast_i8(round(SN[m, p] * 127.0))
SNV[f, p] = SQ[m, p] * V[f, m]
AV[f, p] = SNV[f, p] / (127.0 * SD[p])
""",
    # The scale of a row is its largest probability: not separable.
    "quantised-p-row-scale": HEADER
    + SCORES
    + STABLE
    + """
tensor PM[p] default -inf
A[m, p] = SN[m, p] / SD[p]
PM[p] = A[m, p] :: reduce_m max
PQ[m, p] = cast_i8(round(A[m, p] * 127.0 / PM[p]))
PQV[f, p] = PQ[m, p] * V[f, m]
AV[f, p] = PQV[f, p] * PM[p] / 127.0
""",
    # Integer operands with their scales: per token for Q and K, per channel for V.
    "quantised-qkv": """
ranks p, m, e, f
input Q[e, p] dtype i8 scale QS
input K[e, m] dtype i8 scale KS
input V[f, m] dtype i8 scale VS
inputs QS[p], KS[m], VS[f]
tensor DOT[m, p] dtype i32
DOT[m, p] = Q[e, p] * K[e, m]
QK[m, p] = DOT[m, p] * QS[p] * KS[m]
"""
    + STABLE
    + """
A[m, p] = SN[m, p] / SD[p]
AV[f, p] = A[m, p] * V[f, m] * VS[f]
""",
}

EXTRA_OUTPUTS = {
    "attention-weights": HEADER + "outputs AV, A\n" + SCORES + STABLE + NORMALISED,
    "log-probabilities": HEADER + SCORES + STABLE + "LP[m, p] = QK[m, p] - GM[p] - log(SD[p])\n",
    "lse": HEADER
    + "outputs AV, LSE\n"
    + SCORES
    + STABLE
    + NORMALISED
    + "LSE[p] = GM[p] + log(SD[p])\n",
    # Partial results of s shares of the keys become one.
    "lse-merge": """
ranks s, p, f
inputs O[s, f, p], L[s, p]
outputs AV, LSE
tensor GM[p] default -inf
GM[p] = L[s, p] :: reduce_s max
W[s, p] = exp(L[s, p] - GM[p])
SD[p] = W[s, p]
OW[f, p] = W[s, p] * O[s, f, p]
AV[f, p] = OW[f, p] / SD[p]
LSE[p] = GM[p] + log(SD[p])
""",
}

TEXTS: dict[str, str] = {
    **MASKS,
    **SCORE_EDITS,
    **DENOMINATORS,
    **POINTWISE,
    **NUMERATORS,
    **NOT_SEPARABLE,
    **LINEAR,
    **ORDERED,
    **TRANSPOSED,
    **QUANTISED,
    **EXTRA_OUTPUTS,
}
