"""Decoders that hold their cache in few bits: what a step computes, and what is refused."""

from __future__ import annotations

import functools

import pytest
import torch

import attn_rewrite as ar
from attn_rewrite.backends.torch.packed_cache import PackedCache
from attn_rewrite.errors import AttnRewriteError, PolicyError

transformers = pytest.importorskip("transformers")
PROMPT, STEPS = 21, (1, 3, 1, 12)
POLICY = "kv_int4(group=8, residual=6)"


def llama(**more):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 32, "vocab_size": 40}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, **more)).eval()


def gpt2():
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=40)
    return transformers.GPT2LMHeadModel(config).eval()


class Stored(transformers.cache_utils.DynamicCache):
    """What KIVI says a model should see: the oracle of a step, without any graph.

    Keys and values go through codes token by token in plain loops, all of them at every step.
    """

    bits, group, residual = 4, 8, 6

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        first = self.get_seq_length(layer_idx) == 0
        k, v = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return (k, v) if first else (self.keys_of(k), self.values_of(v))

    def coded(self, x):
        low, high = x.min(), x.max()
        step = (high - low) / (2**self.bits - 1)
        return torch.round((x - low) / step) * step + low

    def keys_of(self, k):
        out, old = k.clone(), max(k.shape[2] - self.residual, 0) // self.group
        for b, h, g, c in torch.cartesian_prod(*map(torch.arange, (*k.shape[:2], old, k.shape[3]))):
            part = slice(g * self.group, (g + 1) * self.group)
            out[b, h, part, c] = self.coded(k[b, h, part, c])
        return out

    def values_of(self, v):
        out, old = v.clone(), max(v.shape[2] - self.residual, 0)
        if old:
            sizes = (*v.shape[:2], old, -(-v.shape[3] // self.group))
            for b, h, n, g in torch.cartesian_prod(*map(torch.arange, sizes)):
                part = slice(g * self.group, (g + 1) * self.group)
                out[b, h, n, part] = self.coded(v[b, h, n, part])
        return out


@pytest.mark.parametrize("make", [pytest.param(llama, marks=pytest.mark.slow), gpt2])
def test_steps_are_those_of_a_cache_in_codes(make):
    """One token and several at once; the codes hold whatever the tokens came in."""
    torch.manual_seed(0)
    model = make()
    ids = torch.randint(0, 40, (2, PROMPT + sum(STEPS)))
    decoder = ar.optimize(model, POLICY, (ids[:, :8].contiguous(),)).with_packed_cache()
    oracle, at = Stored(), PROMPT
    with torch.no_grad():
        wanted = model(ids[:, :at], past_key_values=oracle).logits
        assert torch.equal(decoder(ids[:, :at]).logits, wanted)
        for step in STEPS:
            new = ids[:, at : at + step]
            wanted = model(new, past_key_values=oracle).logits
            found = decoder(new)
            at += step
            assert (decoder.length, "past_key_values" in found) == (at, False)
            assert torch.allclose(found.logits, wanted, atol=2e-5)
        plain = model(ids).logits[:, -STEPS[-1] :]
    assert not torch.allclose(found.logits, plain, atol=1e-4), "codes cost something"
    decoder.reset()
    assert (decoder.length, decoder.nbytes) == (0, 0)
    assert torch.equal(decoder(ids[:, :PROMPT]).logits, model(ids[:, :PROMPT]).logits)


def test_what_is_stored():
    """Codes and windows, and nothing of the past in floating point; other batches than captured."""
    torch.manual_seed(0)
    model = llama()
    decoder = ar.optimize(model, POLICY, (torch.randint(0, 40, (2, 8)),)).with_packed_cache()
    ids = torch.randint(0, 40, (3, 400))
    decoder(ids)
    decoder(ids[:, :1])
    whole = 2 * 2 * 3 * 2 * 401 * 8 * 4  # keys, values; layers; batch; heads; tokens; channels
    assert decoder.nbytes < whole * (4 + 2 * 32 / 8) / 32 * 1.1
    names = [n.name for n in decoder.graph.graph.nodes if n.op == "placeholder"]
    assert names == ["input_ids", "use_cache", "past_length"]
    assert len(decoder.layers) == 2
    assert all(isinstance(x.cache, PackedCache) for x in decoder.layers.values())
    own = dict(decoder.named_parameters())
    assert {id(p) for p in own.values()} <= {id(p) for p in model.parameters()}
    with pytest.raises(PolicyError, match="a step takes input_ids, use_cache"):
        decoder(ids[:, :1], attention_mask=torch.ones(3, 402))


@pytest.mark.parametrize(
    ("policy", "kwargs", "says"),
    [
        ("int8", {}, "expected kv_int8, kv_int4 or kv_int2 on every head"),
        ("window(size=4) | kv_int8", {}, "its policy is window"),
        ("kv_int8", {"attention_mask": torch.ones(2, 8, dtype=torch.long)}, "its mask reads"),
    ],
)
def test_refusals(policy, kwargs, says):
    torch.manual_seed(0)
    ids = torch.randint(0, 40, (2, 8))
    run = ar.optimize(llama(), policy, (ids,), kwargs)
    with pytest.raises(PolicyError, match=says):
        run.with_packed_cache()


def test_no_kernel_of_triton_reads_packed_codes():
    ids = torch.randint(0, 40, (2, 8))
    run = ar.optimize(llama(), "kv_int8", (ids,))
    run._hold("_rebuild", functools.partial(run._rebuild, backend="triton"))  # as on a GPU
    with pytest.raises(PolicyError, match="runs on torch operators"):
        run.with_packed_cache()


@pytest.mark.slow
def test_some_heads_and_saved_programs(tmp_path):
    ids = torch.randint(0, 40, (2, 8))
    some = ar.Policy([ar.Rule(ar.Where(heads=(0, 1)), "kv_int8")])
    run = ar.optimize(llama(), some, (ids,))
    with pytest.raises(PolicyError, match="on every head"):
        run.with_packed_cache()
    ar.save(run, tmp_path / "saved")
    with pytest.raises(AttnRewriteError, match="needs the source module"):
        ar.load(tmp_path / "saved").with_packed_cache()
