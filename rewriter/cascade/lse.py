"""The log-sum-exp of the scores of every row, as one more Einsum of a softmax attention.

``LSE[b, h, q] = GM[b, h, q] + log(SD[b, h, q])``: over the kept keys only, the logit of a sink
included; -inf for a row that keeps no key.  Two attentions over different keys can be merged with
it, which is what callers use it for, so it is defined where the output is a weighted mean with
those weights and nowhere else.
"""

from __future__ import annotations

from dataclasses import replace

from attn_rewrite.cascade.attention import as_softmax
from attn_rewrite.cascade.expr import Read, call
from attn_rewrite.cascade.ir import Cascade, Einsum
from attn_rewrite.cascade.reordered import in_order
from attn_rewrite.cascade.staged import as_staged

LSE = "LSE"
# What only the output needs.
_OUTPUT_ONLY = ("A", "AV")


def with_lse(cascade: Cascade) -> Cascade:
    """A softmax attention that also gives `LSE`, [b, h, q]; the same object for another cascade."""
    if LSE in cascade.outputs or as_softmax(cascade) is None:
        return cascade
    return replace(
        cascade, body=(*cascade.body, _lse(cascade)), outputs=(*cascade.outputs, LSE)
    )  # fmt: skip


def lse_alone(cascade: Cascade) -> Cascade:
    """What `LSE` is computed from, and nothing else.

    ``cascade`` is a softmax attention, perhaps with stages; its inputs stay what they are.
    """
    body = tuple(
        s for s in cascade.body if not isinstance(s, Einsum) or s.out.tensor not in _OUTPUT_ONLY
    )
    return replace(cascade, body=(*body, _lse(cascade)), outputs=(LSE,))


def _lse(cascade: Cascade) -> Einsum:
    top, total = cascade.producer("GM"), cascade.producer("SD")
    assert top is not None
    assert total is not None
    return Einsum(Read(LSE, top.out.index), top.out + call("log", total.out))


def why_no_lse(cascade: Cascade) -> str | None:
    """Why the log-sum-exp means nothing for the output of ``cascade``; None where it does."""
    staged = as_staged(in_order(cascade))
    if staged is None:
        return "what it becomes is no softmax over scores, which a log-sum-exp belongs to"
    if staged.probability is not None:
        return (
            "its probabilities are mapped after the softmax, so its output is no mean with the "
            "weights that a log-sum-exp stands for, and must not be merged by it"
        )
    return None
