"""Sinks and recent keys in a language model, applied at lengths the example inputs did not have.

    python examples/long_context_streaming.py [--length 4096]

The model has random weights.  It is captured once on a short text with a dynamic length; the mask
is an expression over positions, so the same module runs any length and skips more of a longer one.
"""

from __future__ import annotations

import argparse

import torch
from torch.export import Dim

import attn_rewrite as ar
from attn_rewrite.simulate.mask import count_mask
from attn_rewrite.token_layout import TokenLayout

RECENT, SINKS = 64, 4


def reference(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """The model with the mask given from outside, as a dense matrix."""
    at = torch.arange(tokens.shape[1])
    near = at[:, None] - at < RECENT
    keep = (at <= at[:, None]) & (near | (at < SINKS))
    bias = torch.zeros(1, 1, *keep.shape).masked_fill(~keep, torch.finfo(torch.float32).min)
    return model(tokens, attention_mask=bias, use_cache=False).last_hidden_state


def main(length: int) -> None:
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=128, vocab_size=256, max_position_embeddings=8192,
    )  # fmt: skip
    model = LlamaModel(config).eval()
    short, long = torch.randint(0, 256, (1, 256)), torch.randint(0, 256, (1, length))

    policy = f"streaming(recent={RECENT}, sinks={SINKS})"
    rewritten = ar.optimize(
        model, policy, (), {"input_ids": short, "use_cache": False},
        dynamic_shapes={"input_ids": {1: Dim.DYNAMIC(min=16, max=8192)}, "use_cache": None},
    )  # fmt: skip
    with torch.no_grad():
        for tokens in (short, long):
            found = rewritten(input_ids=tokens, use_cache=False).last_hidden_state
            torch.testing.assert_close(found, reference(model, tokens), atol=2e-4, rtol=2e-4)
            size = tokens.shape[1]
            kept = count_mask(policy, TokenLayout((size,)), block=64, causal=True).to_json()
            dense = count_mask("exact", TokenLayout((size,)), block=64, causal=True).to_json()
            print(
                f"{size} tokens: {kept['blocks_kept']} of {dense['blocks_kept']} causal blocks, "
                "equal to the dense mask"
            )
    assert kept["blocks_kept"] < dense["blocks_kept"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=1024)
    main(parser.parse_args().length)
