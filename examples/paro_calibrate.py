"""PAROAttention on a video transformer: an order of tokens for each head, and its heaviest blocks.

    python examples/paro_calibrate.py [--frames 4] [--density 0.3]

The model has random weights, so its error says nothing about quality; what is shown is a
calibration that is interrupted and goes on, what was chosen for each head, and that the plan makes
the same model again without any samples.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

import attn_rewrite as ar

BLOCK = 16
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class SwitchedOffError(Exception):
    """What stands for a machine that was switched off."""


def interrupt(done: int, total: int, what: str) -> None:
    """Stop after the first Site of the first call."""
    print(f"calibrating {what}: {done} of {total}")
    raise SwitchedOffError


def samples(frames: int, count: int) -> list[Inputs]:
    g = torch.Generator().manual_seed(1)
    return [
        (torch.randn(1, 4, frames, 16, 16, generator=g), torch.tensor([500 - 100 * step]),
         torch.randn(1, 8, 16, generator=g))
        for step in range(count)
    ]  # fmt: skip


def main(frames: int, density: float) -> None:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=4,
        out_channels=4, text_dim=16, freq_dim=32, ffn_dim=64, num_layers=2,
    ).eval()  # fmt: skip
    paro = f"paro(density={density}, block={BLOCK})"
    policy = ar.Policy.from_toml(f'[[rule]]\nwhere = {{ kind = "self" }}\napply = "{paro}"')
    inputs, *calls = samples(frames, 3)
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder, "state")
        try:
            ar.optimize(model, policy, inputs, calibration=ar.Calibration(calls, state, interrupt))
        except SwitchedOffError:
            print(f"interrupted; {len(list(state.iterdir()))} file was written")
        told: list[str] = []
        going_on = ar.Calibration(calls, state, lambda done, total, what: told.append(what))
        rewritten = ar.optimize(model, policy, inputs, calibration=going_on)
        assert told[0] == "measured before", "what was measured is not measured again"
        ar.save(rewritten, Path(folder, "out"))
        plan = Path(folder, "out", "plan.json")
        tables = plan.with_suffix(".safetensors")
        replayed = ar.Plan.from_json(plan.read_text(), tables=tables)
        again = ar.optimize(model, "exact", inputs, plan=replayed)

    blocks = -(-frames * 64 // BLOCK)
    for step in rewritten.plan.steps:
        print(f"{step.site}: {step.text}")
    for name, table in rewritten.plan.tables.items():
        print(f"{name}: {table.mean(axis=(1, 2))} of the {blocks} x {blocks} blocks of each head")
        assert abs(table.mean() - density) < 0.01
    with torch.no_grad():
        first, second = rewritten(*inputs)[0], again(*inputs)[0]
    assert torch.equal(first, second), "the plan and its tables say everything"
    print(f"replayed from {plan.name} and plan.safetensors: the same numbers")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=4)
    parser.add_argument("--density", type=float, default=0.3)
    main(**vars(parser.parse_args()))
