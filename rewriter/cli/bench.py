"""``attn-rewrite bench``: original and rewritten model in one process, taking turns."""

from __future__ import annotations

import contextlib
import functools
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attn_rewrite.cli.options import Model, ModelOptions
from attn_rewrite.cli.policy import PolicyText, read_policy
from attn_rewrite.cli.terminal import Terminal

if TYPE_CHECKING:
    from rich.console import Console

    from attn_rewrite.checkpoint import LoadedModel

RUNTIMES = ("torch", "onnxruntime", "onnxruntime:cpu", "onnxruntime:cuda")


@dataclass(frozen=True)
class Timing:
    """What is timed and how often."""

    policy: PolicyText = None
    original: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="The original of a saved result, where it has moved."),
    ] = None
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each model.")] = 20
    warmup: Annotated[int, typer.Option(min=0, help="Runs before that are not timed.")] = 3
    runtime: Annotated[
        str,
        typer.Option(metavar="NAME", help="torch, or onnxruntime[:cuda]: both models exported."),
    ] = "torch"

    @property
    def provider(self) -> str:
        """ "cpu" or "cuda", or nothing where models run in torch."""
        runtime, _, provider = self.runtime.partition(":")
        return "" if runtime == "torch" else provider or "cpu"


def bench(model: Model, timing: Timing, options: ModelOptions, terminal: Terminal) -> int:
    """Time MODEL, or a saved result, before and after: alternating, medians and ratios."""
    from attn_rewrite.cli.optimize import exit_code

    _check_runtime(timing)
    saved = Path(model)
    if (saved / "attn_rewrite.json").is_file():
        loaded, after, policy = _saved(saved, timing, options, terminal)
    else:
        loaded, after, policy = _fresh(model, timing, options, terminal)
    with contextlib.ExitStack() as stack:
        pair = (_in_torch(loaded, loaded.model), _in_torch(loaded, after))
        notes: list[str] = []
        if timing.provider:
            pair, notes = stack.enter_context(_sessions(loaded, after, timing.provider, terminal))
        with terminal.stage(f"timing {timing.repeats} runs of each"):
            before_s, after_s = _take_turns(loaded, pair, timing)
    document = {
        "model": model,
        "policy": policy,
        "conditions": _conditions(loaded, timing),
        "original": _summary(before_s),
        "rewritten": _summary(after_s),
        "speedup": statistics.median(before_s) / statistics.median(after_s),
        "notes": notes,
    }
    terminal.show(document, lambda console: _view(console, document))
    return exit_code(after, terminal, "the ratio is noise, since both models compute the same")


def _fresh(
    model: str, timing: Timing, options: ModelOptions, terminal: Terminal
) -> tuple[LoadedModel, Any, str]:
    from attn_rewrite.cli.optimize import rewrite
    from attn_rewrite.errors import PolicyError

    if timing.original is not None:
        raise PolicyError("--original is for a saved result, and this is a model")
    policy = read_policy(timing.policy)
    loaded = options.load(model, terminal)
    return loaded, rewrite(loaded, policy, terminal), str(policy)


def _saved(
    folder: Path, timing: Timing, options: ModelOptions, terminal: Terminal
) -> tuple[LoadedModel, Any, str]:
    from attn_rewrite.cli.verify import load_original
    from attn_rewrite.errors import PolicyError
    from attn_rewrite.saved import load

    if timing.policy is not None:
        raise PolicyError(f"{folder} is a saved result, which has its policy; leave out --policy")
    loaded = load_original(folder, timing.original, options, terminal)
    optimized = load(folder)
    return loaded, optimized, optimized.plan.policy


def _check_runtime(timing: Timing) -> None:
    from attn_rewrite.errors import PolicyError

    name = timing.runtime
    if name not in RUNTIMES:
        known = f"{', '.join(RUNTIMES[:-1])} or {RUNTIMES[-1]}"
        raise PolicyError(f"--runtime {name!r} is not known; expected {known}")
    if timing.provider:
        from attn_rewrite.backends.onnx.runtime import require_exporter, require_provider

        require_exporter()
        require_provider(timing.provider)


