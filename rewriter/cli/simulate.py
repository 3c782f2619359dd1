"""``attn-rewrite simulate``: performance models, without running anything."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attn_rewrite.cli import simulate_tiles
from attn_rewrite.cli.options import command
from attn_rewrite.cli.terminal import Terminal
from attn_rewrite.errors import PolicyError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from attn_rewrite.simulate.evaluation import Evaluation
    from attn_rewrite.simulate.fusemax import Result
    from attn_rewrite.simulate.workload import Workload

app = typer.Typer(help="Performance models: nothing is run.", no_args_is_help=True)


@dataclass(frozen=True)
class FusemaxOptions:
    """What is modelled, and what is shown of it."""

    model: Annotated[str | None, typer.Option(help="bert, trxl, t5 or xlm.")] = None
    checkpoint: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Model the attention of this checkpoint.")
    ] = None
    length: Annotated[int | None, typer.Option(help="Queries and keys per sequence.")] = None
    batch: Annotated[
        int | None, typer.Option(help="Sequences [64; of a checkpoint 1].", show_default=False)
    ] = None
    config: Annotated[
        str, typer.Option(help="fusemax, architecture, cascade, flat, unfused, or all.")
    ] = "fusemax"
    table: Annotated[bool, typer.Option("--table", help="The whole published evaluation.")] = False
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw array size against latency.")
    ] = None

    def check(self) -> None:
        """Refuse combinations that say nothing; raises `PolicyError`."""
        given = {"--model": self.model, "--checkpoint": self.checkpoint, "--length": self.length}
        given["--plot"] = self.plot
        clash = [name for name, value in given.items() if value is not None]
        if self.table and clash:
            raise PolicyError(f"--table is the whole evaluation; leave out {', '.join(clash)}")
        for name, value in (("--length", self.length), ("--batch", self.batch)):
            if value is not None and value < 1:
                raise PolicyError(f"{name} is {value}; give a positive number")
        if self.table:
            return
        if (self.model is None) == (self.checkpoint is None):
            raise PolicyError("give either --model or --checkpoint, or --table")
        if self.length is None:
            raise PolicyError("give --length, the number of queries and keys per sequence")


def fusemax(terminal: Terminal, options: FusemaxOptions) -> int:
    """Model attention on the FuseMax accelerator and the designs it is compared with.

    Latency, utilisation of the 2-D and 1-D arrays, DRAM traffic and energy of one layer (Nayak et
    al., MICRO 2024).
    """
    options.check()
    try:
        return _show_table(terminal, options) if options.table else _show(terminal, options)
    except PolicyError:
        raise
    except ValueError as error:  # a size the model has no answer for
        raise PolicyError(str(error)) from error


app.command("fusemax")(command(fusemax))
app.command("tiles")(command(simulate_tiles.tiles))
app.command("mask")(command(simulate_tiles.mask))


def _show(terminal: Terminal, options: FusemaxOptions) -> int:
    from attn_rewrite.simulate.designs import DESIGNS
    from attn_rewrite.simulate.fusemax import evaluate

    workloads = _workloads(terminal, options)
    designs = list(DESIGNS) if options.config == "all" else [options.config]
    found = [(evaluate(w, d), layers) for w, layers in workloads for d in designs]
    if options.plot is not None:
        _plot([w for w, _ in workloads], designs, options.plot)
    values = [{**r.to_json(), "layers": layers} for r, layers in found]
    document: dict[str, Any] = values[0] if len(values) == 1 else {"results": values}
    terminal.show(document, lambda console: _print_results(console, found))
    return 0


def _workloads(terminal: Terminal, options: FusemaxOptions) -> list[tuple[Workload, int]]:
    """What to model, with how many layers are alike."""
    from attn_rewrite.simulate.workload import MODELS, at_length

    assert options.length is not None
    if options.checkpoint is not None:
        return _checkpoint_workloads(
            terminal, options.checkpoint, options.length, options.batch or 1
        )
    name = (options.model or "").lower()
    if name not in MODELS:
        raise PolicyError(f"no model is called {options.model!r}; choose from {', '.join(MODELS)}")
    return [(at_length(MODELS[name], options.length, options.batch), 1)]


def _checkpoint_workloads(
    terminal: Terminal, directory: Path, length: int, batch: int
) -> list[tuple[Workload, int]]:
    """The attention found in a checkpoint, each shape once; what is not modelled is said."""
    from attn_rewrite.checkpoint import load_model
    from attn_rewrite.driver import find_attention
    from attn_rewrite.simulate.workload import distinct, site_workload, why_not_modelled

    with terminal.stage(f"finding the attention of {directory}"):
        loaded = load_model(directory)
        findings = find_attention(
            loaded.subject, loaded.args, loaded.kwargs, dynamic_shapes=loaded.dynamic_shapes
        )
    reasons = {s.name: why_not_modelled(s) for s in findings.sites}
    modelled = [s for s in findings.sites if reasons[s.name] is None]
    for name, reason in reasons.items():
        if reason is not None:
            terminal.warn(f"{name} {reason} and is not modelled")
    if not modelled:
        raise PolicyError(
            f"{directory} has no plain softmax attention to model; `attn-rewrite inspect` says why"
        )
    return list(distinct(site_workload(s, batch=batch, length=length) for s in modelled))


def _print_results(console: Console, found: Iterable[tuple[Result, int]]) -> None:
    table = _table("FuseMax model of one layer", "workload", "layers", "design")
    for name in ("latency", "2-D busy", "1-D busy", "DRAM", "energy", "bound"):
        table.add_column(name, justify="right", no_wrap=True)
    missing = False
    for r, layers in found:
        missing = missing or r.energy_pj is None
        energy = "none" if r.energy_pj is None else f"{r.energy_pj / 1e12:.4g} J"
        busy = (f"{r.util_2d:.1%}", f"{r.util_1d:.1%}")
        cells = (f"{r.latency_s:.4g} s", *busy, f"{r.dram_bytes / 1e9:.4g} GB", energy, r.bound)
        table.add_row(r.workload.name, str(layers), r.design, *cells)
    console.print(table)
    if missing:
        console.print("Energy: none where it has no closed form.")


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title)
    for name in columns:
        table.add_column(name, no_wrap=True, min_width=12 if name == "design" else None)
    return table


def _show_table(terminal: Terminal, options: FusemaxOptions) -> int:
    from attn_rewrite.simulate.evaluation import ENERGY_STATEMENT, evaluation

    found = evaluation(batch=options.batch)

    def view(console: Console) -> None:
        makers: tuple[Callable[[Evaluation], Table], ...]
        makers = (_latency_table, _length_table, _average_table)
        for make in makers:
            console.print(make(found))
        console.print(ENERGY_STATEMENT)

    terminal.show(found.to_json(), view)
    return 0


def _latency_table(found: Evaluation) -> Table:
    table = _table("Attention of one layer: latency in s, 2-D/1-D busy, DRAM in GB", "workload")
    for design in found.results:
        table.add_column(design, justify="right")
    for i, workload in enumerate(found.workloads):
        cells = []
        for rows in found.results.values():
            r = rows[i]
            moved = f"{r.dram_bytes / 1e9:.4g}"
            cells.append(f"{r.latency_s:.4g}\n{r.util_2d:.3f}/{r.util_1d:.3f}\n{moved}")
        table.add_row(f"{workload.name} {_short(workload.q_len)}", *cells)
    return table


def _length_table(found: Evaluation) -> Table:
    table = _table("Speed-up of fusemax by length, mean over models", "over")
    lengths = dict.fromkeys(w.q_len for w in found.workloads)
    for length in lengths:
        table.add_column(_short(length), justify="right")
    for end_to_end in (False, True):
        for other in ("flat", "unfused"):
            means = found.mean_by_length("fusemax", other, end_to_end=end_to_end)
            part = "end to end" if end_to_end else "attention"
            table.add_row(f"{other}, {part}", *(f"{means[n]:.2f}" for n in lengths))
    return table


def _average_table(found: Evaluation) -> Table:
    from attn_rewrite.simulate.evaluation import averages

    table = _table("Mean speed-ups", "what")
    table.add_column("times", justify="right")
    for name, value in averages(found).items():
        table.add_row(f"fusemax, {name.replace('_', ' ')}", f"{value:.2f}")
    for name, value in found.steps().items():
        table.add_row(f"{name} over flat", f"{value:.2f}")
    return table


def _short(length: int) -> str:
    """1024 -> 1K, 1048576 -> 1M."""
    for size, sign in ((2**20, "M"), (2**10, "K")):
        if length % size == 0:
            return f"{length // size}{sign}"
    return str(length)


def _plot(workloads: Iterable[Workload], designs: Sequence[str], path: Path) -> None:
    from attn_rewrite.simulate.pareto import plot, sweep

    plot([(f"{w.name}, {d}", sweep(w, d)) for w in workloads for d in designs], path)
