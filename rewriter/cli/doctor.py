"""``attn-rewrite doctor``: what is installed, what works."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from attn_rewrite.cli.terminal import Terminal

if TYPE_CHECKING:
    from rich.console import Console

    from attn_rewrite.doctor import Check


def doctor(terminal: Terminal) -> int:
    """Show what is installed and what of it works."""
    from attn_rewrite.cli.app import DONE, TOOL
    from attn_rewrite.doctor import Status, examine

    with terminal.stage("trying what is installed"):
        checks = examine()
    broken = [check.name for check in checks if check.status is Status.BROKEN]
    document = {"checks": [check.to_json() for check in checks], "broken": broken}
    terminal.show(document, lambda console: _view(console, checks))
    return TOOL if broken else DONE


def _view(console: Console, checks: Sequence[Check]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("what", "status", "version", "detail")
    table.columns[3].overflow = "fold"
    for check in checks:
        table.add_row(*map(Text, (check.name, check.status.value, check.version, check.detail)))
    console.print(table)
