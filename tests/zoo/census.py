"""Count the attention of a model by running it, independently of the finder.

A `TorchDispatchMode` marks tensors while the model runs eagerly.  The product of two activations is
marked as *scores*; elementwise operators and views hand the mark on; a softmax of marked scores
makes
*probabilities*; a product of probabilities with another activation completes one attention.  The
fused operators that PyTorch dispatches ``scaled_dot_product_attention`` and
``nn.MultiheadAttention`` to, and FlexAttention, count one each.  A softmax over a sequence that no product precedes, but that is contracted with another
activation, is counted apart (``factorised``: attention without a score product, or a router).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch._higher_order_ops.flex_attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

_FUSED = (
    "_scaled_dot_product_", "_native_multi_head_attention", "_transformer_encoder_layer_fwd",
)  # fmt: skip
_PRODUCTS = frozenset(
    {"bmm", "mm", "baddbmm", "addmm", "mv", "dot", "matmul", "linear", "baddbmm_"}
)
_SOFTMAX = frozenset({"_softmax", "_safe_softmax", "softmax"})
# ``exp(x - logsumexp(x))`` and ``exp(log_softmax(x))`` are a softmax.
_LOGARITHM = frozenset({"logsumexp", "_log_softmax", "log_softmax"})
# What makes something new of its input: marks end here.
_ENDS = frozenset(
    "convolution native_layer_norm native_group_norm native_batch_norm embedding argmax topk sort "
    "_fft_r2c cumsum upsample_bilinear2d max_pool2d_with_indices _adaptive_avg_pool2d mean "
    "rsqrt".split()
)


@dataclass
class Mark:
    """What is known of a tensor: from parameters only, a score product, its logarithm of a softmax
    or of the normaliser of one, or whose probabilities."""

    weight: bool = False
    scores: bool = False
    log: bool = False
    softmax: frozenset[int] = frozenset()


@dataclass
class Census(TorchDispatchMode):
    """``attentions`` completed in softmax calls that a product precedes; ``factorised`` the
    others."""

    model: torch.nn.Module
    marks: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)
    preceded: dict[int, bool] = field(default_factory=dict)
    size: dict[int, int] = field(default_factory=dict)
    done: set[int] = field(default_factory=set)
    fused: int = 0

    def __post_init__(self) -> None:
        super().__init__()
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            self.marks[tensor] = Mark(weight=True)

    @property
    def attentions(self) -> int:
        """Fused calls, and softmax calls between two products of activations."""
        return self.fused + sum(self.preceded[i] for i in self.done)

    @property
    def factorised(self) -> int:
        """Softmax calls contracted with an activation that no score product precedes."""
        return sum(not self.preceded[i] for i in self.done)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        inputs = [t for t in tree_leaves((args, kwargs or {})) if isinstance(t, torch.Tensor)]
        mark = self._mark(name, inputs)
        for out in tree_leaves(result):
            if isinstance(out, torch.Tensor):
                self.marks[out] = self._within(mark, out)
        return result

    def _within(self, mark: Mark, out: torch.Tensor) -> Mark:
        """Probabilities that were multiplied into something larger are probabilities no longer."""
        kept = frozenset(i for i in mark.softmax if out.numel() <= self.size[i])
        return Mark(mark.weight, mark.scores, mark.log, kept) if kept != mark.softmax else mark

    def _mark(self, name: str, inputs: list[torch.Tensor]) -> Mark:
        known = [self.marks.get(t, Mark()) for t in inputs]
        if name.startswith(_FUSED):
            self.fused += 1
            return Mark()
        if name in _PRODUCTS:
            return self._product(known[-2:] if len(known) > 1 else known)
        if name == "convolution" and all(size == 1 for size in inputs[1].shape[2:]):
            return self._product(known[:2])
        if name in _ENDS:
            return Mark()
        weight = bool(known) and all(m.weight for m in known)
        scores = any(m.scores for m in known)
        before = frozenset().union(*(m.softmax for m in known))
        log = any(m.log for m in known)
        if name in _LOGARITHM and scores:
            return Mark(scores=True, log=True)
        if (name in _SOFTMAX or (name == "exp" and log and scores)) and not weight:
            number = len(self.preceded)
            self.preceded[number], self.size[number] = scores, max(t.numel() for t in inputs)
            return Mark(softmax=frozenset({number}))
        return Mark(weight, scores and not before, log, before)

    def _product(self, known: list[Mark]) -> Mark:
        if any(m.weight for m in known):
            # A parameter mixes heads (talking heads) or is a projection: scores stay scores.  A
            # projected parameter is an activation: learned queries.
            return next((m for m in known if not m.weight), Mark())
        # Probabilities meet an activation on the other side.  A mark on both sides came with the
        # hidden states (a router's weights, say), from which both queries and keys are made.
        first, second = (m.softmax for m in (known * 2)[:2])
        used = first ^ second if len(known) > 1 else first
        self.done |= used
        return Mark(scores=not used)


@flex_attention.py_impl(Census)
def _flexible(mode: Census, *args: Any, **kwargs: Any) -> Any:
    """An operator with functions among its arguments, which no dispatch mode sees unasked."""
    mode.fused += 1
    return torch.compiler.disable(flex_attention)(*args, **kwargs)


def census(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Census:
    """Run ``model`` once under a `Census`."""
    counter = Census(model)
    with torch.no_grad(), counter:
        model(*args, **kwargs)
    return counter
