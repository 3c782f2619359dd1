"""``attn-rewrite optimize``: rewrite a model by a policy and write a folder others can run."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attn_rewrite.cli.options import Model, ModelOptions
from attn_rewrite.cli.policy import BudgetText, PolicyText, read_budget, read_plan, read_policy
from attn_rewrite.cli.terminal import Terminal

if TYPE_CHECKING:
    from rich.console import Console

    from attn_rewrite.backends.onnx.artifact import OnnxArtifact
    from attn_rewrite.calibration import Calibration
    from attn_rewrite.checkpoint import LoadedModel
    from attn_rewrite.optimized import OptimizedModule
    from attn_rewrite.plan import Plan
    from attn_rewrite.policy import Budget, Policy

TRITON = ("triton:cuda:80", "triton:cuda:90", "triton:cuda:100", "triton:hip:gfx942")
EXPORTS = ("pt2", "onnx", "onnx:portable", "onnx:onnxruntime", "onnx:onnxruntime:cuda", *TRITON)


@dataclass(frozen=True)
class Rewriting:
    """What is done to the model, and where the result goes."""

    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to write.")]
    policy: PolicyText = None
    plan: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Replay a plan.json instead of a policy.")
    ] = None
    budget: BudgetText = None
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Inputs as .safetensors, one row a call: choose what paro and schemes need.",
        ),
    ] = None
    calibration_state: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Keep what is measured there, and go on from it when run again."
        ),
    ] = None
    export: Annotated[
        list[str],
        typer.Option(
            metavar="FORMAT",
            help="pt2, onnx[:portable|:onnxruntime[:cuda]] or triton:cuda:90; may be repeated.",
        ),
    ] = field(default_factory=list)
    cache: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="float or int8: ONNX files of a decoder take past_key_values of this type and "
            "return the present ones.",
        ),
    ] = None
    static: Annotated[
        bool,
        typer.Option(
            "--static",
            help="ONNX files of the example's length alone (--length), with the blocks to run as "
            "constants. Without it only where a mask needs that.",
        ),
    ] = False
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier result in DIR.")] = (
        False
    )


@dataclass(frozen=True)
class _Request:
    """The options, read and checked before the model is loaded."""

    policy: Policy
    plan: Plan | None
    budget: Budget | None
    onnx: dict[str, tuple[str, str]]  # file name -> target and provider
    cache: str | None
    static: bool
    triton: tuple[str, ...]  # targets, each once


def optimize(model: Model, rewriting: Rewriting, options: ModelOptions, terminal: Terminal) -> int:
    """Find the attention of MODEL, rewrite it by a policy, verify the numbers, write DIR."""
    from attn_rewrite.folder import output_folder
    from attn_rewrite.saved import seal, write_result

    request = _read(rewriting)
    # The folder is claimed first: a mistake in it should not cost the time of a rewrite.
    with output_folder(rewriting.output, force=rewriting.force) as part:
        loaded = options.load(model, terminal)
        optimized = rewrite(
            loaded, request.policy, terminal, plan=request.plan, budget=request.budget,
            calibration=_calibration(rewriting, loaded),
        )  # fmt: skip
        with terminal.stage("writing model.pt2"):
            write_result(optimized, part, source=loaded)
        artifacts = _export(optimized, part, request, terminal)
        artifacts += _export_triton(optimized, part, request.triton, terminal)
        seal(part, source=loaded, training=optimized.training)
    document = {
        "output": str(rewriting.output),
        "files": sorted(str(p.relative_to(rewriting.output)) for p in _files(rewriting.output)),
        "exports": artifacts,
        **optimized.report.to_json(),
    }
    terminal.show(document, lambda console: _view(console, optimized, rewriting.output, artifacts))
    return exit_code(optimized, terminal)


def rewrite(
    loaded: LoadedModel,
    policy: Policy,
    terminal: Terminal,
    *,
    plan: Plan | None = None,
    budget: Budget | None = None,
    calibration: Calibration | None = None,
) -> OptimizedModule:
    """`attn_rewrite.optimize` on a loaded model, said on standard error."""
    with terminal.steps("capturing, rewriting and verifying", "calibrating") as progress:
        from attn_rewrite import driver

        if calibration is not None:
            calibration = replace(calibration, progress=progress)

        optimized = driver.optimize(
            loaded.subject,
            policy,
            loaded.args,
            loaded.kwargs,
            dynamic_shapes=loaded.dynamic_shapes,
            budget=budget,
            plan=plan,
            calibration=calibration,
        )
    # Only here it is known where the inputs came from.
    inputs = next((note for note in loaded.notes if note.startswith("inputs ")), "user's")
    notes = (*(note for note in loaded.notes if note != inputs), *optimized.report.notes)
    optimized.replace_report(replace(optimized.report, inputs=inputs, notes=notes))
    return optimized


def _calibration(rewriting: Rewriting, loaded: LoadedModel) -> Calibration | None:
    """Calibration inputs of a file, checked against the model's arguments."""
    from attn_rewrite.errors import PolicyError

    if rewriting.calibration is None:
        if rewriting.calibration_state is not None:
            raise PolicyError("--calibration-state keeps what --calibration measures; give both")
        return None
    from attn_rewrite.calibration import Calibration
    from attn_rewrite.checkpoints.inputs import read_inputs

    inputs = read_inputs(rewriting.calibration, loaded.model).kwargs
    return Calibration(inputs, rewriting.calibration_state)


