"""A decoder that keeps its keys and values in four bits.

    python examples/decode_packed_cache.py [--tokens 12]

The policy ``kv_int4`` says how the cache is coded (KIVI: keys in groups of tokens of a channel,
values in groups of channels of a token, the last tokens as they are); ``with_packed_cache`` gives a
decoder that stores it so.  The same tokens are fed to the model with its own cache, and logits and
bytes are compared.
"""

from __future__ import annotations

import argparse

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import attn_rewrite as ar


def main(tokens: int) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    prompt = torch.randint(0, 64, (1, 500))
    optimized = ar.optimize(model, "kv_int4(group=32, residual=64)", (prompt[:, :8].contiguous(),))
    decoder, cache = optimized.with_packed_cache(), DynamicCache()
    with torch.no_grad():
        found = decoder(prompt).logits
        wanted = model(prompt, past_key_values=cache).logits
        for _ in range(tokens):
            token = wanted[:, -1:].argmax(-1)
            found = decoder(token).logits
            wanted = model(token, past_key_values=cache).logits
            cosine = torch.nn.functional.cosine_similarity(found, wanted, dim=-1).min()
            print(f"token {decoder.length}: cosine of the logits {float(cosine):.6f}")
            assert cosine > 0.99
    whole = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    print(f"{decoder.nbytes} bytes of cache, {whole} in floating point")
    assert decoder.nbytes < whole / 2


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=12)
    main(parser.parse_args().tokens)
