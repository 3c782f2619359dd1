"""Running the command in a process of its own."""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COMMAND = (sys.executable, "-m", "attn_rewrite")
TIMEOUT = 300  # seconds


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """Standard output, which has to be exactly one JSON document."""
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The sentence after ``error:``, the only one there is."""
        lines = [line for line in self.err.splitlines() if line.startswith("attn-rewrite: error:")]
        assert len(lines) == 1, self.err
        return lines[0].removeprefix("attn-rewrite: error: ")


def attn_rewrite(
    *words: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> Outcome:
    """Run ``attn-rewrite WORDS`` without a terminal, in a process forked for it."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        for file in (out, err):
            file.touch()
        asked = {
            "argv": [*map(str, words)],
            "cwd": str(cwd or Path.cwd()),
            "env": {**os.environ, **(env or {})},
            "out": str(out),
            "err": str(err),
        }
        code = _answer(asked)
        return Outcome(code, out.read_text(), err.read_text())


def _answer(asked: Mapping[str, Any]) -> int:
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps(asked) + "\n")
    server.stdin.flush()
    ready, _, _ = select.select([server.stdout], [], [], TIMEOUT)
    line = server.stdout.readline() if ready else ""
    if not line:
        server.kill()
        _server.cache_clear()
        why = f"no answer in {TIMEOUT} s" if not ready else "the server ended"
        raise AssertionError(f"{asked['argv']}: {why}")
    return int(line)


@cache
def _server() -> subprocess.Popen[str]:
    """`tests.forking`, until this process ends."""
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.forking"], cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    atexit.register(server.kill)
    return server
