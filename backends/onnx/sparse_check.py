"""``SparseAttention`` of a file run alone on the CPU, the caches bound by the caller.

The CPU's kernel cannot run the file: it declares no memory that past and present caches share.
Given caches that do, it computes every score and applies the lists as a mask, which shows whether
lists, offsets, scale and heads are those of the site.  It says nothing of the CUDA kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch

from attn_rewrite.backends.onnx.artifact import compare
from attn_rewrite.backends.onnx.contrib import DOMAIN
from attn_rewrite.backends.onnx.lowering import SPARSE as OPERATOR
from attn_rewrite.backends.onnx.runtime import STAGE, open_session, runtime
from attn_rewrite.backends.torch.ops import tiled_attention
from attn_rewrite.errors import ToolError

# Above this many tokens one example: the kernel holds the scores of all heads.
LONG = 2048
PAST, PRESENT = slice(3, 5), slice(1, 3)
Array = np.ndarray[Any, Any]


def check_operators(model: ir.Model, folder: Path) -> dict[str, float]:
    """The largest error of every site of ``model`` that is the operator, by function name.

    `ToolError` where one is not in float16, `VerifyError` where one is over the bound: twice the
    error of torch's tiles in the site's own type, or 4 eps of the largest value, against the same
    tiles in float64.  Files go to ``folder``.
    """
    found = {}
    for call in ir.traversal.RecursiveGraphIterator(model.graph):
        function = model.functions.get(call.op_identifier())
        if function is not None and any(n.op_type == OPERATOR for n in function):
            found[function.name] = _check(call, function, folder)
    return found


def _check(call: ir.Node, function: ir.Function, folder: Path) -> float:
    if function.inputs[0].dtype != ir.DataType.FLOAT16:
        raise ToolError(
            f"{OPERATOR} of {function.name} takes {function.inputs[0].dtype}, which ONNX Runtime's "
            "CPU provider cannot compare: export in float16, or unchecked with verify=False.",
            stage=STAGE,
        )
    given = _random(function)
    constants = [None if x is None else ir.convenience.get_const_tensor(x) for x in call.inputs[3:]]
    reads = [torch.from_numpy(np.array(t.numpy())) for t in constants if t is not None]
    text = function.metadata_props["attn_rewrite.cascade"]
    own, wide = (
        tiled_attention(*(x.to(t) for x in given), reads, text, 64).double().numpy()
        for t in (given[0].dtype, torch.float64)
    )
    eps = float(torch.finfo(given[0].dtype).eps)
    bound = max(2 * float(np.abs(own - wide).max()), 4 * eps * float(np.abs(wide).max()))
    got = run_alone(function, [x.numpy() for x in given], folder)
    return compare(function.name, {"output": got}, {"output": wide}, {"output": bound})["output"]


def _random(function: ir.Function) -> list[torch.Tensor]:
    """Queries, keys and values of the function's sizes."""
    generator, found = torch.Generator().manual_seed(0), []
    for value in function.inputs[:3]:
        assert value.shape is not None
        batch, *sizes = value.shape
        fixed = batch if isinstance(batch, int) else 1 if int(sizes[1]) > LONG else 2
        x = torch.randn(fixed, *(int(n) for n in sizes), generator=generator)
        found.append(x.half())
    return found


def run_alone(function: ir.Function, given: list[Array], folder: Path) -> Array:
    """The output of a site's ``function`` for q, k and v, its caches bound to memory of their own.

    `ToolError` where ONNX Runtime fails.
    """
    place = folder / "operator.onnx"
    names, caches = _write(function, place)
    session = open_session(place)
    ort, binding = runtime(), session.io_binding()
    binding.bind_output(names[-1])  # first, so that it is the first of the outputs
    for name, array in zip(names, given, strict=False):
        binding.bind_cpu_input(name, array)
    held = [ort.OrtValue.ortvalue_from_numpy(np.zeros_like(x)) for x in given[1:3]]
    for (past, present), value in zip(caches.items(), held, strict=True):
        binding.bind_ortvalue_input(past, value)
        binding.bind_ortvalue_output(present, value)
    try:
        session.run_with_iobinding(binding)
    except Exception as error:
        raise ToolError(
            f"ONNX Runtime failed while running {OPERATOR} of {function.name}: {error}", stage=STAGE
        ) from error
    result: Array = binding.get_outputs()[0].numpy()
    return result


def _write(function: ir.Function, place: Path) -> tuple[list[str], Mapping[str, str]]:
    """A model of the function alone: the names of q, k, v and the output, and past by present
    caches, which are inputs and outputs."""
    proto = ir.to_proto(function)
    operator = next(n for n in proto.node if n.op_type == OPERATOR)
    past, present = list(operator.input[PAST]), list(operator.output[PRESENT])
    nodes = [n for n in proto.node if not set(n.output) & set(past)]
    kind = onnx.TensorProto.FLOAT16
    inputs, outputs = [*proto.input[:3], *past], [proto.output[0], *present]
    told = [
        [onnx.helper.make_tensor_value_info(n, kind, None) for n in names]
        for names in (inputs, outputs)
    ]
    graph = onnx.helper.make_graph(nodes, function.name, *told)
    opsets = [onnx.helper.make_opsetid(o.domain, o.version) for o in proto.opset_import]
    opsets = [o for o in opsets if o.domain != DOMAIN] + [onnx.helper.make_opsetid(DOMAIN, 1)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), place)
    return [*proto.input[:3], proto.output[0]], dict(zip(past, present, strict=True))
