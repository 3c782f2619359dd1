"""How far roundings may move what a program gives: its condition, drawn in float64.

A program's own run shows the roundings that it happened to make.  Where scores reach the hundreds
a softmax is decided by few keys, the largest error is that of one near tie, and two runs that are
both right within their precision may be off by very different amounts there.  So roundings are
drawn: a sum of d products, however it is added up, is exactly the sum for operands that are off by
about u sqrt(d) of themselves (Higham and Mary 2019, "A new approach to probabilistic rounding error
analysis", theorem 3.1), and an exponential that of an argument off by u.  Operands of products, of
attention and of exponentials are moved by that much at random, and all else is computed in float64.
It reads the program alone, never a file or what a runtime made of it: a fault there widens nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from attn_rewrite.backends.onnx.evaluation import Evaluation, widened

CONTRACTIONS = ("mm", "bmm", "addmm", "baddbmm", "matmul", "linear", "einsum", "convolution")
ATTENTIONS = (
    "scaled_dot_product_attention", "tiled_attention", "tiled_attention_lse", "mapped_attention",
)  # fmt: skip
_CONVOLUTIONS = ("convolution", "conv1d", "conv2d", "conv3d")
_EXPONENTIALS = ("exp", "exp2", "softmax", "_softmax", "_safe_softmax", "log_softmax", "logsumexp")


class Perturbed(Evaluation):
    """One draw: a run in float64 whose operands are off as those of the program's types are.

    Every draw has a ``seed`` of its own, and the same one gives the same numbers.
    """

    def __init__(self, program: ExportedProgram, held: Mapping[str, Any], seed: int) -> None:
        super().__init__(program, True, held, {})
        self.drawn = torch.Generator().manual_seed(seed)

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> Any:
        """The arguments of a node; those of products, attention and exponentials moved."""
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        terms = _terms(str(getattr(n.target, "_opname", "")), args)
        if terms is None:
            return args, kwargs
        sums = itertools.chain(terms, itertools.repeat(terms[-1]))

        def moved(node: fx.Node) -> Any:
            dtype = getattr(node.meta.get("val"), "dtype", None)
            return self._moved(self.env[node], dtype, next(sums))

        return fx.node.map_arg(n.args, moved), fx.node.map_arg(n.kwargs, moved)

    def _moved(self, value: Any, dtype: torch.dtype | None, terms: int) -> Any:
        if dtype is None or not dtype.is_floating_point or not isinstance(value, torch.Tensor):
            return value
        unit = torch.finfo(dtype).eps / 2 * math.sqrt(terms)
        off = torch.randn(value.shape, generator=self.drawn, dtype=torch.float64)
        return widened(value) * (1 + unit * off.to(value.device))


def _terms(name: str, args: Any) -> tuple[int, ...] | None:
    """How many products each tensor argument is summed in, in their order, the last for all that
    follow; None for an operator that sums none."""
    if name in ATTENTIONS:
        q, k = args[:2]
        return q.shape[-1], q.shape[-1], k.shape[-2], 1
    if name in _EXPONENTIALS:
        return (1,)
    if name in _CONVOLUTIONS:
        return (args[1][0].numel(),)
    if name == "einsum":
        return (_summed(args[0], args[1]),)
    if name in CONTRACTIONS:
        first = args[1] if name in ("addmm", "baddbmm") else args[0]
        return (first.shape[-1],)
    return None


def _summed(equation: str, operands: Any) -> int:
    """The number of products in each sum of an einsum."""
    inputs, _, kept = equation.replace(" ", "").partition("->")
    sizes: dict[str, int] = {}
    for letters, operand in zip(inputs.split(","), operands, strict=True):
        if "." not in letters:
            sizes |= dict(zip(letters, operand.shape, strict=True))
    return math.prod(n for letter, n in sizes.items() if letter not in kept)
