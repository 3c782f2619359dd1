"""A rewritten host graph as an exported program again, dynamic in the dimensions it was captured
with."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.utils import _pytree as pytree

from attn_rewrite.errors import CaptureError
from attn_rewrite.graph import copy_graph, op_name
from attn_rewrite.site_marks import CASCADE_KEY, SITE_KEY


def export_again(
    graph: fx.GraphModule, original: ExportedProgram, *, lengths: bool = True
) -> ExportedProgram:
    """Export ``graph`` with the example inputs and the dynamic dimensions of ``original``.

    ``lengths`` False leaves only the first dimension of a tensor, its batch, dynamic.  Parameters
    are shared.  Raises `CaptureError` when the rewritten graph cannot be exported.
    """
    if original.example_inputs is None:
        raise CaptureError(
            "the captured program keeps no example inputs, so it cannot be exported again"
        )
    args, kwargs = original.example_inputs
    bare, _ = copy_graph(graph)
    for node in list(bare.graph.nodes):
        if op_name(node) == "_guards_fn" or node.target == "_guards_fn":
            bare.graph.erase_node(node)  # the export below makes its own guards
        elif op_name(node) == "lift_fresh_copy":
            # The constant is a buffer by now; lifted once more it would be there twice, and a later
            # decomposition (ONNX) loses count of them.
            node.target = torch.ops.aten.clone.default
    bare.recompile()
    was_training = bare.training
    try:
        with torch.no_grad():
            program = torch.export.export(
                bare.train(was_training),
                args,
                kwargs,
                dynamic_shapes=_dynamic(original, args, kwargs, lengths),
                strict=False,
            )
            return _with_sites(_without_strides(program), bare)
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CaptureError(f"the rewritten graph cannot be exported again: {first}") from error


def _with_sites(program: ExportedProgram, graph: fx.GraphModule) -> ExportedProgram:
    """``program`` with the names and cascades that `splice` left on the nodes of ``graph``.

    torch traces the graph anew and says of every node which one it came from.
    """
    marks = {
        n.name: {key: n.meta[key] for key in (SITE_KEY, CASCADE_KEY) if key in n.meta}
        for n in graph.graph.nodes
        if SITE_KEY in n.meta
    }
    for node in program.graph.nodes:
        sources = node.meta.get("from_node") or ()
        node.meta.update(next((marks[s.name] for s in sources if s.name in marks), {}))
    return program


def _without_strides(program: ExportedProgram) -> ExportedProgram:
    """Every ``view`` as ``reshape``, which is the same where ``view`` is allowed.

    Whether it is depends on strides, and those of an attention's output are another on another
    device, or once its operator is decomposed for ONNX.
    """
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default
        elif op_name(node) == "lift_fresh_copy":  # the empty tensors that a new cache starts with
            node.target = torch.ops.aten.clone.default
    program.graph_module.recompile()
    return program


def _hint(original: ExportedProgram, size: Any) -> Any:
    """A free dimension within the range that ``original`` declares for the symbol ``size``."""
    allowed = original.range_constraints.get(size.node.expr)
    if allowed is None:  # no symbol of its own
        return Dim.AUTO
    limits = {
        name: int(end)
        for name, end in (("min", allowed.lower), ("max", allowed.upper))
        if end.is_Integer
    }
    return Dim.AUTO(**limits) if limits else Dim.AUTO


def _dynamic(original: ExportedProgram, args: Any, kwargs: Any, lengths: bool) -> Any:
    """Every dimension that is symbolic in ``original`` is dynamic again, without ``lengths`` only
    the first of a tensor."""
    leaves = pytree.tree_leaves((args, kwargs))
    names = list(original.graph_signature.user_inputs)
    values = {n.name: n.meta.get("val") for n in original.graph.nodes if n.op == "placeholder"}
    shapes = ShapesCollection()  # type: ignore[no-untyped-call]
    some = False
    for leaf, name in zip(leaves, names, strict=True):
        value = values.get(name) if isinstance(name, str) else None
        if not isinstance(leaf, torch.Tensor) or not isinstance(value, torch.Tensor):
            continue
        free = {
            i: _hint(original, size)
            for i, size in enumerate(value.shape)
            if not isinstance(size, int)
        }
        if not lengths:
            free = {i: kind for i, kind in free.items() if i == 0}
        if free:
            shapes[leaf] = free
            some = True
    return shapes if some else None
