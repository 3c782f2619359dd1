"""The command ``attn-rewrite``."""

from __future__ import annotations


def main() -> None:
    """Run the command and exit; the only entry point."""
    from attn_rewrite.cli.app import run

    raise SystemExit(run())
