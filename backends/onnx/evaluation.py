"""A program's graph run node by node: in float64, with values held, with near ties turned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

aten = torch.ops.aten
_SUMS = (aten.add.Scalar, aten.add.Tensor)


class Evaluation(torch.fx.Interpreter):
    """Runs a program's graph; with ``wide`` all floating-point arithmetic happens in float64.

    Weights are widened one operator at a time, so that no second copy of the model exists; every
    other value is widened where it is made, so that writes in place reach it.  ``held`` replaces
    values by node name; what they were is kept in ``seen``.  ``rounded`` keeps what every ``round``
    was given; within ``slack`` of a tie its result is the other neighbour.
    """

    def __init__(
        self,
        program: ExportedProgram,
        wide: bool,
        held: Mapping[str, Any],
        slack: Mapping[str, float],
    ) -> None:
        super().__init__(program.graph_module)
        self.wide, self.held, self.slack = wide, held, slack
        self.seen: dict[str, Any] = {}
        self.rounded: dict[str, torch.Tensor] = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        """The value of one node, or what is held in its place."""
        if str(getattr(n.target, "_opname", "")) == "mapped_attention":
            return _mapped(_Rounding(self, n.name), *self.fetch_args_kwargs_from_env(n)[0])
        value = super().run_node(n)
        if n.target is aten.round.default:
            value = self.rounds(n.name, self.fetch_args_kwargs_from_env(n)[0][0], value)
        elif n.target is aten.floor.default and _adds_half(n.args[0]):
            value = self.rounds(n.name, self.fetch_args_kwargs_from_env(n)[0][0] - 0.5, value)
        if n.name not in self.held:
            return value
        self.seen[n.name] = value
        return self.held[n.name].to(value.dtype)

    def rounds(self, name: str, given: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Note what was ``given`` to be rounded to ``value``; the value that counts."""
        self.rounded[name] = given
        return _turned(value, given, self.slack[name]) if name in self.slack else value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator, on float64 with ``wide``."""
        if not self.wide:
            return super().call_function(target, args, kwargs)
        args, kwargs = pytree.tree_map(widened, (args, kwargs))
        return pytree.tree_map(widened, super().call_function(target, args, kwargs))


def _adds_half(value: Any) -> bool:
    """Whether a node is ``x + 0.5``."""
    added = value.args[1] if isinstance(value, torch.fx.Node) and value.target in _SUMS else None
    return isinstance(added, float) and added == 0.5


class _Rounding:
    """Runs the operators of one node's cascade; every rounding among them is the evaluation's."""

    def __init__(self, evaluation: Evaluation, name: str) -> None:
        self.evaluation, self.name = evaluation, name
        self.halved: Any = None  # what the last operator gave, if that was x + 0.5

    def call(self, op: Any, *args: Any, **kwargs: Any) -> Any:
        """Run ``op``."""
        value = op(*args, **kwargs)
        up = op is aten.floor.default and args[0] is self.halved
        half = op in _SUMS and isinstance(args[1], float) and args[1] == 0.5
        self.halved = value if half else None
        if op is not aten.round.default and not up:
            return value
        self.name += "'"
        return self.evaluation.rounds(self.name, args[0] - 0.5 if up else args[0], value)


def _mapped(build: _Rounding, q: Any, k: Any, v: Any, reads: Any, text: str, _: int) -> Any:
    """An attention with mapped probabilities from its cascade: its operator hides what it rounds.

    In float64 like the operator, Einsum by Einsum.
    """
    from attn_rewrite.backends.torch.einsums import emit_cascade
    from attn_rewrite.cascade.text import parse

    cascade = parse(text)
    tensors = (t.double() if t.is_floating_point() else t for t in (q, k, v, *reads))
    named = dict(zip((t.name for t in cascade.inputs), tensors, strict=True))
    return emit_cascade(build, cascade, named)[cascade.outputs[0]].to(q.dtype)


def _turned(rounded: torch.Tensor, given: torch.Tensor, slack: float) -> torch.Tensor:
    """``rounded``, with the other neighbour where ``given`` is within ``slack`` of a tie."""
    low = given.floor()
    near = (given - low - 0.5).abs() <= slack
    return torch.where(near, 2 * low + 1 - rounded, rounded)


def widened(value: Any) -> Any:
    """A floating-point tensor or type as float64; other values as they are."""
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.double()
    if isinstance(value, torch.dtype) and value.is_floating_point:
        return torch.float64
    return value
