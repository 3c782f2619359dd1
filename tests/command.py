"""Running the real command in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COMMAND = (sys.executable, "-m", "attn_rewrite")


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
    """Run ``attn-rewrite WORDS`` without a terminal."""
    done = subprocess.run(
        [*COMMAND, *map(str, words)],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)
