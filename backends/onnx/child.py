"""ONNX Runtime in a process of its own: its arena never adds to the caller's memory.

The child is ``python -m attn_rewrite.backends.onnx.child MODEL INPUTS OUTPUTS``; tensors travel as
``.npz`` files, so that nothing is pickled.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from attn_rewrite.backends.onnx.runtime import STAGE, open_session, run_session
from attn_rewrite.errors import AttnRewriteError, ToolError

TIMEOUT_SECONDS = 1800


def run_in_child(
    path: Path, inputs: Mapping[str, np.ndarray[Any, Any]]
) -> tuple[dict[str, np.ndarray[Any, Any]], int]:
    """Outputs by name, and the child's peak memory in bytes; `ToolError` where it fails."""
    with tempfile.TemporaryDirectory(prefix="attn-rewrite-") as folder:
        given, got = Path(folder, "inputs.npz"), Path(folder, "outputs.npz")
        np.savez(given, **dict(inputs))
        command = [sys.executable, "-m", __name__, str(Path(path).resolve()), str(given), str(got)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise ToolError(
                f"ONNX Runtime did not finish {path.name} in {TIMEOUT_SECONDS} s.", stage=STAGE
            ) from error
        if done.returncode != 0:
            raise ToolError(_message(path, done), stage=STAGE)
        with np.load(got) as arrays:
            return {name: arrays[name] for name in arrays.files}, int(json.loads(done.stdout))


def _message(path: Path, done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        return f"ONNX Runtime's process on {path.name} was killed by signal {-done.returncode}."
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"ONNX Runtime's process on {path.name} failed."


def main(arguments: list[str]) -> int:
    """Run a model once; prints the peak memory in bytes, errors as one line on stderr."""
    model, given, got = (Path(a) for a in arguments)
    try:
        session = open_session(model)
        with np.load(given) as arrays:
            outputs = run_session(session, {name: arrays[name] for name in arrays.files})
    except AttnRewriteError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    np.savez(got, **outputs)
    scale = 1 if sys.platform == "darwin" else 1024
    sys.stdout.write(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
