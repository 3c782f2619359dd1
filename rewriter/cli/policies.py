"""``attn-rewrite policies``: what a policy may name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from attn_rewrite.cli.terminal import Terminal

if TYPE_CHECKING:
    from rich.console import Console

    from attn_rewrite.policy import TransformInfo


def policies(
    terminal: Terminal,
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Only this transform, in full.")
    ] = None,
) -> int:
    """List the transforms a policy may name: options, defaults, exactness, source."""
    from attn_rewrite.budget import suggest
    from attn_rewrite.errors import PolicyError
    from attn_rewrite.policy import describe_transforms

    known = {info.name: info for info in describe_transforms()}
    if name is not None and name not in known:
        raise PolicyError(f"no transform is called {name!r}{suggest(name, known)}")
    chosen = list(known.values()) if name is None else [known[name]]
    terminal.show(
        {"transforms": [info.to_json() for info in chosen]},
        lambda console: _table(console, chosen) if name is None else _page(console, chosen[0]),
    )
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
