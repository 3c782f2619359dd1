"""Processes that examine rows: a library that crashes or hangs costs one row, not the run."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from types import TracebackType

from tests.zoo.rows import Result

# Seconds for one row; the slowest take a tenth of it on a machine that does nothing else.
LIMIT = 900.0


class Bench:
    """One worker process at a time, for one library: stubs and patches of one never reach
    another."""

    def __init__(self) -> None:
        self._worker: subprocess.Popen[str] | None = None
        self._library = ""

    def __enter__(self) -> Bench:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def examine(
        self, name: str, dtypes: tuple[str, ...] = ("float32",), *, fixed: bool = False
    ) -> Result:
        """The result of a row; a crash or a row over the time limit is its problem."""
        library = name.partition("/")[0]
        if self._worker is None or library != self._library:
            self._stop()
            self._worker, self._library = _start(), library
        assert self._worker.stdin is not None
        assert self._worker.stdout is not None
        sizes = "fixed" if fixed else "any"
        self._worker.stdin.write(" ".join((name, sizes, *dtypes)) + "\n")
        self._worker.stdin.flush()
        ready, _, _ = select.select([self._worker.stdout], [], [], LIMIT)
        line = self._worker.stdout.readline() if ready else ""
        if line:
            return Result(**json.loads(line))
        code = self._worker.poll()
        self._stop()
        problem = f"the process ended with {code}" if ready else f"no result in {LIMIT:.0f} s"
        return Result(name, stage="failed", problem=problem)

    def _stop(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            self._worker.communicate()
            self._worker = None


def _start() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.zoo.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
