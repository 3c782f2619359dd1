"""Near misses that have no softmax: quotients that normalise, and are not a softmax over one axis.

`canonicalize` has turned every known spelling into a softmax; an exponential that is still divided
by a sum, or a score product divided by a sum of itself, is an attention map of another kind.  It
gives a refusal that says what was found, so that nothing is skipped silently.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from attn_rewrite.graph import (
    arguments,
    inverted,
    is_call,
    is_tensor,
    live_users,
    op_name,
    shape_of,
    through,
)
from attn_rewrite.passes.find.anchor import refuse
from attn_rewrite.passes.find.product import product_of
from attn_rewrite.site import Refusal

_STEPS = 12
_SAME = ("to", "clone", "contiguous", "detach", "alias", "expand", "unsqueeze", "view", "reshape")
_TURNED = ("transpose", "permute", "mT", "t", "swapaxes")
_BOUNDED = (
    *_SAME, "add", "sub", "mul", "div", "clamp", "clamp_min", "maximum", "squeeze", "sqrt", "pow",
    "square", "abs", "neg", "slice", "select", "getitem", *_TURNED,
)  # fmt: skip
_TOTALS = (
    "sum", "mean", "matmul", "bmm", "mm", "mv", "einsum", "linalg_vector_norm", "norm", "amax",
    "max", "amin", "min", "prod", "cumsum", "median", "logsumexp",
)  # fmt: skip
_EXPONENTIALS = ("exp", "exp_", "expm1")
_MASKED = (*_SAME, "mul", "masked_fill", "where", "add", "dropout", "square", "pow")


def near_miss(node: fx.Node) -> Refusal | None:
    """Why a quotient that normalises an exponential, or a map of scores, is no softmax; None for
    every other node."""
    if op_name(node) in _LOGARITHMS:
        return _in_logarithms(node)
    top, bottom = _quotient(node)
    total = _behind(bottom, _BOUNDED, _TOTALS)
    if total is None:
        return None
    summed = _summed(total)
    exponential = _behind(summed, _MASKED, _EXPONENTIALS)
    if exponential is not None:
        return refuse(
            "exponential-quotient", _sentence(top, total, exponential, _changed(bottom)), node
        )
    if through(top, *_SAME) is through(summed, *_SAME) and _is_score(summed):
        kernel = op_name(through(summed, *_SAME)) or "product"
        reason = f"scores are normalised by their sum without an exponential (after {kernel})"
        return refuse("normalised-without-exponential", reason, node)
    return None


_LOGARITHMS = ("exp", "exp_", "log_softmax", "_log_softmax")


def _in_logarithms(node: fx.Node) -> Refusal | None:
    """Scores normalised by a logarithm of their sum that is no softmax: its multiple, or left as it
    is."""
    inner: Any = node.args[0]
    if op_name(node) in ("exp", "exp_"):
        if not is_call(inner, "sub", "sub_") or not is_tensor(inner.args[1]):
            return None
        norm = _behind(inner.args[1], _BOUNDED, ("logsumexp",))
        if norm is None or not _is_score(inner.args[0]):
            return None
        reason = (
            "the exponent is a score less something that is made of a logsumexp and is not that of "
            "the score over one axis: the weights do not sum to 1"
        )
        return refuse("exponential-quotient", reason, node)
    read = live_users(node)
    if not read or not _is_score(inner):
        return None
    reason = (
        "the logarithms of the probabilities of a score are used, not their exponentials: this is "
        "no softmax attention"
    )
    return refuse("log-probabilities", reason, node)


def _quotient(node: fx.Node) -> tuple[Any, Any]:
    """(numerator, denominator) of a division of tensors or a product with a reciprocal."""
    if is_call(node, "div", "div_") and all(is_tensor(a) for a in node.args[:2]):
        return node.args[0], node.args[1]
    if is_call(node, "mul", "mul_"):
        for top, factor in (node.args[:2], node.args[1::-1]):
            if is_tensor(factor) and (bottom := inverted(factor)) is not None:
                return top, bottom
    return None, None


def _behind(node: Any, passing: tuple[str, ...], wanted: tuple[str, ...]) -> fx.Node | None:
    """The nearest operator of ``wanted`` behind ``node``, through operators of ``passing``."""
    queue = [node]
    for _ in range(_STEPS):
        if not queue:
            return None
        here = queue.pop(0)
        if is_call(here, *wanted):
            return here  # type: ignore[no-any-return]
        if is_call(here, *passing):
            queue += [a for a in here.args if isinstance(a, fx.Node)]
    return None


def _changed(bottom: Any) -> str | None:
    """The operator that makes a denominator something else than a sum, perhaps bounded."""
    bottom = through(bottom, *_SAME, *_TURNED)
    return op_name(bottom) if is_call(bottom, "sqrt", "pow", "square", "mul", "div") else None


def _summed(total: fx.Node) -> Any:
    """The tensor that is summed: the argument, or the left operand of a product."""
    return arguments(total)["tensors"][0] if is_call(total, "einsum") else total.args[0]


def _is_score(node: Any) -> bool:
    """True if a product of two activations is near behind ``node``."""
    for _ in range(_STEPS):
        if not is_tensor(node):
            return False
        if op_name(node) not in _TOTALS[:2] and product_of(node) is not None:
            return True
        node = next((a for a in node.args if is_tensor(a)), None)
    return False


def _sentence(top: Any, total: fx.Node, exponential: fx.Node, changed: str | None) -> str:
    """What stands in the way of calling the quotient a softmax."""
    head = "an exponential is divided by"
    if _behind(top, (*_MASKED, *_TOTALS, *_TURNED), _EXPONENTIALS) is None:
        return f"a tensor is divided by the {op_name(total)} of an exponential it is not made of"
    if not is_call(total, "sum"):
        return f"{head} its {op_name(total)}; write it as a sum over the normalised axis"
    if changed is not None:
        return f"{head} the {changed} of its sum; the weights do not sum to 1"
    dims = arguments(total).get("dim")
    count = len(shape_of(exponential)) if dims is None else len(list(_listed(dims)))
    if count != 1:
        return f"{head} a sum over {count} axes; a softmax of attention has one axis of keys"
    return f"{head} something that is not its own sum over the axis that the product contracts"


def _listed(dims: Any) -> list[int]:
    return [dims] if isinstance(dims, int) else list(dims)
