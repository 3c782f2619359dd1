"""The command's entry: parse, run, and turn every outcome into an exit code and one sentence."""

from __future__ import annotations

import errno
import importlib
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer
import typer.main

from attn_rewrite.cli import simulate
from attn_rewrite.cli.options import command
from attn_rewrite.cli.terminal import Terminal
from attn_rewrite.errors import AttnRewriteError

DONE, NOTHING_DONE, USAGE, TOOL, INTERNAL, INTERRUPTED, TERMINATED = 0, 1, 2, 5, 70, 130, 143

# Every command is the function of its own name in a module of its own name.
COMMANDS = ("inspect", "explain", "optimize", "verify", "bench", "policies", "cascade", "doctor")

app = typer.Typer(
    name="attn-rewrite",
    help="Find the attention in a model, rewrite it by a policy, and prove the numbers.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _version(asked: bool) -> None:
    if asked:
        import attn_rewrite

        typer.echo(f"attn-rewrite {attn_rewrite.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    pass


for _name in COMMANDS:
    _module = importlib.import_module(f"attn_rewrite.cli.{_name}")
    app.command(_name)(command(getattr(_module, _name)))
app.add_typer(simulate.app, name="simulate")


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code, never raises."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    terminal = Terminal(json="--json" in words, debug="--debug" in words)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = typer.main.get_command(app).main(
            words, prog_name="attn-rewrite", standalone_mode=False, obj=terminal
        )
        return DONE if code is None else int(code)
    except BaseException as error:
        return _failed(error, terminal)


def _terminate(signum: int, frame: Any) -> NoReturn:
    # As an exception, so that temporary folders are removed on the way out.
    raise SystemExit(TERMINATED)


def _failed(error: BaseException, terminal: Terminal) -> int:
    """Say what went wrong and return the exit code for it."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else INTERNAL
    if isinstance(error, BrokenPipeError):  # the reader of a pipe has seen enough
        sys.stderr.close()
        return NOTHING_DONE
    code, message = outcome(error)
    if terminal.debug:
        traceback.print_exception(error)
    if message:
        terminal.fail(error, message, code)
    return code


def outcome(error: BaseException) -> tuple[int, str]:
    """Exit code and sentence of an exception."""
    name = type(error).__name__
    if isinstance(error, AttnRewriteError):
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return INTERRUPTED, "interrupted; no output folder was changed"
    if hasattr(error, "format_message"):
        return USAGE, _usage(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" while writing {error.filename}" if error.filename else ""
        return TOOL, f"the disk is full{where}; free some space and run the command again"
    if isinstance(error, MemoryError) or name == "OutOfMemoryError":
        return TOOL, f"out of memory ({_brief(error)}); use a smaller --batch or --length"
    return INTERNAL, (
        f"internal error, {name}: {_brief(error)}; this is a bug in attn-rewrite: please report it "
        "with what --debug prints"
    )


def _brief(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:300]


def _usage(error: Any) -> str:
    """The sentence of a usage error, with the nearest names and where help is."""
    ctx = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        return ""
    message = error.format_message().rstrip(".")
    path = ctx.command_path if ctx else "attn-rewrite"
    return f"{message}; see {path} --help"
