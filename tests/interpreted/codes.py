"""The kernel that makes integer codes, under Triton's interpreter, against the stages themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import attn_rewrite as ar
from attn_rewrite.backends.torch.einsums import emit_stages
from attn_rewrite.backends.triton.quantise import coded, emit_fused, fold_gathers
from attn_rewrite.backends.triton.quantise_ops import quantise_tokens
from attn_rewrite.cascade.staged import as_staged, stages_of
from attn_rewrite.errors import LowerError
from attn_rewrite.graph import EagerBuilder, op_name
from attn_rewrite.policy_text import parse_pipeline
from tests.sites import make_site

EAGER = EagerBuilder()


def stages(text, **facts):
    site = make_site(**facts)
    (scheme,) = parse_pipeline(text)
    return stages_of(as_staged(scheme.apply(site.cascade, site)))


def operands(hq, hkv, q, kv, d, f, dtype, seed, size=1.0):
    g = torch.Generator().manual_seed(seed)
    shapes = {"Q": (2, q, hq, d), "K": (2, kv, hkv, d), "V": (2, kv, hkv, f)}
    return {
        n: (size * (torch.randn(s, generator=g) + 0.5)).to(dtype).transpose(1, 2)
        for n, s in shapes.items()
    }


def same(held, inputs):
    """Codes to the last bit; scales to that of float32."""
    given = {t.name: inputs[t.name] for t in held.inputs}
    found, wanted = emit_fused(EAGER, held, given), emit_stages(EAGER, held, given)
    assert set(found) == set(held.outputs)
    for name in held.outputs:
        if name in ("QI", "KI", "VI"):
            assert torch.equal(found[name].double(), wanted[name].double()), name
        else:
            assert torch.allclose(found[name].double(), wanted[name].double(), rtol=1e-7, atol=0)


# What the kernel makes of each scheme: operands and tokens that share a scale (0: channels).
SCHEMES = {
    "int8": {"Q": 128, "K": 64},
    "int8(pv=true)": {"Q": 128, "K": 64, "V": 0},
    "int8(pv=true, smooth_v=false, smooth_k=false)": {"Q": 128, "K": 64, "V": 0},
    "int8(q_block=5, k_block=7, rounding='away')": {"Q": 5, "K": 7},
    "int8(granularity='token')": {"Q": 1, "K": 1},
    "int8(granularity='warp')": {"Q": 32, "K": 64},
    "int4(granularity='block', smooth_q=false)": {"Q": 128, "K": 64},
    "int4(granularity='token', pv=true)": {"K": 1, "V": 0},
    "int8(granularity='thread', pv='fp8')": {},
    "int8(rotate=true)": {},
    "fp8": {},
    "kv_int8": {},
}


@pytest.mark.parametrize("text", SCHEMES)
def test_what_the_kernel_makes(text):
    held = stages(text, hq=4, hkv=2, q_len=70, kv_len=83, d_qk=24, d_v=40)
    assert {c.operand: c.group for c in coded(held)} == SCHEMES[text]
    same(held, operands(4, 2, 70, 83, 24, 40, torch.float32, 0))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    text=st.sampled_from([t for t, made in SCHEMES.items() if made]),
    q=st.integers(1, 150), kv=st.integers(1, 150), d=st.integers(1, 70), f=st.integers(1, 40),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    size=st.sampled_from([1e-6, 1.0, 1e3]), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape(text, q, kv, d, f, dtype, size, seed):
    held = stages(text, hq=2, hkv=1, q_len=q, kv_len=kv, d_qk=d, d_v=f)
    same(held, operands(2, 1, q, kv, d, f, dtype, seed, size))


def test_blocks_of_zeros_constants_and_what_is_no_number():
    x = torch.zeros(1, 1, 12, 3)
    x[:, :, 4:8] = 2.5
    x[0, 0, 9, 1] = torch.nan
    before = x.clone()
    codes, scales = quantise_tokens(x, None, None, None, 4, 127.0, False)
    assert torch.equal(codes[0, 0, :8], torch.tensor([[0] * 3] * 4 + [[127] * 3] * 4))
    assert (scales[0, 0, :2] == torch.tensor([1e-30 / 127, 2.5 / 127])).all()
    assert scales[0, 0, 2].isnan()
    assert torch.equal(x.nan_to_num(7), before.nan_to_num(7))
    constant = torch.full((1, 1, 5, 3), 4.0)
    mean = constant.double().mean(2)
    assert not quantise_tokens(constant, None, mean, None, 2, 127.0, False)[0].any()


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("group", [1, 5, 64])
def test_tokens_in_another_order(per_head, group):
    """Gathered by the kernel or before it: the same codes."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 21, 6, generator=g).to(torch.float16)
    mean = x.double().mean(2)
    orders = torch.stack([torch.randperm(21, generator=g) for _ in range(3)])
    if per_head:
        index = (orders + torch.arange(3)[:, None] * 21).reshape(-1)
        moved = x.gather(2, orders[None, :, :, None].expand(2, -1, -1, 6))
    else:
        index = orders[0]
        moved = x[:, :, index]
    found = quantise_tokens(x, index, mean, None, group, 127.0, False)
    wanted = quantise_tokens(moved, None, mean, None, group, 127.0, False)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


class Grid(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(16, 48)

    def forward(self, x):
        q, k, v = self.qkv(x).view(-1, 24, 3, 2, 8).permute(2, 0, 3, 1, 4)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return y.transpose(1, 2).reshape(-1, 24, 16)


@pytest.mark.parametrize(("order", "left"), [("'hwf'", 2), ("['hwf', 'whf']", 1)])
def test_a_reordering_is_read_by_the_kernels(order, left):
    """Where heads have orders of their own no operand is gathered; one order for all has moved up to
    the layer's input by then.  The output is put back, and errors are those of rounding."""
    torch.manual_seed(0)
    model, x = Grid().eval(), torch.randn(2, 24, 16)
    policy = f"reorder(order={order}, layout='grid=2x3x4') | int8(pv=true, q_block=8, k_block=8)"
    run = ar.optimize(model, policy, (x,), backend="triton")
    nodes = [op_name(n) for n in run.graph_module.graph.nodes]
    assert nodes.count("attn_rewrite::quantise_tokens") == 3
    assert nodes.count("index_select") == left
    assert run.report.gathers["left"] == left
    plain = ar.optimize(model, policy, (x,), backend="torch")
    with torch.no_grad():
        assert torch.allclose(run(x), plain(x), atol=1e-6)
    assert fold_gathers(run.graph_module.graph) == 0


def test_no_gradient_is_said():
    x = torch.randn(1, 1, 4, 4, requires_grad=True)
    with pytest.raises(LowerError, match="have no gradient"):
        quantise_tokens(x, None, None, None, 2, 127.0, False)[1].sum().backward()
