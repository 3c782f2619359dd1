"""`export_onnx`: a rewritten program as an ONNX file that was opened and compared.

The file appears under its name only when everything about it held; until then it lives in a
temporary folder beside its place, which is removed whatever happens.
"""

from __future__ import annotations

import collections
import contextlib
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attn_rewrite.backends.onnx.runtime import require_exporter
from attn_rewrite.errors import LowerError, PolicyError, ToolError
from attn_rewrite.site import Refusal

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch.export import ExportedProgram

    from attn_rewrite.backends.onnx.artifact import OnnxArtifact
    from attn_rewrite.backends.onnx.codes import Codes
    from attn_rewrite.backends.onnx.sites import SiteLowering

TARGETS = ("portable", "onnxruntime")
CACHES = (None, "float")
DEFAULT_OPSET, IR_VERSION = 20, 10
OPSETS = range(18, 25)
# Weights above this go to a file of their own: a protobuf is held in memory twice while it is
# written, and cannot exceed 2 GiB.
EXTERNAL_BYTES = 1 << 27


def export_onnx(
    optimized: Any,
    path: str | Path,
    *,
    target: str = "portable",
    opset: int | None = None,
    verify: bool = True,
    cache: str | None = None,
) -> OnnxArtifact:
    """Write ``optimized`` (an `OptimizedModule`, or an ``ExportedProgram``) as ONNX.

    ``portable`` uses standard operators only and runs on any conforming runtime; ``onnxruntime``
    takes operators of ``com.microsoft`` where they express a site exactly and are faster on the
    CPU, and says for every site why (`SiteLowering.choice`).  ``opset`` is 20
    unless asked otherwise (18 to 24); the IR version is 10.  Batch and lengths that are dynamic in
    the program stay dynamic under readable names.  Where a sparse site has no band of fixed width
    the lengths become those of the example (``attn_rewrite.lengths`` of the metadata says so), so
    that only the blocks its mask keeps are in the file.

    ``cache`` ("float") writes the later steps of a decoder instead: the file takes
    ``past_key_values.0.key`` [batch, heads, past, width] and so on (of length 0 at the first call)
    and returns ``present.0.key``.  ``optimized`` has to hold its source module then.

    With ``verify`` the file is opened in ONNX Runtime and compared with the program on its example
    inputs, and at another batch size and length where those are dynamic, before it gets its name.

    Raises `PolicyError` on a bad option, `LowerError` (with refusals) where a site has no ONNX
    form, `ToolError` where a package is missing or a tool fails, `VerifyError` where the numbers
    disagree; no file is left behind then.
    """
    number = check_options(target, opset, cache)
    require_exporter()
    optimized = optimized if cache is None else _step_of(optimized)
    from attn_rewrite.backends.onnx.artifact import OnnxArtifact
    from attn_rewrite.portable import plain_program

    program = getattr(optimized, "program", optimized)
    made = _lowered(plain_program(program), number, target, cache)
    dense = _dense_though_sparse(optimized, made.sites)
    if dense and hasattr(optimized, "at_one_length") and cache is None:
        # Which blocks to run is known once the lengths are.
        made = _lowered(plain_program(optimized.at_one_length()), number, target, cache)
        dense = _dense_though_sparse(optimized, made.sites)
        made = replace(made, fixed=True)
    _refuse_dense(dense)
    model, sites, codes = made.model, made.sites, made.codes
    census = node_census(model)
    _check_census(census, target)
    metadata = _metadata(optimized, target, number, [s.to_json() for s in sites])
    if made.fixed:
        metadata["attn_rewrite.lengths"] = "those of the example: a mask has no band of fixed width"
    if cache is not None:
        metadata["attn_rewrite.cache"] = cache
    if codes is not None:
        metadata["attn_rewrite.cache_scales"] = codes.to_text()
    model.metadata_props.update(metadata)
    draft = OnnxArtifact(
        path=Path(path),
        opset=number,
        target=target,
        inputs=_specs(model.graph.inputs),
        outputs=_specs(model.graph.outputs),
        sites=sites,
        bytes=0,
        metadata=metadata,
        source=made.program,
        codes=codes,
    )
    return _write(model, draft, verify)


