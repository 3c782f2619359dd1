"""``attn-rewrite verify``: a saved result, checked again against the model it was made from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attn_rewrite.cli.options import ModelOptions
from attn_rewrite.cli.terminal import Terminal

if TYPE_CHECKING:
    from rich.console import Console
    from torch.export import ExportedProgram

    from attn_rewrite.backends.onnx.artifact import Arrays
    from attn_rewrite.checkpoint import LoadedModel
    from attn_rewrite.optimized import OptimizedModule

Directory = Annotated[
    Path, typer.Argument(metavar="DIR", help="A folder that optimize wrote.", show_default=False)
]


@dataclass(frozen=True)
class Origin:
    """Where the original is."""

    original: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="The original model, where it has moved.", show_default=False
        ),
    ] = None


def verify(directory: Directory, origin: Origin, options: ModelOptions, terminal: Terminal) -> int:
    """Check DIR: its files, the original it names, every rewrite and every export."""
    from attn_rewrite.cli.optimize import rewrite
    from attn_rewrite.cli.policy import read_policy
    from attn_rewrite.gates import carry_gates
    from attn_rewrite.saved import load

    with terminal.stage(f"checking the files of {directory}"):
        saved = load(directory)
    loaded = load_original(directory, origin.original, options, terminal)
    # The plan replayed on the original checks every Site against the float64 oracle once more.
    replayed = rewrite(loaded, read_policy(None), terminal, plan=saved.plan)
    carry_gates(saved, replayed)
    with terminal.stage("comparing outputs with the rewritten original in float64"):
        errors, bounds = _compare(directory, saved, replayed)
    document = {
        "directory": str(directory),
        "original": loaded.path,
        "plan": saved.plan.hash,
        "errors": errors,
        "bounds": bounds,
        **replayed.report.to_json(),
    }
    terminal.show(document, lambda console: _view(console, document, replayed))
    return 0


def load_original(
    directory: Path, original: str | None, options: ModelOptions, terminal: Terminal
) -> LoadedModel:
    """The model a result was made from; `CheckpointError` when it is unknown or has changed."""
    from attn_rewrite.errors import CheckpointError
    from attn_rewrite.saved import check_result

    source = check_result(directory).get("source")
    place = original or (source and source["path"])
    if place is None:
        raise CheckpointError(
            f"{directory} does not say which model it was made from; name it with --original"
        )
    loaded = options.load(place, terminal)
    if source is not None and loaded.hashes != source["hashes"]:
        changed = sorted(
            name
            for name in loaded.hashes.keys() | source["hashes"].keys()
            if loaded.hashes.get(name) != source["hashes"].get(name)
        )
        raise CheckpointError(
            f"{loaded.path} is not the model {directory} was made from: {', '.join(changed)} "
            "differs from the hash that was kept; name the original with --original"
        )
    return loaded


def _compare(
    directory: Path, saved: OptimizedModule, replayed: OptimizedModule
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Largest error per file and output, and the bound of each output; `VerifyError` over it."""
    from attn_rewrite.backends.onnx.artifact import against_program, compare, errors_of
    from attn_rewrite.backends.onnx.codes import Codes
    from attn_rewrite.backends.onnx.explanation import explained
    from attn_rewrite.backends.onnx.oracle import as_arrays, example_inputs, expected

    inputs = example_inputs(replayed.program)[0]
    wanted = expected(replayed.program, inputs)

    bounds = dict(wanted.bounds)
    errors: dict[str, dict[str, float]] = {}

    def check(name: str, got: Arrays) -> None:
        off = errors_of(name, got, wanted.outputs)
        allowed = explained(replayed.program, inputs, wanted, got, off).bounds
        errors[name] = compare(name, got, wanted.outputs, allowed)
        bounds.update({n: max(bound, bounds[n]) for n, bound in allowed.items()})

    check("model.pt2", _outputs(saved, replayed.program))
    for path in sorted(directory.glob("*.onnx")):
        about = _metadata(path)
        provider = about.get("attn_rewrite.provider", "cpu")
        if "attn_rewrite.cache" not in about:
            got = _onnx_outputs(path, inputs, provider)
            check(path.name, got)
            continue
        scales = about.get("attn_rewrite.cache_scales")
        codes = None if scales is None else Codes.from_text(scales)
        step = replayed.with_cache().program
        given = example_inputs(step)[0]
        given = given if codes is None else codes.encoded(as_arrays(given))
        got = _onnx_outputs(path, given, provider)
        errors[path.name] = against_program(path.name, step, codes, given, got)
    return errors, bounds


def _metadata(path: Path) -> dict[str, str]:
    import onnx

    from attn_rewrite.errors import ToolError

    try:
        properties = onnx.load(path, load_external_data=False).metadata_props
    except Exception as error:  # protobuf's, which has no types, or the disk's
        raise ToolError(
            f"{path} cannot be read as ONNX: {error}; write it again with optimize --export onnx",
            stage="onnx",
        ) from error
    return {p.key: p.value for p in properties}


def _outputs(model: OptimizedModule, replayed: ExportedProgram) -> Arrays:
    """The tensors a saved model returns for the inputs of ``replayed``, by output name.

    Those inputs are the user's, but for a batch of 1, which is captured as two.
    """
    import torch
    from torch.utils import _pytree as pytree

    from attn_rewrite.backends.onnx.names import output_names
    from attn_rewrite.backends.onnx.oracle import as_arrays

    assert replayed.example_inputs is not None  # it was captured just now
    args, kwargs = replayed.example_inputs
    with torch.inference_mode():
        result = model(*args, **kwargs)
    tensors = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
    return as_arrays(dict(zip(output_names(model.program), tensors, strict=True)))


def _onnx_outputs(path: Path, inputs: dict[str, Any], provider: str = "cpu") -> Arrays:
    from attn_rewrite.backends.onnx.oracle import as_arrays
    from attn_rewrite.backends.onnx.runtime import open_session, providers_of, run_session
    from attn_rewrite.errors import PolicyError, ToolError

    session = open_session(path, providers_of(provider))
    wanted = {value.name: value.shape for value in session.get_inputs()}
    strange = [name for name in wanted if name not in inputs]
    if strange:
        raise ToolError(
            f"{path.name} takes {', '.join(strange)}, and the original has {', '.join(inputs)}: "
            "it is no export of this model; take it out of the folder, or export it again",
            stage="onnx",
        )
    given = as_arrays({name: value for name, value in inputs.items() if name in wanted})
    for name, array in given.items():
        pairs = list(zip(wanted[name], array.shape, strict=False))
        if any(isinstance(fixed, int) and fixed != now for fixed, now in pairs):
            raise PolicyError(
                f"{path.name} takes {name} of {wanted[name]}, and the inputs here have "
                f"{list(array.shape)}: give the --batch and --length, or the --inputs, it was "
                "exported with"
            )
    return run_session(session, given)


def _view(console: Console, document: dict[str, Any], replayed: OptimizedModule) -> None:
    from rich.table import Table

    from attn_rewrite.report import render

    render(replayed.report, console)
    table = Table("file", "output", "largest error", "allowed", title="outputs against float64")
    for name, errors in document["errors"].items():
        for output, error in errors.items():
            allowed = document["bounds"].get(output)  # present keys are outputs of one file only
            table.add_row(name, output, f"{error:.3g}", "" if allowed is None else f"{allowed:.3g}")
    console.print(table)
    console.print(f"{document['directory']} is what its plan makes of the original", markup=False)