def _in_torch(loaded: LoadedModel, model: Any) -> Callable[[], Any]:
    return lambda: model(*loaded.args, **loaded.kwargs)


@contextlib.contextmanager
def _sessions(
    loaded: LoadedModel, after: Any, provider: str, terminal: Terminal
) -> Iterator[tuple[tuple[Callable[[], Any], Callable[[], Any]], list[str]]]:
    """Runs of the original, captured and exported unchanged, and of the rewritten model.

    Beside them what ONNX Runtime left to the CPU, where another provider was asked for.
    """
    from attn_rewrite import export_onnx
    from attn_rewrite.backends.onnx.oracle import as_arrays, example_inputs
    from attn_rewrite.backends.onnx.runtime import run_session
    from attn_rewrite.cli.optimize import rewrite
    from attn_rewrite.policy import Policy

    plain = rewrite(loaded, Policy.parse("keep"), terminal)
    runs: list[Callable[[], Any]] = []
    notes: list[str] = []
    with tempfile.TemporaryDirectory(prefix="attn-rewrite-") as folder:
        for name, model in (("original", plain), ("rewritten", after)):
            with terminal.stage(f"exporting the {name} model"):
                file = Path(folder) / f"{name}.onnx"
                artifact = export_onnx(model, file, target="onnxruntime", provider=provider)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always", RuntimeWarning)
                session = artifact.session()
            notes += [str(w.message) for w in said if w.category is RuntimeWarning]
            inputs = as_arrays(example_inputs(model.program)[0])
            runs.append(functools.partial(run_session, session, inputs))
        for note in notes:
            terminal.warn(note)
        yield (runs[0], runs[1]), notes


def _take_turns(
    loaded: LoadedModel, pair: tuple[Callable[[], Any], Callable[[], Any]], timing: Timing
) -> tuple[list[float], list[float]]:
    """Seconds of each run; who goes first changes, so that drift hits both."""
    import torch

    seconds: tuple[list[float], list[float]] = ([], [])
    settle = _settler(loaded)
    with torch.inference_mode():
        for _ in range(timing.warmup):
            for run in pair:
                run()
        for turn in range(timing.repeats):
            for which in (0, 1) if turn % 2 == 0 else (1, 0):
                settle()
                start = time.perf_counter()
                pair[which]()
                settle()
                seconds[which].append(time.perf_counter() - start)
    return seconds


def _settler(loaded: LoadedModel) -> Callable[[], None]:
    """Wait for a GPU that still works; nothing on a CPU."""
    import torch

    if any(p.is_cuda for p in loaded.model.parameters()):
        return torch.cuda.synchronize
    return lambda: None


def _conditions(loaded: LoadedModel, timing: Timing) -> dict[str, Any]:
    import torch
    from torch.utils import _pytree as pytree

    from attn_rewrite.backends.onnx.runtime import THREADS as ONNX_THREADS

    leaves = pytree.tree_leaves((loaded.args, loaded.kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    parameter = next(iter(loaded.model.parameters()), None)
    return {
        "inputs": [f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in tensors],
        "device": "cpu" if parameter is None else str(parameter.device),
        "runtime": timing.runtime,
        "threads": ONNX_THREADS if timing.provider else torch.get_num_threads(),
        "repeats": timing.repeats,
        "warmup": timing.warmup,
    }


def _summary(seconds: list[float]) -> dict[str, float]:
    return {
        "median_s": statistics.median(seconds),
        "fastest_s": min(seconds),
        "slowest_s": max(seconds),
    }


def _view(console: Console, document: dict[str, Any]) -> None:
    from rich.table import Table

    conditions = document["conditions"]
    inputs = ", ".join(conditions["inputs"])
    console.print(
        f"{document['model']} under {document['policy'].strip()}\n{inputs} on "
        f"{conditions['device']}, {conditions['runtime']}, {conditions['threads']} threads",
        markup=False,
    )
    table = Table("", "median ms", "fastest ms", "slowest ms")
    for name in ("original", "rewritten"):
        table.add_row(name, *(f"{1e3 * value:.2f}" for value in document[name].values()))
    console.print(table)
    console.print(f"median ratio, original / rewritten: {document['speedup']:.2f}")
