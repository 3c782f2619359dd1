"""Retrace what Dynamo captured to the project's dialect: pre-dispatch ATen, one graph.

Module paths, source lines and fake values (with symbolic sizes) survive; placeholders that are
parameters are marked, so that a projection is not taken for a product of two activations.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch.fx import traceback as fx_traceback
from torch.fx.experimental.proxy_tensor import make_fx

from attn_rewrite.called import called_by, mark_parameters
from attn_rewrite.graph import PARAMETER


def retrace(module: fx.GraphModule, inputs: list[Any]) -> fx.GraphModule:
    """``module`` traced again on the fake values of its placeholders.

    ``inputs`` are the example inputs Dynamo hands to a backend, in placeholder order.
    """
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    fakes = [
        n.meta.get("example_value", value) for n, value in zip(placeholders, inputs, strict=True)
    ]
    mode = detect_fake_mode(fakes)

    def run(*args: Any) -> Any:
        with fx_traceback.preserve_node_meta():
            return fx.Interpreter(module).run(*args)

    symbolic: Literal["symbolic", "fake"] = "fake"
    if mode is not None and mode.shape_env is not None:
        symbolic = "symbolic"
    with torch.set_grad_enabled(torch.is_grad_enabled()), _checkpoints_traceable(module):
        traced = make_fx(
            run, tracing_mode=symbolic, pre_dispatch=True, _allow_non_fake_inputs=True
        )(*fakes)
    assert isinstance(traced, fx.GraphModule)
    fresh = [n for n in traced.graph.nodes if n.op == "placeholder"]
    for old, new, value in zip(placeholders, fresh, inputs, strict=True):
        new.meta[PARAMETER] = isinstance(value, torch.nn.Parameter) or _named_parameter(old)
    _finish(traced)
    return traced


def _finish(traced: fx.GraphModule) -> None:
    """Values and parameters of every node, in the graphs that are called as well."""
    if traced.meta.get(_CONTEXT) is _recompute:
        del traced.meta[_CONTEXT]
    for node in traced.graph.nodes:
        node.meta.setdefault("val", node.meta.get("example_value"))
        for called, _ in called_by(node):
            _finish(called)
    mark_parameters(traced)


# Where PyTorch keeps what a checkpointed graph recomputes; without it everything.
_CONTEXT = "_checkpoint_context_fn"


def _recompute() -> Any:
    """What PyTorch takes where the caller of ``checkpoint`` said nothing: recompute everything."""
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def always(*_: Any, **__: Any) -> CheckpointPolicy:
        return CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(always)  # type: ignore[no-untyped-call]


@contextmanager
def _checkpoints_traceable(module: fx.GraphModule) -> Iterator[None]:
    """Tracing a checkpointed graph again reads what it recomputes: it is said meanwhile."""
    silent = [
        m for m in module.modules() if isinstance(m, fx.GraphModule) and _CONTEXT not in m.meta
    ]
    for inner in silent:
        inner.meta[_CONTEXT] = _recompute
    try:
        yield
    finally:
        for inner in silent:
            del inner.meta[_CONTEXT]


def is_flex(node: fx.Node) -> bool:
    """True for a call of ``flex_attention``."""
    return node.op == "call_function" and getattr(node.target, "__name__", "") == "flex_attention"


def without_blocks(module: fx.GraphModule) -> fx.GraphModule:
    """``module`` with the block lists of ``flex_attention`` left out, for tracing only.

    They say again where the mask function is empty, and how they are made (in-place writes inside
    `torch.vmap`) cannot be traced a second time.  The same object without such a call.
    """
    if not any(map(is_flex, module.graph.nodes)):
        return module
    graph = fx.Graph()
    output = graph.output(graph.graph_copy(module.graph, {}))
    output.meta = dict(next(n for n in reversed(module.graph.nodes) if n.op == "output").meta)
    copy = fx.GraphModule(module, graph)
    for node in filter(is_flex, copy.graph.nodes):
        *lists, mask = node.args[4]
        kept = tuple(None if isinstance(x, fx.Node) else x for x in lists)
        node.args = (*node.args[:4], (*kept, mask), *node.args[5:])
    copy.graph.eliminate_dead_code(lambda n: n.op in ("placeholder", "output"))
    copy.recompile()
    return copy


def _named_parameter(node: fx.Node) -> bool:
    source = node.meta.get("tensor_dict") or {}
    name = str(getattr(node, "_dynamo_source", "") or node.target)
    return "_parameters" in name or bool(source.get("_is_param"))
