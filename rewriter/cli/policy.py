"""Reading what the user wrote for a policy, a budget or a plan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from attn_rewrite.plan import Plan
    from attn_rewrite.policy import Budget, Policy

PolicyText = Annotated[
    str | None,
    typer.Option(
        "--policy",
        metavar="P",
        help="A pipeline such as 'window(size=256) | ...', or a .toml file.",
        show_default="exact",
    ),
]
BudgetText = Annotated[
    str | None, typer.Option("--budget", metavar="B", help="For example 'cosine>=0.999'.")
]


def read_policy(text: str | None) -> Policy:
    """A policy file when ``text`` names one, else a pipeline; ``exact`` when nothing was given."""
    from attn_rewrite.policy import Policy

    return Policy.of("exact" if text is None else text)


def read_budget(text: str | None) -> Budget | None:
    """The budget as text, or None."""
    from attn_rewrite.budget import Budget

    return None if text is None else Budget.parse(text)


def read_plan(path: Path | None) -> Plan | None:
    """A saved plan, or None."""
    if path is None:
        return None
    from attn_rewrite.errors import PolicyError
    from attn_rewrite.plan import Plan
    from attn_rewrite.tables import FILE

    try:
        return Plan.from_json(path.read_text(encoding="utf-8"), tables=path.with_name(FILE))
    except (OSError, UnicodeDecodeError) as error:
        raise PolicyError(f"the plan {path} cannot be read: {error}") from error
