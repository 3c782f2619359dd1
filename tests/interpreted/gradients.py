"""Backward kernels and operators against float64 autograd, under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

import attn_rewrite as ar
from attn_rewrite.backends.triton.lower import lower
from attn_rewrite.cascade.attention import softmax_cascade
from attn_rewrite.errors import LowerError
from attn_rewrite.graph import EagerBuilder
from tests.interpreted.dense import CASES, bound, inputs_for, reference

SIZES = {"b": 1, "h": 4, "group": 2, "q": 21, "kv": 21, "d": 16, "f": 24}


def output(case, x, dropout=0.0):
    """AV of the operator, differentiable."""
    kernel = lower(softmax_cascade(case.form(2), "case"), dropout=dropout)
    return kernel.emit(EagerBuilder(), list(x.values()))


def leaves(x, dtype):
    return {n: t.to(dtype).requires_grad_() if t.is_floating_point() else t for n, t in x.items()}


def gradients(out, x, pull):
    asked = [t for t in x.values() if t.requires_grad]
    return torch.autograd.grad(out, asked, pull.to(out.dtype))


@pytest.mark.parametrize(
    "name", ["dense", "causal", "window", "late", "dilated ahead", "bias", "soft cap", "alibi",
             "sink logit"],
)  # fmt: skip
def test_gradients(name):
    case = CASES[name]
    x = inputs_for(case, SIZES, torch.float32, 11)
    pull = torch.randn(1, 4, 21, 24)
    mine, exact, plain = (leaves(x, d) for d in (torch.float32, torch.float64, torch.float32))
    found = gradients(output(case, mine), mine, pull)
    wanted = gradients(reference(case, exact, torch.float64)[0], exact, pull)
    rounded = gradients(reference(case, plain, torch.float32)[0], plain, pull)
    for got, want, low in zip(found, wanted, rounded, strict=True):
        assert got.shape == want.shape
        assert torch.isfinite(got).all()
        # Two sums of products follow one another, each with an error of its own.
        assert (got.double() - want).abs().max() <= 2 * bound(want, low, torch.float32)


def test_a_factor_at_computed_coordinates_has_no_gradient_here():
    case = CASES["factor"]
    x = leaves(inputs_for(case, SIZES, torch.float32, 12), torch.float32)
    out = output(case, x)
    with pytest.raises(LowerError, match="computed coordinates"):
        out.sum().backward()


def test_gradients_of_the_operands_beside_a_factor():
    case = CASES["factor"]
    x = inputs_for(case, SIZES, torch.float32, 12)
    pull = torch.randn(1, 4, 21, 24)
    mine, exact = leaves(x, torch.float32), leaves(x, torch.float64)
    mine["toeplitz"] = mine["toeplitz"].detach()
    exact["toeplitz"] = exact["toeplitz"].detach()
    found = gradients(output(case, mine), mine, pull)
    wanted = gradients(reference(case, exact, torch.float64)[0], exact, pull)
    for got, want in zip(found, wanted, strict=True):
        assert (got.double() - want).abs().max() <= 2e-5 * want.abs().max()


# Dropout


def philox(seed: int, counters: list[torch.Tensor]) -> torch.Tensor:
    """The first word of Philox-4x32-10, written from Salmon et al., SC 2011."""
    mask = 0xFFFFFFFF
    c = [t.to(torch.int64) for t in counters]
    k0, k1 = seed & mask, (seed >> 32) & mask
    m0, m1, w0, w1 = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85

    def product(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        low = (a & 0xFFFF) * b
        high = (a >> 16) * b + (low >> 16)
        return (high >> 16) & mask, ((high << 16) | (low & 0xFFFF)) & mask

    for _ in range(10):
        h0, l0 = product(m0, c[0])
        h1, l1 = product(m1, c[2])
        c = [h1 ^ c[1] ^ k0, l1, h0 ^ c[3] ^ k1, l0]
        k0, k1 = (k0 + w0) & mask, (k1 + w1) & mask
    return c[0]


def test_dropout_is_philox_of_the_coordinates_forward_and_backward():
    from attn_rewrite.backends.triton import ops  # noqa: F401
    from attn_rewrite.backends.triton.lower import with_dropout

    case, rate, seed = CASES["causal"], 0.3, 1234567
    x = inputs_for(case, SIZES, torch.float32, 13)
    text = str(with_dropout(softmax_cascade(case.form(2), "case")))
    b, h, q, kv = torch.meshgrid(*(torch.arange(n) for n in (1, 4, 21, 21)), indexing="ij")
    bits = philox(seed, [kv, q, h, b])
    signed = torch.where(bits >= 2**31, bits - 2**32, bits)
    uniform = torch.where(signed < 0, -signed - 1, signed) * 4.6566127342e-10
    factor = torch.where(uniform >= rate, 1 / (1 - rate), 0.0)
    assert 0.6 < (factor > 0).double().mean() < 0.8
    mine, exact = leaves(x, torch.float32), leaves(x, torch.float64)
    out, _ = torch.ops.attn_rewrite.triton_cascade(
        list(mine.values()), torch.tensor([seed]), text, "", rate
    )
    k, v = (exact[n].repeat_interleave(2, 1) for n in "KV")
    s = (exact["Q"] @ k.mT * 0.25).masked_fill(q < kv, -torch.inf)
    wanted = (s.softmax(-1) * factor.double()) @ v
    assert (out.double() - wanted).abs().max() < 2e-6
    pull = torch.randn(1, 4, 21, 24)
    pairs = zip(gradients(out, mine, pull), gradients(wanted, exact, pull), strict=True)
    for got, want in pairs:
        assert (got.double() - want).abs().max() <= 2e-5 * want.abs().max()


# Tuning


def test_tuned_schedules_of_the_backward_are_found_and_used(tmp_path, monkeypatch):
    """One timing for a class of shapes; the operator then takes the schedule from disk."""
    from attn_rewrite.backends.triton import autotune, launch, prepare, tune

    monkeypatch.setenv("ATTN_REWRITE_CACHE", str(tmp_path))
    autotune.remembered.cache_clear()
    case = CASES["bias"]
    x = inputs_for(case, SIZES, torch.float32, 14)
    cascade, timed = softmax_cascade(case.form(2), "case"), []
    costs = lambda call: timed.append(call) or -float(len(timed))  # the last one is the fastest  # noqa: E731
    monkeypatch.setattr(tune, "milliseconds", costs)
    found = tune.tune_backward(cascade, x, ["bias"])
    assert set(found) == {"queries", "keys", "reads"}
    count = len(timed)
    assert 3 < count <= 3 * 24
    assert tune.tune_backward(cascade, x, ["bias"]) == found
    assert len(timed) == count
    assert len(list((tmp_path / "triton-tuned").iterdir())) == 3

    monkeypatch.setattr(prepare, "is_tuned_for", lambda device: True)
    used, kernel_of = {}, launch.kernel_of

    def watched(source):
        used[source.name] = source.schedule
        return kernel_of(source)

    monkeypatch.setattr(launch, "kernel_of", watched)
    mine, exact = leaves(x, torch.float32), leaves(x, torch.float64)
    pull = torch.randn(1, 4, 21, 24)
    got = gradients(output(case, mine), mine, pull)
    assert {f"backward_{part}": s for part, s in found.items()}.items() <= used.items()
    wanted = gradients(reference(case, exact, torch.float64)[0], exact, pull)
    for a, b in zip(got, wanted, strict=True):
        assert (a.double() - b).abs().max() <= 2e-5 * b.abs().max()


# The operators by torch's own checks; what compiles is left to the GPU suite

CHECKS = ("test_schema", "test_faketensor", "test_autograd_registration")


@pytest.mark.parametrize("name", ["causal", "bias", "sink logit"])
def test_opcheck_of_the_operator(name):
    x = leaves(inputs_for(CASES[name], SIZES, torch.float32, 8), torch.float32)
    text = str(softmax_cascade(CASES[name].form(2), "case"))
    operator = torch.ops.attn_rewrite.triton_cascade.default
    torch.library.opcheck(operator, (list(x.values()), None, text, "", 0.0), test_utils=CHECKS)


def test_opcheck_of_the_other_operators():
    import attn_rewrite.ops  # noqa: F401
    from attn_rewrite.backends.triton.schedule import Schedule, to_text

    ops = torch.ops.attn_rewrite
    x = inputs_for(CASES["cached"], SIZES, torch.float32, 8)
    text = str(softmax_cascade(CASES["cached"].form(2), "case"))
    out, lse = ops.triton_cascade(list(x.values()), None, text, "", 0.0)
    pulls = [torch.randn_like(out), torch.randn_like(lse)]
    plain = CHECKS[:2]
    backward = (pulls, list(x.values()), out, lse, None, text, 0.0, [])
    torch.library.opcheck(ops.triton_cascade_backward.default, backward, test_utils=plain)
    starts = torch.tensor([0, 5, 5, 21], dtype=torch.int32)
    flat = [t[0] for t in x.values()]
    torch.library.opcheck(
        ops.triton_varlen.default, (flat, starts, starts, 16, 16, text), test_utils=plain
    )
    table, lengths = (
        torch.tensor([[1, 0]], dtype=torch.int32),
        torch.tensor([20], dtype=torch.int32),
    )
    cache = [x["Q"][:, :, :3], torch.randn(2, 2, 16, 16), torch.randn(2, 2, 16, 24)]
    torch.library.opcheck(ops.triton_paged.default, (cache, table, lengths, text), test_utils=plain)
    lists = (
        x["Q"],
        [],
        "(q - kv) // 8 % 2 == 0",
        to_text(Schedule(skipping="lists")),
        [1, 1, 70, 70],
        "q",
    )
    torch.library.opcheck(ops.tile_lists.default, lists)


# Through the whole pipeline


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Linear(32, 96)

    def forward(self, x):
        parts = self.project(x).view(x.shape[0], x.shape[1], 3, 2, 16).permute(2, 0, 3, 1, 4)
        out = torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=True)
        return out.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("policy", ["exact", "window(size=9, sinks=2)"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_optimize_with_the_triton_backend(policy, dtype, tmp_path):
    torch.manual_seed(0)
    model, x = Block().eval().to(dtype), torch.randn(2, 33, 32, dtype=dtype)
    found = ar.optimize(model, policy, (x,), backend="triton")
    (site,) = found.report.sites
    assert site.kernel == "triton"
    wanted = ar.optimize(model, policy, (x,), backend="torch")(x)
    assert torch.allclose(found(x), wanted, atol=8 * torch.finfo(dtype).eps)
    ar.save(found, tmp_path / "out")
    assert torch.equal(ar.load(tmp_path / "out")(x), found(x))


def test_float64_operands_are_refused_and_the_site_kept():
    model, x = Block().eval().double(), torch.randn(2, 17, 32, dtype=torch.float64)
    found = ar.optimize(model, "exact", (x,), backend="triton")
    (site,) = found.report.sites
    assert site.kernel is None
    assert "float64" in str(found.report.all_refusals())
    assert torch.equal(found(x), model(x))
