"""A file that gets its name once it was opened and compared, or no file at all."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from attn_rewrite.backends.onnx.lowering import SPARSE, SiteLowering
from attn_rewrite.backends.onnx.options import CPU
from attn_rewrite.errors import ToolError

if TYPE_CHECKING:
    import onnx_ir as ir

    from attn_rewrite.backends.onnx.artifact import OnnxArtifact

# Weights above this go to a file of their own: a protobuf is held in memory twice while it is
# written, and cannot exceed 2 GiB.
EXTERNAL_BYTES = 1 << 27


def said_of_check(provider: str, sites: Sequence[SiteLowering], verify: bool) -> str:
    """What `write` compares of a file for another provider than the CPU's; "" for the CPU."""
    if provider == CPU:
        return ""
    if not verify:
        return "nothing was run"
    if not any(s.form == SPARSE for s in sites):
        return "the file ran on the CPU; nothing ran on CUDA"
    return (
        f"{SPARSE} of each site ran alone on the CPU, its caches bound by the caller, and the "
        "file with standard operators in its place; the file itself did not run, nothing ran on "
        "CUDA"
    )


def write(
    model: ir.Model, draft: OnnxArtifact, verify: bool, twin: ir.Model | None = None
) -> OnnxArtifact:
    """Write beside the place, check there, and rename; the artifact with its size and errors.

    ``twin`` is the model for the CPU where that cannot run ``model`` itself (`said_of_check`).
    """
    place = draft.path
    made = [p for p in (place.parent, *place.parent.parents) if not p.exists()]
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own: that of the file may be as long as a name can be.
        with tempfile.TemporaryDirectory(prefix=".attn-rewrite-", dir=place.parent) as folder:
            return _write_into(model, draft, Path(folder), verify, twin)
    except BaseException as error:
        for parent in made:
            with contextlib.suppress(OSError):  # something else is in it by now
                parent.rmdir()
        if not isinstance(error, OSError):
            raise
        raise ToolError(f"cannot write {place}: {error.strerror or error}", stage="disk") from error


def _write_into(
    model: ir.Model, draft: OnnxArtifact, folder: Path, verify: bool, twin: ir.Model | None
) -> OnnxArtifact:
    import onnx_ir as ir

    from attn_rewrite.backends.onnx.sparse_check import check_operators

    place, temporary = draft.path, folder / draft.path.name
    weights = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value)
    external = weights > EXTERNAL_BYTES
    # An older model at this place keeps its data until the new one has taken the name: the two
    # names of the data file alternate.
    data, other = f"{place.name}.data", f"{place.name}.1.data"
    if place.with_name(data).exists():
        data, other = other, data
    ir.save(model, temporary, external_data=data if external else None)
    size = sum(f.stat().st_size for f in folder.iterdir())
    written = replace(draft, path=temporary, provider=CPU)
    errors: dict[str, float] = {}
    approximation, alone = dict(errors), dict(errors)
    if verify:
        inner = Path(tempfile.mkdtemp(dir=folder))
        written = written if twin is None else _twin(twin, written, inner, external)
        errors, approximation = _check(written, in_child=external)
        alone = {} if twin is None else check_operators(model, inner)
    if external:
        (folder / data).replace(place.with_name(data))
    temporary.replace(place)
    for stale in {other} | (set() if external else {data}):
        place.with_name(stale).unlink(missing_ok=True)
    return replace(
        draft, bytes=size, errors=errors, approximation=approximation, operator_errors=alone
    )


def _twin(twin: ir.Model, written: OnnxArtifact, folder: Path, external: bool) -> OnnxArtifact:
    """The ``twin`` in ``folder``, as what is checked in the place of ``written``."""
    import onnx_ir as ir

    place = folder / written.path.name
    ir.save(twin, place, external_data=f"{place.name}.data" if external else None)
    return replace(written, path=place)


def _check(written: OnnxArtifact, in_child: bool) -> tuple[dict[str, float], dict[str, float]]:
    """The largest error per output over the program's example inputs, and what codes of the cache
    do to the first of them; {} where the program has none."""
    from attn_rewrite.backends.onnx.artifact import against_program
    from attn_rewrite.backends.onnx.names import axis_names
    from attn_rewrite.backends.onnx.oracle import as_arrays, example_inputs, own_outputs

    assert written.source is not None
    symbols = {name: symbol for symbol, name in axis_names(written.source).items()}
    switches = [(symbols[s.axis], s.switch) for s in written.sites if s.switch is not None]
    plain = example_inputs(written.source, switches)
    if not plain:
        written.session()
        return {}, {}
    _open_bfloat16(written)
    codes, runs = written.codes, [as_arrays(inputs) for inputs in plain]
    if codes is not None:
        runs = [codes.encoded(inputs) for inputs in runs]
    outputs = written.run_all(runs, in_child=in_child)
    worst: dict[str, float] = {}
    for inputs, got in zip(runs, outputs, strict=True):
        errors = against_program(written.path.name, written.source, codes, inputs, got)
        worst = {name: max(error, worst.get(name, 0.0)) for name, error in errors.items()}
    if codes is None:
        return worst, {}
    return worst, codes.approximation(outputs[0], own_outputs(written.source, plain[0]))


def _open_bfloat16(written: OnnxArtifact) -> None:
    """`ToolError` with the reason where a model in bfloat16 finds no kernels."""
    import torch

    assert written.source is not None
    if not any(t.dtype == torch.bfloat16 for t in written.source.state_dict.values()):
        return
    try:
        written.session()
    except ToolError as error:
        raise ToolError(
            f"{error}; the model is in bfloat16, which ONNX Runtime's CPU provider does not "
            "multiply: export it in float32 or float16, or unchecked with verify=False for a "
            "provider that does.",
            stage="onnxruntime",
        ) from error
