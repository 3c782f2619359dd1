"""Generated kernels run under Triton's interpreter, in processes of their own.

Whether a kernel is interpreted is decided when ``triton.jit`` runs, so these tests cannot share a
process with those that compile.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
FOLDER = Path(__file__).parent / "interpreted"


LONGER = ["gradients", "serving", "edges", "quantised", "codes", "mutations", "long"]
FILES = [
    "kernels",
    *(pytest.param(name, marks=pytest.mark.slow) for name in LONGER),
]
SLOW = ["mutations", "long"]


@pytest.mark.parametrize("name", FILES)
def test_interpreted(name: str, tmp_path: Path) -> None:
    run(name, "not slow", tmp_path, 600)


@pytest.mark.matrix
@pytest.mark.parametrize("name", SLOW)
def test_interpreted_slowly(name: str, tmp_path: Path) -> None:
    run(name, "slow", tmp_path, 1800)


def run(name: str, marks: str, tmp_path: Path, seconds: int) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "ATTN_REWRITE_CACHE": str(tmp_path)}
    command = [
        sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist",
        "-W", "ignore::RuntimeWarning", "-m", marks, str(FOLDER / f"{name}.py"),
    ]  # fmt: skip
    done = subprocess.run(
        command,
        cwd=FOLDER.parents[1],
        env=environment,
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
