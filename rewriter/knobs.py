"""Every environment variable of the project, typed; nothing else reads the environment.

``ATTN_REWRITE_DUMP=DIR``    write every stage as text into DIR, numbered, only when it changed;
                             just in time, one folder per captured graph
``ATTN_REWRITE_DEBUG=0..4``  tell on standard error: 1 the plan, 2 also refusals, 3 also graphs and
                             cascades between passes, 4 also generated source
``ATTN_REWRITE_CACHE=DIR``   keep measurements of this machine in DIR, not in the user's cache
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path

from attn_rewrite.errors import PolicyError, ToolError

DUMP = "ATTN_REWRITE_DUMP"
DEBUG = "ATTN_REWRITE_DEBUG"
CACHE = "ATTN_REWRITE_CACHE"
DEBUG_LEVELS = ("silent", "plan", "refusals", "stages", "source")
# The debug level from which each kind of stage is told as well.
_LEVELS = {".json": 1, ".fx": 3, ".cascade": 3, ".py": 4}


@dataclass(frozen=True)
class Knobs:
    """Values set for a scope; None means "ask the environment"."""

    dump: Path | None = None
    debug: int | None = None


_ENVIRONMENT = Knobs()
_scope: ContextVar[Knobs] = ContextVar("attn_rewrite_knobs", default=_ENVIRONMENT)


def dump_directory() -> Path | None:
    """Where stages are written, or None."""
    scoped = _scope.get().dump
    if scoped is not None:
        return scoped
    value = os.environ.get(DUMP, "")
    return Path(value) if value else None


def debug_level() -> int:
    """How much is told on standard error, 0 to 4; `PolicyError` for anything else."""
    scoped = _scope.get().debug
    if scoped is not None:
        return scoped
    text = os.environ.get(DEBUG, "").strip() or "0"
    if not re.fullmatch("[0-4]", text):
        raise PolicyError(f"{DEBUG} is {text!r}; expected a level from 0 to 4")
    return int(text)


def cache_directory() -> Path:
    """Where measurements of this machine are kept; by default in the user's cache folder (XDG)."""
    if value := os.environ.get(CACHE, ""):
        return Path(value)
    user = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(user) if user else Path.home() / ".cache") / "attn-rewrite"


@contextmanager
def override(*, dump: Path | str | None = None, debug: int | None = None) -> Iterator[None]:
    """Set knobs for a ``with`` block (of this thread or task); None leaves one as it is."""
    if debug is not None and debug not in range(len(DEBUG_LEVELS)):
        raise PolicyError(f"debug level {debug} is not known; expected 0 to 4")
    knobs = _scope.get()
    if dump is not None:
        knobs = replace(knobs, dump=Path(dump))
    if debug is not None:
        knobs = replace(knobs, debug=debug)
    token = _scope.set(knobs)
    try:
        yield
    finally:
        _scope.reset(token)


def tell(level: int, text: str | Callable[[], str]) -> None:
    """Write ``text`` to standard error when the debug level is at least ``level``."""
    if debug_level() >= level:
        sys.stderr.write(f"[attn-rewrite] {text if isinstance(text, str) else text()}\n")


@dataclass
class Dumper:
    """Writes the stages of one run as ``00-capture.fx``, ``01-...``, and tells them when asked to.

    A stage that changed nothing writes nothing.  With ``directory=None`` no file is written, and
    texts given as functions are made only where the debug level asks for them.
    """

    directory: Path | None = None
    _count: int = field(default=0, init=False)
    _last: dict[tuple[str, str], str] = field(default_factory=dict, init=False)

    def write(
        self, stage: str, text: str | Callable[[], str], *, suffix: str = ".txt", of: str = ""
    ) -> None:
        """Write ``text`` unless it is what the last stage of the same subject and suffix had.

        ``suffix`` says what kind of text it is: ``.fx`` a graph, ``.cascade``, ``.json``, ``.py``;
        ``of`` is the subject, a Site's name, or empty for the whole model.  Raises `ToolError`
        where the folder cannot be written.
        """
        told = debug_level() >= _LEVELS.get(suffix, 3)
        if self.directory is None and not told:
            return
        content = text if isinstance(text, str) else text()
        if self._last.get((of, suffix)) == content:
            return
        self._last[of, suffix] = content
        if told:
            tell(0, f"{stage}\n{content}")
        if self.directory is not None:
            self._save(self.directory, stage + suffix, content)

    def _save(self, directory: Path, stage: str, content: str) -> None:
        name = re.sub(r"[^\w.=-]+", "-", stage).strip("-")
        path = directory / f"{self._count:02}-{name}"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            path.write_text(content if content.endswith("\n") else content + "\n", "utf-8")
        except OSError as error:
            raise ToolError(
                f"the stage {stage} cannot be written to {path}: {error.strerror or error}; "
                f"point {DUMP} at a writable folder",
                stage="dump",
            ) from error
        self._count += 1


def graph_directory() -> Path | None:
    """A folder of its own for the next graph of a model captured just in time: ``graph-00``, ..."""
    root = dump_directory()
    if root is None:
        return None
    taken = len(list(root.glob("graph-*"))) if root.is_dir() else 0
    return root / f"graph-{taken:02}"


def dumper() -> Dumper:
    """A new `Dumper` for one run, writing to `dump_directory`."""
    return Dumper(dump_directory())
