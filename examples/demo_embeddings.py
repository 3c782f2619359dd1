"""Embeddings of real texts: the original model, the rewritten one in PyTorch, and in ONNX Runtime.

    python examples/demo_embeddings.py CHECKPOINT build/demo

CHECKPOINT is all-MiniLM-L6-v2; the folder holds what ``attn-rewrite optimize`` wrote: ``exact``,
``window`` and ``window-512``.  Nothing of the process that rewrote the model is left here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
from demo_texts import CUTS
from rich.console import Console
from rich.table import Table
from sentence_transformers import SentenceTransformer
from transformers.utils import logging

import attn_rewrite as ar

BATCH = 8
Embed = Callable[[list[str], int], np.ndarray]


def encode(sentences: SentenceTransformer, texts: list[str], tokens: int) -> np.ndarray:
    """Embed with the truncation set explicitly: this checkpoint would cut at 256 by itself."""
    sentences.max_seq_length = tokens
    return sentences.encode(texts, batch_size=BATCH, show_progress_bar=False)


def original(checkpoint: Path) -> Embed:
    sentences = SentenceTransformer(str(checkpoint), device="cpu")
    return lambda texts, tokens: encode(sentences, texts, tokens)


def in_pytorch(checkpoint: Path, folder: Path) -> Embed:
    """The saved program inside sentence-transformers: its tokenizer, pooling and normalisation."""
    sentences = SentenceTransformer(str(checkpoint), device="cpu")
    sentences[0].model = ar.load(folder)
    return lambda texts, tokens: encode(sentences, texts, tokens)


def in_onnxruntime(checkpoint: Path, folder: Path) -> Embed:
    """The exported file, with pooling and normalisation written out."""
    tokenize = SentenceTransformer(str(checkpoint), device="cpu").tokenizer
    session = onnxruntime.InferenceSession(
        folder / "model.onnx", providers=["CPUExecutionProvider"]
    )
    names = [value.name for value in session.get_inputs()]

    def embed(texts: list[str], tokens: int) -> np.ndarray:
        rows = []
        for start in range(0, len(texts), BATCH):
            some = texts[start : start + BATCH]
            batch = tokenize(
                some, max_length=tokens, truncation=True, padding=True, return_tensors="np"
            )
            (hidden,) = session.run(["last_hidden_state"], {n: batch[n] for n in names})
            weights = batch["attention_mask"][..., None].astype(hidden.dtype)
            mean = (hidden * weights).sum(1) / weights.sum(1)
            rows.append(mean / np.linalg.norm(mean, axis=1, keepdims=True))
        return np.concatenate(rows)

    return embed


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine similarity of each row of ``a`` with the same row of ``b``."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


def same_neighbour(a: np.ndarray, b: np.ndarray) -> float:
    """Share of texts whose most similar other text is the same in both embeddings."""

    def nearest(rows: np.ndarray) -> np.ndarray:
        likeness = rows @ rows.T
        np.fill_diagonal(likeness, -1)
        return likeness.argmax(1)

    return float((nearest(a) == nearest(b)).mean())


def tiles(folder: Path) -> tuple[int, int]:
    """Score tiles executed, and of a dense attention, over all sites of a report."""
    sites = json.loads((folder / "report.json").read_text("utf-8"))["sites"]
    counts = [site["cost_after"]["tiles"] for site in sites]
    return sum(c["executed"] for c in counts), sum(c["total"] for c in counts)


def compare(checkpoint: Path, out: Path) -> dict[tuple[str, str, str], np.ndarray]:
    """Cosine with the original per (policy, runtime, cut); prints the table."""
    table = Table("policy", "runtime", "texts", "lowest cosine", "mean cosine", "same neighbour")
    reference = {cut: original(checkpoint)(*CUTS[cut]) for cut in CUTS}
    found = {}
    for policy in ("exact", "window"):
        for runtime, make in (("PyTorch", in_pytorch), ("ONNX Runtime", in_onnxruntime)):
            embed = make(checkpoint, out / policy)
            for cut, (texts, tokens) in CUTS.items():
                rows = embed(texts, tokens)
                found[policy, runtime, cut] = likeness = cosines(rows, reference[cut])
                neighbour = f"{same_neighbour(rows, reference[cut]):.0%}"
                numbers = (f"{likeness.min():.7f}", f"{likeness.mean():.7f}")
                table.add_row(policy, runtime, cut, *numbers, neighbour)
    Console(width=100).print(table)
    return found


def main(checkpoint: Path, out: Path) -> None:
    logging.disable_progress_bar()
    texts, _ = CUTS["whole texts"]
    print(f"cosine with the original embeddings, {len(texts)} texts")
    found = compare(checkpoint, out)
    for length, folder in ((256, "window"), (512, "window-512")):
        executed, total = tiles(out / folder)
        print(
            f"window(size=64) at length {length}: {executed} of {total} score tiles executed "
            f"({executed / total:.0%})"
        )
        assert executed < total, "the window skips nothing"
    for (policy, runtime, cut), likeness in found.items():
        if policy == "exact":
            assert likeness.min() >= 0.99999, (runtime, cut, likeness.min())
        else:
            assert likeness.max() < 0.99999, (runtime, cut, "the window is not felt")
    print("exact is the original (cosine >= 0.99999 everywhere); the window costs what is shown")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
