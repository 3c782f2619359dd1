"""``attn-rewrite policies``: what a policy may name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attn_rewrite.cli.terminal import Terminal

if TYPE_CHECKING:
    from rich.console import Console

    from attn_rewrite.policy import TransformInfo


@dataclass(frozen=True)
class PlotOptions:
    """What is drawn of a sparse pattern."""

    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the mask and its blocks.")
    ] = None
    layout: Annotated[
        str | None,
        typer.Option(help="With --plot: frames=8,tokens=256, grid=4x8x8 or length=512."),
    ] = None
    block: Annotated[int, typer.Option(min=1, help="With --plot: side of a block.")] = 128
    heads: Annotated[int, typer.Option(min=1, help="With --plot: query heads.")] = 1
    head: Annotated[int, typer.Option(min=0, help="With --plot: the head that is drawn.")] = 0
    causal: Annotated[bool, typer.Option("--causal", help="The attention is causal.")] = False


def policies(
    terminal: Terminal,
    options: PlotOptions,
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]", help="Only this transform, in full; with --plot a whole policy."
        ),
    ] = None,
) -> int:
    """List the transforms a policy may name: options, defaults, exactness, source."""
    from attn_rewrite.budget import suggest
    from attn_rewrite.errors import PolicyError
    from attn_rewrite.policy import describe_transforms

    if options.plot is not None:
        return _draw(terminal, options, options.plot, name)
    if options.layout is not None:
        raise PolicyError("--layout is what --plot draws on; give --plot FILE")
    known = {info.name: info for info in describe_transforms()}
    if name is not None and name not in known:
        raise PolicyError(f"no transform is called {name!r}{suggest(name, known)}")
    chosen = list(known.values()) if name is None else [known[name]]
    terminal.show(
        {"transforms": [info.to_json() for info in chosen]},
        lambda console: _table(console, chosen) if name is None else _page(console, chosen[0]),
    )
    return 0


def _draw(terminal: Terminal, options: PlotOptions, path: Path, policy: str | None) -> int:
    """Draw a policy's mask."""
    from attn_rewrite.errors import PolicyError
    from attn_rewrite.simulate.mask_plot import plot_mask
    from attn_rewrite.token_layout import TokenLayout

    if policy is None or options.layout is None:
        raise PolicyError("--plot needs a policy and --layout, such as length=1024")
    if options.head >= options.heads:
        raise PolicyError(f"there is no head {options.head}; --heads is {options.heads}")
    layout = TokenLayout.parse(options.layout)
    with terminal.stage(f"drawing {path}"):
        drawn = plot_mask(
            policy, layout, path, block=options.block, heads=options.heads, head=options.head,
            causal=options.causal,
        )  # fmt: skip
    document = {"plot": str(path), "policy": policy, "layout": str(layout), **drawn}
    terminal.show(document, lambda console: console.print(f"drawn: {path}"))
    return 0


def _signature(info: TransformInfo) -> str:
    options = [f.name if f.default is None else f"{f.name}={f.default}" for f in info.fields]
    return f"{info.name}({', '.join(options)})" if options else info.name


def _table(console: Console, infos: Sequence[TransformInfo]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("transform", "exactness", "what it does", title="A policy is a pipeline: A | B")
    for info in infos:
        table.add_row(Text(_signature(info)), info.exactness.value, Text(info.summary))
    console.print(table)


def _page(console: Console, info: TransformInfo) -> None:
    from rich.table import Table
    from rich.text import Text

    console.print(Text(_signature(info), style="bold"))
    console.print(Text(info.summary))
    console.print(f"exactness: {info.exactness.value}")
    if info.source:
        console.print(Text(f"source: {info.source}"))
    if info.fields:
        table = Table("option", "type", "default", "meaning")
        for f in info.fields:
            table.add_row(f.name, Text(f.type), Text(f.default or "required"), Text(f.doc))
        console.print(table)
