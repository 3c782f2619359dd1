"""A program as ONNX by torch's exporter, with a marker per attention, and the graph cleaned."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from attn_rewrite.errors import LowerError
from attn_rewrite.site import Refusal

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch.export import ExportedProgram

IR_VERSION = 10


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """torch's exporter and the version converter chat through logging and warnings."""
    loggers = [
        logging.getLogger(n) for n in ("torch.onnx", "onnxscript", "onnx_ir", "onnx_ir.passes")
    ]
    levels = [log.level for log in loggers]
    for log in loggers:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)


def translate(program: ExportedProgram, opset: int) -> ir.Model:
    """The program as ONNX, with a marker node per attention and no optimisation yet."""
    import torch

    from attn_rewrite.backends.onnx.markers import translations

    try:
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            optimize=False,
            verbose=False,
            custom_translation_table=translations(),
        )
    except torch.onnx.errors.OnnxExporterError as error:
        cause = _deepest(error)
        if isinstance(cause, LowerError):
            raise cause from None
        raise LowerError(
            f"ONNX: torch's exporter cannot translate the model: {cause}; "
            "rewrite that operator in the model or export with the torch backend.",
            [Refusal("onnx-translation", str(cause))],
        ) from error
    assert exported is not None
    assert exported.exported_program is not None
    _refuse_mutation(exported.exported_program)
    return exported.model


def _deepest(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _refuse_mutation(program: ExportedProgram) -> None:
    """ONNX has no state: a program that writes to a buffer or an input would lose the write.

    Only the functional form of a program (as torch's exporter makes it) lists its writes.
    """
    signature = program.graph_signature
    written = {**signature.buffers_to_mutate, **signature.user_inputs_to_mutate}
    if written:
        names = ", ".join(sorted(set(written.values())))
        reason = f"the model writes to {names}, and an ONNX graph keeps no state between calls"
        raise LowerError(
            f"ONNX: {reason}; export in eval mode, or make the state an input and an output.",
            [Refusal("onnx-mutation", reason)],
        )


def finish(model: ir.Model, opset: int) -> None:
    """Fold and clean the graph; names, opsets and the IR version of the file."""
    import onnx_ir.passes.common as common
    import onnxscript.optimizer

    model.ir_version = IR_VERSION
    model.opset_imports[""] = opset
    for function in model.functions.values():
        function.opset_imports[""] = opset
    if opset < 23:
        onnxscript.optimizer.optimize_ir(model, inline=False)
    else:
        # From 23 on the optimiser fuses RotaryEmbedding with tables of batch 1, which ONNX Runtime
        # refuses at any other batch.
        common.RemoveUnusedNodesPass()(model)
        common.RemoveUnusedFunctionsPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    _drop_traces(model)


def _drop_traces(model: ir.Model) -> None:
    """Remove torch's stack traces: they are most of a small file and name the user's folders."""
    import onnx_ir as ir

    owners: list[Any] = [model.graph, *model.graph.inputs, *model.graph.initializers.values()]
    for owner in (model.graph, *model.functions.values()):
        for node in ir.traversal.RecursiveGraphIterator(owner):
            owners += [node, *node.outputs]
    for held in owners:
        for key in [k for k in held.metadata_props if k.startswith("pkg.")]:
            del held.metadata_props[key]
