"""The packed cache: codes that are those of the cascade, memory that is really saved."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_rewrite.backends.torch.packed_cache import Packed, PackedCache
from attn_rewrite.cascade.oracle import interpret
from attn_rewrite.policy_text import parse_pipeline
from attn_rewrite.site import Refusal
from tests.sites import make_site


def tokens(n, d=8, f=40, b=2, h=2, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(b, h, n, d, generator=g).to(dtype), torch.randn(b, h, n, f, generator=g).to(
        dtype
    )


def filled(bits, group, residual, k, v, cuts):
    """A cache that got its tokens in pieces."""
    cache = PackedCache(bits, group, residual)
    edges = [0, *sorted({c for c in cuts if 0 < c < k.shape[2]}), k.shape[2]]
    for start, stop in pairwise(edges):
        cache.append(k[:, :, start:stop], v[:, :, start:stop])
    return cache


def coded(bits, group, residual, k, v):
    """Keys and values as the cascade of the scheme has them."""
    site = make_site(
        hq=k.shape[1], hkv=k.shape[1], q_len=1, kv_len=k.shape[2], d_qk=k.shape[3], d_v=v.shape[3]
    )
    (scheme,) = parse_pipeline(f"kv_int{bits}(group={group}, residual={residual})")
    cascade = scheme.apply(site.cascade, site)
    assert not isinstance(cascade, Refusal), cascade
    found = interpret(cascade, {"Q": k[:, :, :1], "K": k, "V": v}, also=("KD", "VD"))
    return found["KD"], found["VD"]


@given(
    st.sampled_from([2, 4, 8]), st.sampled_from([1, 5, 32]), st.sampled_from([0, 3, 16]),
    st.integers(1, 90), st.lists(st.integers(1, 89), max_size=6), st.integers(1, 40),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_numbers_are_those_of_the_cascade(bits, group, residual, n, cuts, f):
    k, v = tokens(n, 6, f)
    cache = filled(bits, group, residual, k, v, cuts)
    keys, values = coded(bits, group, residual, k, v)
    assert cache.length == n
    assert torch.allclose(cache.keys(), keys, rtol=0, atol=1e-12)
    assert torch.allclose(cache.values(), values, rtol=0, atol=1e-12)


def test_a_ramp_in_two_bits():
    """0 to 31 in steps of 31 / 3; a constant row is itself."""
    ramp = Packed.of(torch.arange(32.0)[None], 2, torch.float32)
    found = ramp.numbers(2, 32)[0]
    assert ramp.codes.shape == (1, 8)
    assert float(ramp.step) == pytest.approx(31 / 3)
    assert [i for i in range(1, 32) if found[i] != found[i - 1]] == [6, 16, 26]
    same = Packed.of(torch.full((1, 32), 2.5), 2, torch.float32).numbers(2, 32)
    assert (same == 2.5).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_range_wider_than_float16_reaches(bits):
    x = torch.tensor([[-60000.0, 60000.0, 0.0, 59000.0]], dtype=torch.float16)
    found = Packed.of(x, bits, torch.float16).numbers(bits, 4)
    assert found.isfinite().all()
    assert (found.double() - x.double()).abs().max() <= 0.51 * 120000 / (2**bits - 1)


@pytest.mark.parametrize(("bits", "saved"), [(2, 5.3), (4, 3.2), (8, 1.77)])
def test_memory(bits, saved):
    """Of 16-bit operands, codes and one low end and step for 32 elements are left."""
    k, v = tokens(4096, 64, 64, 1, 4, torch.float16)
    cache = PackedCache(bits, 32, 0)
    cache.append(k, v)
    assert cache.nbytes == (k.numel() + v.numel()) * (bits + 2 * 16 / 32) / 8
    assert (k.nbytes + v.nbytes) / cache.nbytes >= saved
    window = PackedCache(bits, 32, 128)
    window.append(k, v)
    assert window.nbytes < 1.1 * cache.nbytes + 128 * 2 * 64 * 4 * 2


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("q_len", [1, 3])
@pytest.mark.parametrize("n", [1, 40, 2500])
def test_steps_of_decoding(group, q_len, n):
    """Tile by tile against all at once, in float64; several query heads a key head."""
    n = max(n, q_len)
    k, v = tokens(n, 16, 24)
    cache = filled(4, 32, 7, k, v, [n // 2, n - 1])
    q = torch.randn(2, 2 * group, q_len, 16, dtype=torch.float64)
    keys, values = (x.repeat_interleave(group, 1) for x in coded(4, 32, 7, k, v))
    s = q @ keys.mT / 4
    s = s.masked_fill(torch.ones(q_len, n).triu(n - q_len + 1).bool(), -math.inf)
    assert torch.allclose(cache.attend(q), s.softmax(-1) @ values, rtol=0, atol=1e-12)


def test_half_types_and_huge_scores():
    k, v = tokens(300, 16, 16, dtype=torch.bfloat16)
    cache = filled(8, 32, 16, k * 100, v, [100, 200])
    q = torch.randn(2, 2, 1, 16).to(torch.bfloat16) * 100
    wide = cache.keys().double(), cache.values().double()
    wanted = (q.double() @ wide[0].mT / 4).softmax(-1) @ wide[1]
    found = cache.attend(q)
    assert found.dtype == torch.bfloat16
    assert (found.double() - wanted).abs().max() <= 2**-7 * wanted.abs().max()


def test_what_comes_in_is_not_written_to_or_held():
    k, v = tokens(80)
    before = k.clone(), v.clone()
    cache = PackedCache(4, 32, 8)
    cache.append(k, v)
    assert torch.equal(k, before[0])
    assert torch.equal(v, before[1])
    k.zero_()
    v.zero_()
    assert cache.keys().abs().sum() > 0
    assert cache.recent_keys.untyped_storage().nbytes() == cache.recent_keys.nbytes
    cache.reset()
    assert (cache.length, cache.nbytes) == (0, 0)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: PackedCache(3), "2, 4 or 8 bits, got 3"),
        (lambda: PackedCache(4, 0), "groups of at least 1"),
        (
            lambda: PackedCache(4).append(*(t[:, :, :i] for i, t in enumerate(tokens(9), 3))),
            "differ",
        ),
        (lambda: PackedCache(4).attend(torch.ones(1, 1, 1, 4)), "no last tokens of 0"),
    ],
)
def test_bad_use(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_generation_with_a_packed_cache():
    transformers = pytest.importorskip("transformers")
    from attn_rewrite.backends.torch.generation_cache import packed_cache

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64, max_position_embeddings=256,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 64, (2, 40))
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(ids, **options)
    whole = packed_cache(bits=4, residual=512)  # a window that holds everything
    assert torch.equal(model.generate(ids, past_key_values=whole, **options), plain)
    for beams in (1, 2):
        few = packed_cache(bits=8, group=8, residual=4)
        found = model.generate(ids, past_key_values=few, num_beams=beams, **options)
        assert found.shape == plain.shape
        layer = few.layers[0].packed
        assert layer.length == 51
        assert layer.coded_keys.low.shape[2] == 47 // 8
        # 16 bits of 32 for what is coded: groups of 8 have a low end and a step each.
        assert layer.nbytes < 0.6 * 2 * layer.keys().nbytes
    with torch.no_grad():
        few = packed_cache(bits=8, group=8, residual=4)
        model(ids, past_key_values=few)
        step = model(ids[:, :1], past_key_values=few).logits
        wanted = model(torch.cat([ids, ids[:, :1]], 1)).logits[:, -1:]
    assert torch.nn.functional.cosine_similarity(step, wanted, dim=-1).min() > 0.999
    with pytest.raises(ValueError, match="2, 4 or 8 bits"):
        packed_cache(bits=5)