@dataclass(frozen=True, eq=False)
class _Lowered:
    """A program as ONNX; ``fixed`` where its lengths were made those of the example."""

    program: ExportedProgram
    model: ir.Model
    sites: tuple[SiteLowering, ...]
    codes: Codes | None
    fixed: bool = False


def _lowered(program: ExportedProgram, number: int, target: str, cache: str | None) -> _Lowered:
    import onnx_ir.passes.common as common

    from attn_rewrite.backends.onnx import names
    from attn_rewrite.backends.onnx.sites import expand, site_names

    with _quiet():
        model = _translate(program, number)
        common.InlinePass()(model)  # the only functions of the file are its rewritten sites
        codes = _quantised(model, program, number) if cache == "int8" else None
        sites = expand(model, number, site_names(program), target)
        names.rename_inputs(model)
        names.rename_outputs(model, names.output_names(program))
        _finish(model, number)
        names.rename_axes(model, names.axis_names(program))
    return _Lowered(program, model, sites, codes)


def _quantised(model: ir.Model, program: ExportedProgram, opset: int) -> Codes:
    """The past inputs and present outputs of ``model`` turned into codes."""
    from attn_rewrite.backends.onnx.codes import Codes, quantise_cache
    from attn_rewrite.backends.onnx.oracle import example_inputs, own_outputs

    codes = Codes.of(own_outputs(program, example_inputs(program)[0]))
    quantise_cache(model, codes, opset)
    return codes


def _step_of(optimized: Any) -> Any:
    """The later steps of a decoder; `PolicyError` where ``optimized`` is no rewritten module."""
    if not hasattr(optimized, "with_cache"):
        raise PolicyError(
            f"cache= needs what optimize returned, got {type(optimized).__name__}: a program alone "
            "does not say how its model takes a cache."
        )
    return optimized.with_cache()


def check_options(target: str, opset: int | None = None, cache: str | None = None) -> int:
    """The opset to write for these options; `PolicyError` where they cannot be served.

    Needs no model, so that a command can ask before it loads one.
    """
    if target not in TARGETS:
        raise PolicyError(f"unknown ONNX target {target!r}; expected {' or '.join(TARGETS)}.")
    if cache not in CACHES:
        raise PolicyError(f"unknown cache {cache!r}; expected float, or none.")
    number = DEFAULT_OPSET if opset is None else opset
    if number in OPSETS:
        return number
    why = (
        "from 25 on ONNX Runtime expands Attention into some 50 nodes, and torch's exporter writes "
        "files that do not load"
        if number > OPSETS[-1]
        else "torch's exporter starts at 18"
    )
    raise PolicyError(f"opset {number} is not supported: {why}; use {OPSETS[0]} to {OPSETS[-1]}.")


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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
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


