"""A program for torch's ONNX exporter, whose decompositions give attention other strides."""

from __future__ import annotations

import copy

import torch
from torch.export import ExportedProgram

_SDPA = torch.ops.aten.scaled_dot_product_attention.default


def _takes(user: torch.fx.Node, clone: torch.fx.Node) -> bool:
    """Whether ``user`` gets the clone: results keep their names, and nothing reshapes them."""
    return user is not clone and user.op != "output"


def contiguous_attention(program: ExportedProgram) -> ExportedProgram:
    """``program`` with every attention output made contiguous; the same object without any.

    The exporter traces a program twice.  The second time an attention output has other strides, and
    a ``reshape`` that the first trace turned into a ``view`` fails on them.  A clone in between
    gives both traces the same strides; in ONNX it is nothing.  Weights are shared.
    """
    if not any(node.target is _SDPA for node in program.graph.nodes):
        return program
    graph = copy.deepcopy(program.graph)
    for node in list(graph.nodes):
        if node.target is not _SDPA:
            continue
        value = node.meta["val"]
        with graph.inserting_after(node):
            clone = graph.call_function(
                torch.ops.aten.clone.default,
                (node,),
                {"memory_format": torch.contiguous_format},
            )
        clone.meta = dict(node.meta)
        with value.fake_mode:
            clone.meta["val"] = torch.empty_like(value, memory_format=torch.contiguous_format)
        node.replace_all_uses_with(
            clone, delete_user_cb=lambda user, made=clone: _takes(user, made)
        )
    return with_graph(program, graph)


def with_graph(program: ExportedProgram, graph: torch.fx.Graph) -> ExportedProgram:
    """``program`` running ``graph``, an edited copy of its own; weights are shared."""
    module = copy.copy(program.graph_module)
    module.graph = graph
    return ExportedProgram(
        root=module,
        graph=graph,
        graph_signature=program.graph_signature,
        state_dict=program.state_dict,
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=program.verifiers,
    )
