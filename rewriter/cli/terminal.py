"""What the command writes: one result on standard output, everything else on standard error.

Libraries print.  While a command runs, file descriptor 1 is standard error, for C++ code and child
processes too; only `Terminal.show` writes to the real standard output.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

_WIDTH_OF_FILES = 160


@dataclass
class Terminal:
    """Output of one run: ``json`` says in which form, ``debug`` whether errors show a traceback."""

    json: bool = False
    debug: bool = False
    _out: IO[str] | None = field(default=None, init=False)

    @contextmanager
    def capture_chatter(self) -> Iterator[None]:
        """Send everything written to standard output to standard error, except by `show`."""
        sys.stdout.flush()
        real, python = os.dup(1), sys.stdout
        os.dup2(2, 1)
        try:
            with os.fdopen(os.dup(real), "w", encoding="utf-8") as self._out:
                sys.stdout = sys.stderr
                yield
        finally:
            self._out, sys.stdout = None, python
            os.dup2(real, 1)
            os.close(real)

    def show(self, document: Mapping[str, Any], view: Callable[[Console], None]) -> None:
        """Write the result: ``document`` as JSON, or what ``view`` prints."""
        out = self._out or sys.stdout
        if self.json:
            out.write(json.dumps(plain(document), indent=2, ensure_ascii=False) + "\n")
        else:
            view(console(out))
        out.flush()

    def fail(self, error: BaseException, message: str, code: int) -> None:
        """Write an error: one sentence on standard error, and a document with ``--json``."""
        sentence = " ".join(message.split())
        sys.stderr.write(f"attn-rewrite: error: {sentence}\n")
        if self.json:
            document = {"type": type(error).__name__, "message": sentence, "exit_code": code}
            self.show({"error": document}, lambda _: None)

    def warn(self, message: str) -> None:
        """Write a sentence to standard error."""
        sys.stderr.write(f"attn-rewrite: {message}\n")

    @contextmanager
    def stage(self, what: str) -> Iterator[None]:
        """Say on standard error that something long runs: a spinner on a screen, else lines."""
        if sys.stderr.isatty():
            with console(sys.stderr).status(what):
                yield
            return
        start = time.perf_counter()
        sys.stderr.write(f"attn-rewrite: {what} ...\n")
        sys.stderr.flush()
        yield
        sys.stderr.write(f"attn-rewrite: {what}: {time.perf_counter() - start:.1f} s\n")

    @contextmanager
    def steps(self, what: str, counted: str) -> Iterator[Callable[[int, int, str], None]]:
        """A `stage` whose ``counted`` part is told (done, all, name): a bar on a screen, else one
        line for every tenth."""
        if not sys.stderr.isatty():
            with self.stage(what):
                yield _every_tenth(counted)
            return
        from rich.progress import Progress

        with Progress(console=console(sys.stderr), transient=True) as bar:
            stage = bar.add_task(what, total=None)
            task = bar.add_task(counted, total=None, visible=False)

            def told(done: int, total: int, name: str) -> None:
                label = f"{counted}: {name}"
                bar.update(task, completed=done, total=total, description=label, visible=True)

            yield told
            bar.update(stage, total=1, completed=1)


def _every_tenth(what: str) -> Callable[[int, int, str], None]:
    said = [-1]

    def told(done: int, total: int, name: str) -> None:
        tenth = 10 * done // max(total, 1)
        if tenth > said[0]:
            said[0] = tenth
            sys.stderr.write(f"attn-rewrite: {what}: {done} of {total} ({name})\n")
            sys.stderr.flush()

    return told


def console(stream: IO[str]) -> Console:
    """A rich console on ``stream``; files and pipes get a width that tables fit in."""
    from rich.console import Console

    wide = None if stream.isatty() or "COLUMNS" in os.environ else _WIDTH_OF_FILES
    return Console(file=stream, width=wide, highlight=False, emoji=False)


def plain(value: Any) -> Any:
    """The same value in what JSON has; numbers it has not (nan, inf) and objects as text."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in value]
    return str(value)