def exit_code(
    optimized: OptimizedModule, terminal: Terminal, so: str = "the report says where and why"
) -> int:
    """0, or 1 with a sentence that says why nothing was rewritten, and what follows (``so``)."""
    from attn_rewrite.cli.app import DONE, NOTHING_DONE

    statuses = {site.status for site in optimized.report.sites}
    if statuses & {"rewritten", "unbudgeted"}:
        return DONE
    if not statuses:
        why = "the model has no attention that is recognised"
    elif "reverted" in statuses:
        why = "the budget sent every approximated site back to exact"
    else:
        why = "nothing was rewritten: every site was kept or refused"
    terminal.warn(f"{why}; {so}")
    return NOTHING_DONE


def _read(rewriting: Rewriting) -> _Request:
    from attn_rewrite.errors import PolicyError

    if rewriting.policy is not None and rewriting.plan is not None:
        raise PolicyError("--policy and --plan were both given; a plan already says what to do")
    return _Request(
        policy=read_policy(rewriting.policy),
        plan=read_plan(rewriting.plan),
        budget=read_budget(rewriting.budget),
        onnx=_onnx_files(rewriting),
        cache=rewriting.cache,
        static=rewriting.static,
        triton=tuple(dict.fromkeys(e.partition(":")[2] for e in rewriting.export if e in TRITON)),
    )


def _onnx_files(rewriting: Rewriting) -> dict[str, tuple[str, str]]:
    """File name, target and provider of every ONNX export; model.pt2 is always written."""
    from attn_rewrite.budget import suggest
    from attn_rewrite.errors import PolicyError

    targets: list[tuple[str, str]] = []
    for text in rewriting.export:
        kind, *parts = text.split(":")
        provided = kind == "onnx" and len(parts) == 2  # what is wrong with it is said below
        if text not in EXPORTS and not provided:
            raise PolicyError(f"--export {text!r} is not known{suggest(text, EXPORTS)}")
        target, provider = (*parts, *("portable", "cpu")[len(parts) :])[:2]
        if kind == "onnx" and (target, provider) not in targets:
            targets.append((target, provider))
    for option, given in (("--cache", rewriting.cache is not None), ("--static", rewriting.static)):
        if given and not targets:
            raise PolicyError(f"{option} is about ONNX files; give --export onnx as well")
    if targets:
        from attn_rewrite.backends.onnx.options import check_options
        from attn_rewrite.backends.onnx.runtime import require_exporter

        require_exporter()
        for target, provider in targets:
            check_options(target, cache=rewriting.cache, static=rewriting.static, provider=provider)
    others = ("-".join(t for t in target if t != "cpu") for target in targets[1:])
    names = ["model.onnx", *(f"model.{other}.onnx" for other in others)]
    return dict(zip(names, targets, strict=False))


def _export(
    optimized: OptimizedModule, folder: Path, request: _Request, terminal: Terminal
) -> list[dict[str, Any]]:
    artifacts = []
    for name, (target, provider) in request.onnx.items():
        from attn_rewrite import export_onnx

        with terminal.stage(f"exporting {name} and comparing it in ONNX Runtime"):
            artifact = export_onnx(
                optimized,
                folder / name,
                target=target,
                provider=provider,
                cache=request.cache,
                static=request.static,
            )
        artifacts.append(_artifact(artifact, name))
    return artifacts


def _export_triton(
    optimized: OptimizedModule, folder: Path, targets: tuple[str, ...], terminal: Terminal
) -> list[dict[str, Any]]:
    """One folder of compiled kernels for each target, below ``triton/``."""
    if not targets:
        return []
    from attn_rewrite.backends.triton.bundle import export_triton

    artifacts = []
    for target in targets:
        name = f"triton/{target.replace(':', '-')}"
        with terminal.stage(f"compiling the kernels for {target}"):
            artifact = export_triton(optimized, folder / name, target=target)
        artifacts.append({"file": name, **artifact.to_json()})
    return artifacts


def _artifact(artifact: OnnxArtifact, name: str) -> dict[str, Any]:
    return {
        "file": name,
        "target": artifact.target,
        "provider": artifact.provider,
        "checked": artifact.checked,
        "cache": artifact.metadata.get("attn_rewrite.cache"),
        "lengths": artifact.metadata.get("attn_rewrite.lengths", "dynamic"),
        "opset": artifact.opset,
        "bytes": artifact.bytes,
        "errors": dict(artifact.errors),
        "approximation": dict(artifact.approximation),
        "sites": [site.to_json() for site in artifact.sites],
    }


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _view(
    console: Console, optimized: OptimizedModule, output: Path, artifacts: list[dict[str, Any]]
) -> None:
    from attn_rewrite.report import render

    render(optimized.report, console)
    for artifact in artifacts:
        if "kernels" in artifact:
            console.print(_kernels_line(artifact), markup=False)
            continue
        worst = max(artifact["errors"].values(), default=0.0)
        console.print(
            f"{artifact['file']}: opset {artifact['opset']}, {artifact['bytes'] / 1e6:.1f} MB, "
            f"largest error against the program {worst:.2g}",
            markup=False,
        )
        if artifact["lengths"] != "dynamic":
            console.print(f"  its lengths are {artifact['lengths']}", markup=False)
        for name, error in artifact["approximation"].items():
            console.print(
                f"  the int8 cache changes {name} by {error:.2g} (unbudgeted)", markup=False
            )
    console.print(f"written to {output}", markup=False)


def _kernels_line(artifact: dict[str, Any]) -> str:
    kernels = [k["resources"] for k in artifact["kernels"]]
    return (
        f"{artifact['file']}: {len(kernels)} kernels for {len(artifact['sites'])} sites, at most "
        f"{max(k['registers'] for k in kernels)} registers a thread, "
        f"{max(k['shared'] for k in kernels) / 1024:.0f} KiB shared, none spilled"
    )
