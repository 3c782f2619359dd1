"""Gates of a policy in the host graph: new parameters behind an attention (`gated`)."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from attn_rewrite.errors import PolicyError
from attn_rewrite.graph import GraphBuilder, arrange, aten
from attn_rewrite.passes.quantize.gate_input import gate_input
from attn_rewrite.passes.quantize.gated import Gated
from attn_rewrite.site import Operand, Site

if TYPE_CHECKING:
    from attn_rewrite.plan import Step
    from attn_rewrite.policy import Policy

PREFIX = "attn_rewrite_gate_"


@dataclass(frozen=True)
class Gate:
    """One `gated` of a Site, and the query heads that it is for."""

    transform: Gated
    heads: tuple[int, ...]


def gates_of(site: Site, steps: Iterable[Step]) -> tuple[Gate, ...]:
    """The gates of the steps of a Site: heads that ask for equal gates share one."""
    heads: dict[Gated, set[int]] = {}
    for step in steps:
        for transform in step.transforms:
            if isinstance(transform, Gated):
                mine = range(site.hq) if step.heads is None else step.heads
                heads.setdefault(transform, set()).update(mine)
    return tuple(Gate(t, tuple(sorted(h))) for t, h in heads.items())


def refuse_gates(policy: Policy) -> None:
    """`PolicyError` where a policy adds parameters that nobody could train or save."""
    if any(isinstance(t, Gated) for rule in policy.rules for t in rule.apply):
        raise PolicyError(
            "gated adds parameters, and a graph captured just in time has no place for them: give "
            "optimize() example inputs"
        )


def parameters_of(site: Site, gate: Gate, channels: int, like: Tensor) -> dict[str, Tensor]:
    """What a gate begins with, by name.

    Weights are 0 and the last bias is logit(pi); the hidden layer of ``mlp`` is drawn, with a seed
    of its own, since zeros on both sides of a product never learn.
    """
    made, heads = gate.transform, site.hq
    part = channels if made.kind == "all" else channels // heads
    bias = torch.full((heads,), math.log(made.pi / (1 - made.pi)))
    if made.kind != "mlp":
        start = {"weight": torch.zeros(heads, part), "bias": bias}
    else:
        hidden = max(part // 4, 1)
        seed = torch.Generator().manual_seed(zlib.crc32(site.name.encode()))
        drawn = torch.rand(heads, part, hidden, generator=seed) * 2 - 1
        start = {
            "hidden_weight": drawn / math.sqrt(part), "hidden_bias": torch.zeros(heads, hidden),
            "weight": torch.zeros(heads, hidden), "bias": bias,
        }  # fmt: skip
    kind = like.dtype if like.dtype.is_floating_point else torch.float32
    return {n: t.to(like.device, kind) for n, t in start.items()}


def emit_gates(
    build: GraphBuilder, site: Site, gates: Sequence[Gate], module: fx.GraphModule, value: Any,
    local: Callable[[fx.Node], fx.Node], sizes: Mapping[int, Any],
) -> Any:  # fmt: skip
    """``value`` [b, h, q, f] times the gates of its heads; their parameters go into ``module``."""
    found = gate_input(site)
    assert not isinstance(found, str), found  # `Gated.admits` has asked
    x = local(found.node)
    for number, gate in enumerate(gates):
        stem = PREFIX + re.sub(r"\W", "_", site.name) + (f"_{number}" if number else "")
        start = parameters_of(site, gate, found.channels, x.meta["val"])
        held = {n: _parameter(build, module, f"{stem}_{n}", t) for n, t in start.items()}
        gated = _logits(build, gate.transform.kind, x, held, (site.hq, found.channels))
        gated = build.call(aten.sigmoid.default, gated)
        if gate.transform.identity:
            gated = build.call(aten.mul.Tensor, gated, 1 / gate.transform.pi)
        if len(gate.heads) < site.hq:
            gated = _only(build, module, stem, gate.heads, gated)
        laid_out = Operand(found.node, (*found.dims, site.groups("AV")[1]))
        gated = arrange(build, laid_out, gated, site.groups("AV")[:3], sizes)
        gated = build.call(aten.unsqueeze.default, gated, -1)
        kind = value.meta["val"].dtype
        if gated.meta["val"].dtype != kind:
            gated = build.call(aten.to.dtype, gated, kind)
        value = build.call(aten.mul.Tensor, value, gated)
    return value


def _logits(
    build: GraphBuilder, kind: str, x: Any, held: Mapping[str, Any], sizes: tuple[int, int]
) -> Any:
    """[..., heads] from the activation [..., channels]."""
    if kind == "all":
        return build.call(aten.linear.default, x, held["weight"], held["bias"])
    heads, channels = sizes
    last = x.meta["val"].dim() - 1
    parts = build.call(aten.unflatten.int, x, last, [heads, channels // heads])
    if kind == "mlp":
        one = build.call(aten.unsqueeze.default, parts, -2)
        hidden = build.call(aten.matmul.default, one, held["hidden_weight"])
        hidden = build.call(aten.squeeze.dim, hidden, -2)
        hidden = build.call(aten.add.Tensor, hidden, held["hidden_bias"])
        parts = build.call(aten.relu.default, hidden)
    weighted = build.call(aten.mul.Tensor, parts, held["weight"])
    total = build.call(aten.sum.dim_IntList, weighted, [-1])
    return build.call(aten.add.Tensor, total, held["bias"])


def _only(
    build: GraphBuilder, module: fx.GraphModule, stem: str, heads: tuple[int, ...], gated: Any
) -> Any:
    """1 for every other head."""
    mine = torch.zeros(gated.meta["val"].shape[-1], dtype=torch.bool)
    mine[list(heads)] = True
    name = f"{stem}_heads"
    module.register_buffer(name, mine.to(gated.meta["val"].device), persistent=False)
    return build.call(aten.where.ScalarOther, _attribute(build, module, name), gated, 1.0)


def _parameter(build: GraphBuilder, module: fx.GraphModule, name: str, start: Tensor) -> fx.Node:
    module.register_parameter(name, nn.Parameter(start))
    return _attribute(build, module, name)


def _attribute(build: GraphBuilder, module: fx.GraphModule, name: str) -> fx.Node:
    assert build.point is not None
    with build.graph.inserting_before(build.point):
        node = build.graph.get_attr(name)
    held = getattr(module, name)
    mode = build.fake_mode
    node.meta["val"] = held if mode is None else mode.from_tensor(held)
    return node


def carry_gates(old: nn.Module, new: nn.Module) -> None:
    """What the gates of ``old`` have learned, into those of ``new``, a rewriting of the same model.

    Raises `PolicyError` where ``new`` lacks one.
    """
    into = dict(named_gates(new))
    for name, gate in named_gates(old):
        if name not in into:
            raise PolicyError(f"the gate {name} has no place in the model that was captured again")
        with torch.no_grad():
            into[name].copy_(gate)


def named_gates(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that `gated` added, by name."""
    found = module.named_parameters()
    return ((n, p) for n, p in found if n.rpartition(".")[2].startswith(PREFIX))
