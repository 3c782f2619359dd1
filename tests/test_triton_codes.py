"""The kernel that makes integer codes compiles ahead of time for every target, without spills."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("triton")

from attn_rewrite.backends.triton.aot import TARGETS, parse_target
from attn_rewrite.backends.triton.quantise_kernel import quantise_kernel
from attn_rewrite.backends.triton.quantise_ops import constants

TYPES = {
    "x": "*{}", "index": "*i64", "mean": "*fp64", "given": "*fp64", "codes": "*i8",
    "scales": "*fp32", "heads": "i32", "length": "i32", "groups": "i32", "largest": "fp32",
    "smallest": "fp32",
} | {f"stride_{d}": "i64" for d in "bhnd"}  # fmt: skip
# Of what a kernel is for: reads 16-bit tokens in another order, takes a mean off, gives int8.
CALLS = {
    "blocks": (64, False, True, False),
    "tokens": (1, True, True, False),
    "channels": (1, True, True, True),
}


def compiled(target, call, channels, dtype="bf16"):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    group, gathered, smooth, given = CALLS[call]
    x = torch.empty(1, 2, 100, channels, device="meta")
    row = torch.empty(1, 2, channels, device="meta")
    index = torch.empty(100, device="meta") if gathered else None
    held = constants(
        x, index, row if smooth else None, row if given else None, group, away=False
    )  # fmt: skip
    types = {n: t.format(dtype) for n, t in TYPES.items()} | dict.fromkeys(held, "constexpr")
    device = parse_target(target)
    warp = 64 if device.backend == "hip" else 32
    return triton.compile(
        ASTSource(quantise_kernel, types, held), target=GPUTarget(device.backend, device.arch, warp)
    )


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("target", TARGETS)
def test_it_compiles(target):
    """Scales are divided in float64, as the oracle divides."""
    text = compiled(target, "blocks", 64)
    if target.startswith("cuda"):
        ptx = text.asm["ptx"]
        assert "st.global" in ptx
        assert re.search(r"div\.rn\.f64", ptx)


@pytest.mark.parametrize("call", ["tokens", "channels"])
@pytest.mark.parametrize("channels", [40, 128])
def test_every_kind_of_scale_compiles(call, channels):
    assert "st.global" in compiled("cuda:90", call, channels, "fp16").asm["ptx"]


@pytest.mark.parametrize("channels", [64, 128, 256])
def test_nothing_spills(channels):
    from attn_rewrite.backends.triton.aot import _ptxas

    registers, spilled = _ptxas(compiled("cuda:90", "blocks", channels).asm["ptx"], 90)
    assert spilled == 0
    assert registers <= 255
