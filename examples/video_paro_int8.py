"""PAROAttention in a video transformer: reordered tokens, the heaviest blocks, int8 products.

    python examples/video_paro_int8.py [--frames 6]

Orders and blocks are chosen on two calibration inputs, and for each head 8 bits only where they
keep its output.  The model has random weights, so its errors say nothing about quality; what is
shown is how the parts compose, what each of them adds to the error, and which tiles run.  The
groups that share a scale are the tiles: 64 tokens of the new order.
"""

from __future__ import annotations

import argparse

import torch

import attn_rewrite as ar

POLICY = """
[[rule]]
where = { kind = "self" }
apply = "paro(density=0.3) | int8(pv=true, q_block=64, k_block=64)"
"""


def main(frames: int) -> None:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=4,
        out_channels=4, text_dim=16, freq_dim=32, ffn_dim=64, num_layers=2,
    ).eval()  # fmt: skip

    def inputs() -> tuple[torch.Tensor, ...]:
        return torch.randn(1, 4, frames, 16, 16), torch.tensor([500]), torch.randn(1, 8, 16)

    example, calibration = inputs(), [inputs(), inputs()]
    rewritten = ar.optimize(
        model, ar.Policy.from_toml(POLICY), example, calibration=calibration,
    )  # fmt: skip
    with torch.no_grad():
        before, after = model(*example).sample, rewritten(*example)[0]
    cosine = torch.nn.functional.cosine_similarity(before.flatten(), after.flatten(), dim=0)
    print(f"output cosine {cosine:.6f}")
    for site in rewritten.report.sites:
        if not site.parts:
            continue
        assert site.cost_after is not None
        assert site.implementation is not None
        executed, total = site.cost_after.tiles or (0, 0)
        print(f"{site.name}: {executed} of {total} tiles run")
        for step, error in site.parts:
            print(f"  {step}\n    cosine {error.cosine:.6f}, relative L1 {error.relative_l1:.4f}")
        kernel, bound = site.implementation.max_abs, site.implementation_bound
        print(f"  the kernel itself: {kernel:.1e}, rounding explains {bound:.1e}")
        assert executed < total
        assert "int8" in site.steps[0]
    print(*rewritten.report.notes, sep="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=6)
    main(parser.parse_args().frames)