def _translate(program: ExportedProgram, opset: int) -> ir.Model:
    """The program as ONNX, with a marker node per attention and no optimisation yet."""
    import torch

    from attn_rewrite.backends.onnx.sites import translations
    from attn_rewrite.backends.onnx.strides import contiguous_attention

    try:
        exported = torch.onnx.export(
            contiguous_attention(program),
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


def _finish(model: ir.Model, opset: int) -> None:
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
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        owners += [node, *node.outputs]
    for owner in owners:
        for key in [k for k in owner.metadata_props if k.startswith("pkg.")]:
            del owner.metadata_props[key]


def node_census(model: ir.Model) -> dict[str, int]:
    """Nodes by operator, nested graphs included; operators of other domains as ``domain::name``."""
    import onnx_ir as ir

    counts: collections.Counter[str] = collections.Counter()
    for owner in (model.graph, *model.functions.values()):
        for node in ir.traversal.RecursiveGraphIterator(owner):
            plain = node.domain in ("", "ai.onnx")
            counts[node.op_type if plain else f"{node.domain}::{node.op_type}"] += 1
    return dict(sorted(counts.items()))


def _dense_though_sparse(
    optimized: Any, sites: tuple[SiteLowering, ...]
) -> tuple[SiteLowering, ...]:
    """Sites that the plan makes sparse and that would leave as a dense mask, or its causal half."""
    from attn_rewrite.passes.transform import SparsePattern

    steps = getattr(getattr(optimized, "plan", None), "steps", ())
    sparse = {s.site for s in steps if any(isinstance(t, SparsePattern) for t in s.transforms)}
    return tuple(s for s in sites if s.name in sparse and s.form in ("dense mask", "half"))


def _refuse_dense(dense: tuple[SiteLowering, ...]) -> None:
    """A site that the plan makes sparse never leaves as a dense mask, or as its causal half."""
    if dense:
        reason = f"the plan makes it sparse, and here it would compute {dense[0].detail}"
        raise LowerError(
            f"ONNX: {dense[0].name}: {reason}; export with fixed lengths, where the blocks to run "
            "are known, or keep the site exact.",
            [Refusal("onnx-dense-mask", s.detail, site=s.name) for s in dense],
        )


def _check_census(census: Mapping[str, int], target: str) -> None:
    own = "com.microsoft::" if target == "onnxruntime" else "attn_rewrite::"
    own_domains = (own, "attn_rewrite::")  # the second: functions whose bodies are in the file
    foreign = [name for name in census if "::" in name and not name.startswith(own_domains)]
    if foreign:
        reason = f"the graph needs {', '.join(foreign)}, which no runtime has to know"
        raise LowerError(
            f"ONNX target {target!r}: {reason}; rewrite that operator in the model.",
            [Refusal("onnx-foreign-operator", reason)],
        )


def _specs(values: Any) -> Any:
    from attn_rewrite.backends.onnx.artifact import TensorSpec

    return tuple(
        TensorSpec(
            v.name,
            str(v.dtype.numpy()) if v.dtype is not None else "unknown",
            tuple(d if isinstance(d, int) else str(d.value) for d in v.shape or ()),
        )
        for v in values
    )


def _metadata(
    optimized: Any, target: str, opset: int, sites: list[dict[str, Any]]
) -> dict[str, str]:
    """What the file says about itself, all of it text."""
    try:
        own = version("attn-rewrite")
    except PackageNotFoundError:
        own = "unknown"
    found = {
        "attn_rewrite.version": own,
        "attn_rewrite.target": target,
        "attn_rewrite.opset": str(opset),
        "attn_rewrite.sites": json.dumps(sites, sort_keys=True),
    }
    plan, report = getattr(optimized, "plan", None), getattr(optimized, "report", None)
    for key, value in (
        ("policy", getattr(plan, "policy", None)),
        ("plan_hash", getattr(plan, "hash", None) or getattr(plan, "digest", None)),
        ("report", report),
    ):
        text = _plain(value)
        if text:
            found[f"attn_rewrite.{key}"] = text
    return found


def _plain(value: Any) -> str:
    if value is None:
        return ""
    if callable(value):
        value = value()
    to_json = getattr(value, "to_json", None)
    return json.dumps(to_json(), default=str) if to_json else str(value)


def _write(model: ir.Model, draft: OnnxArtifact, verify: bool) -> OnnxArtifact:
    """Write beside the place, check there, and rename; the artifact with its size and errors."""
    place = draft.path
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{place.name}.", dir=place.parent) as folder:
            return _write_into(model, draft, Path(folder), verify)
    except OSError as error:
        raise ToolError(f"cannot write {place}: {error.strerror or error}", stage="disk") from error


def _write_into(model: ir.Model, draft: OnnxArtifact, folder: Path, verify: bool) -> OnnxArtifact:
    import onnx_ir as ir

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
    written = replace(draft, path=temporary)
    errors, approximation = _check(written, in_child=external) if verify else ({}, {})
    if external:
        (folder / data).replace(place.with_name(data))
    temporary.replace(place)
    for stale in {other} | (set() if external else {data}):
        place.with_name(stale).unlink(missing_ok=True)
    return replace(draft, bytes=size, errors=errors, approximation=approximation)


def _check(written: OnnxArtifact, in_child: bool) -> tuple[dict[str, float], dict[str, float]]:
    """The largest error per output over the program's example inputs, and what codes of the cache
    do to the first of them; {} where the program has none."""
    from attn_rewrite.backends.onnx.artifact import against_program
    from attn_rewrite.backends.onnx.oracle import as_arrays, example_inputs, own_outputs

    assert written.source is not None
    plain = example_inputs(written.source)
    if not plain:
        written.session()
        return {}, {}
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
