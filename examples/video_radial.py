"""Radial attention in a video transformer: dense first layer, bands between frames in the others.

    python examples/video_radial.py [--frames 24]

The model has random weights, so its error says nothing about quality; what is shown is how the
layout is found in the graph, which blocks are kept, and what the report measures.
"""

from __future__ import annotations

import argparse

import torch

import attn_rewrite as ar
from attn_rewrite.simulate.mask import count_mask
from attn_rewrite.token_layout import TokenLayout

POLICY = """
[[rule]]
where = { layer = "blocks.0.attn1" }
apply = "exact"

[[rule]]
where = { kind = "self" }
apply = "radial(gamma=0.2)"
"""


def main(frames: int) -> None:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=4,
        out_channels=4, text_dim=16, freq_dim=32, ffn_dim=64, num_layers=2,
    ).eval()  # fmt: skip
    # 16 x 16 tokens per frame: two blocks of 128.
    inputs = (torch.randn(1, 4, frames, 32, 32), torch.tensor([500]), torch.randn(1, 8, 16))

    rewritten = ar.optimize(model, ar.Policy.from_toml(POLICY), inputs)
    with torch.no_grad():
        before, after = model(*inputs).sample, rewritten(*inputs)[0]
    cosine = torch.nn.functional.cosine_similarity(before.flatten(), after.flatten(), dim=0)
    print(f"output cosine {cosine:.6f}")
    for site in rewritten.report.sites:
        steps = ", ".join(str(s) for s in site.steps)
        print(f"{steps}: tiles {site.cost_after.tiles if site.cost_after else None}")
    sparse = next(s for s in rewritten.report.sites if s.name.startswith("blocks.1.attn1"))
    assert sparse.cost_after is not None
    executed, total = sparse.cost_after.tiles
    assert executed < total, "far frames are thinned out"

    full = count_mask("radial(gamma=0.2)", TokenLayout((18, 3840))).to_json()
    print(f"Wan 2.1 at 768 x 1280 x 69: {full['block_density']:.5f} of the blocks are kept")
    assert abs(full["block_density"] - 0.28713) < 1e-5


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=12)
    main(parser.parse_args().frames)
