"""The texts of the demo, cut to sizes at which a window of 64 tokens is felt."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent / "texts"


def texts() -> list[str]:
    """Two dozen essays of some 340 tokens, in the order of their names."""
    return [" ".join(path.read_text("utf-8").split()) for path in sorted(FOLDER.glob("*.txt"))]


def pairs() -> list[str]:
    """Each essay followed by the next one: more than 512 tokens."""
    essays = texts()
    return [f"{a} {b}" for a, b in zip(essays, essays[1:] + essays[:1], strict=True)]


# What is embedded: name -> (texts, tokens that are kept of each).
CUTS = {
    "256 tokens": (texts(), 256),
    "whole texts": (texts(), 512),
    "512 tokens": (pairs(), 512),
}
