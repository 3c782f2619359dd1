"""ONNX Runtime in a process of its own: its arena never adds to the caller's memory.

The child is ``python -m attn_rewrite.backends.onnx.child MODEL FOLDER``; tensors travel through
safetensors files in the folder, one per run, so that nothing is pickled.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from attn_rewrite.backends.onnx.runtime import STAGE, open_session, run_session
from attn_rewrite.errors import AttnRewriteError, ToolError

TIMEOUT_SECONDS = 1800
Arrays = dict[str, np.ndarray[Any, Any]]


def run_in_child(path: Path, runs: Sequence[Arrays]) -> tuple[list[Arrays], int]:
    """Outputs by name of every run, and the child's peak memory in bytes.

    One process and one session for all ``runs``; `ToolError` where it fails.
    """
    with tempfile.TemporaryDirectory(prefix="attn-rewrite-") as name:
        folder = Path(name)
        for index, inputs in enumerate(runs):
            contiguous = {n: np.ascontiguousarray(a).reshape(a.shape) for n, a in inputs.items()}
            save_file(contiguous, folder / f"{index}.in")
        # -P: a stray file beside the caller must not shadow a module of the child.
        command = [sys.executable, "-P", "-m", __name__, str(Path(path).resolve()), name]
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
        outputs: list[Arrays] = [load_file(folder / f"{i}.out") for i in range(len(runs))]
        return outputs, int(json.loads(done.stdout))


def _message(path: Path, done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        return f"ONNX Runtime's process on {path.name} was killed by signal {-done.returncode}."
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"ONNX Runtime's process on {path.name} failed."


def main(arguments: list[str]) -> int:
    """Run a model on every input file; prints the peak memory in bytes, errors as one line."""
    model, folder = (Path(a) for a in arguments)
    try:
        session = open_session(model, prepack=False)
        for given in sorted(folder.glob("*.in")):
            outputs = run_session(session, load_file(given))
            save_file(outputs, given.with_suffix(".out"))
    except AttnRewriteError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    scale = 1 if sys.platform == "darwin" else 1024
    sys.stdout.write(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
