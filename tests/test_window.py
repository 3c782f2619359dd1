"""The window transform: its geometry, point by point, and what it does to cascades."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_rewrite.cascade.attention import as_softmax
from attn_rewrite.cascade.expr import conjuncts
from attn_rewrite.cascade.oracle import interpret
from attn_rewrite.cascade.text import parse_expr
from attn_rewrite.cascade.values import Frame, evaluate
from attn_rewrite.passes.sparse.window import Window
from attn_rewrite.site import Refusal
from tests.sites import make_site


def kept(guard, q_len, kv_len, heads=1):
    """The guard at every point, as booleans [h, q, kv]."""
    ranks = ("h", "q", "kv")
    sizes = {"h": heads, "q": q_len, "kv": kv_len}
    at = {rank: torch.arange(sizes[rank]) for rank in ranks}
    value = torch.as_tensor(evaluate(guard, Frame(ranks, at, sizes, {})))
    return value.expand(heads, q_len, kv_len)


def guard_of(site, window):
    form = as_softmax(window.apply(site.cascade, site))
    assert form is not None
    return form.guard


def reference(q_len, kv_len, left, right, sinks, causal, offset):
    """The definition in words: near enough, or a sink; never later than the query if causal."""
    rows = []
    for q in range(q_len):
        pos = q + offset
        near = [pos - left <= kv <= pos + right for kv in range(kv_len)]
        sink = [kv < sinks for kv in range(kv_len)]
        past = [not causal or kv <= pos for kv in range(kv_len)]
        rows.append([(n or s) and p for n, s, p in zip(near, sink, past, strict=True)])
    return torch.tensor(rows)


@given(
    st.integers(1, 20), st.integers(1, 20), st.integers(1, 24), st.integers(0, 5),
    st.booleans(), st.sampled_from(["0", "#kv - #q", "3"]),
)  # fmt: skip
@settings(max_examples=120, deadline=None)
def test_mask_is_the_definition(q_len, kv_len, size, sinks, causal, offset):
    site = make_site(causal=causal, q_len=q_len, kv_len=kv_len, offset=offset)
    by = {"0": 0, "3": 3}.get(offset, kv_len - q_len)
    left, right = (size - 1, 0) if causal else (size // 2, size - 1 - size // 2)
    found = kept(guard_of(site, Window(size, sinks)), q_len, kv_len)[0]
    assert torch.equal(found, reference(q_len, kv_len, left, right, sinks, causal, by))


def test_known_rows():
    causal = kept(guard_of(make_site(causal=True), Window(3)), 6, 6)[0].int()
    assert causal.tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 0],
        [0, 0, 0, 1, 1, 1],
    ]
    # An even symmetric window looks one further back than ahead.
    both = kept(guard_of(make_site(), Window(4, sinks=1)), 6, 6)[0].int()
    assert both.tolist() == [
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 0],
        [1, 0, 1, 1, 1, 1],
        [1, 0, 0, 1, 1, 1],
    ]


def test_sinks_come_in_addition_to_size():
    last = kept(guard_of(make_site(causal=True), Window(8, sinks=4)), 64, 64)[0, -1]
    assert int(last.sum()) == 8 + 4


@pytest.mark.parametrize("asked", [False, True, None])
def test_a_causal_site_stays_causal(asked):
    found = kept(guard_of(make_site(causal=True), Window(9, causal=asked)), 16, 16)[0]
    assert not found.triu(1).any()


def test_causality_may_be_asked_of_a_bidirectional_site():
    found = kept(guard_of(make_site(), Window(3, causal=True)), 8, 8)[0]
    assert torch.equal(found, reference(8, 8, 2, 0, 0, True, 0))


def test_left_and_right_replace_size():
    found = kept(guard_of(make_site(), Window(left=1, right=3)), 8, 8)[0]
    assert torch.equal(found, reference(8, 8, 1, 3, 0, False, 0))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"size": 0}, "size is 0, expected at least 1"),
        ({"size": 4, "sinks": -1}, "sinks is -1, expected at least 0"),
        ({"size": True}, "size is true"),
        ({"size": 2.0}, "size is 2.0"),
        ({}, "size is missing"),
        ({"left": 3}, "size is missing"),
        ({"size": 3, "left": 1}, "not both"),
    ],
)
def test_bad_options(options, says):
    with pytest.raises(ValueError, match=says):
        Window(**options)


def test_heads_are_limited_by_the_mask_only():
    site = make_site(causal=True)
    cascade = Window(2).apply_to_heads(site.cascade, site, (1, 2))
    form = as_softmax(cascade)
    found = kept(form.guard, 8, 8, heads=4)
    full = reference(8, 8, 8, 0, 0, True, 0)
    near = reference(8, 8, 1, 0, 0, True, 0)
    for head, wanted in enumerate((full, near, near, full)):
        assert torch.equal(found[head], wanted), head
    # Causality holds for every head, so it must not be hidden behind the head.
    assert parse_expr("kv <= q") in conjuncts(form.guard)


def test_nothing_changes_when_the_window_is_there_already():
    site = make_site(causal=True)
    once = Window(4).apply(site.cascade, site)
    assert Window(4).apply(once, site) is once


@pytest.mark.parametrize(
    ("facts", "named", "code"),
    [
        ({"kind": "cross"}, (), "window-cross"),
        ({"kind": "joint"}, (), "window-joint"),
        ({"kind": "pooling"}, ("pooling",), "window-pooling"),
        ({"family": "channel"}, (), "window-channel"),
        ({"kind": "cross"}, ("cross",), None),
        ({}, (), None),
    ],
)
def test_sites_where_positions_mean_nothing_are_refused(facts, named, code):
    refusal = Window(4).admits(make_site(**facts), named)
    assert (refusal.code if refusal else None) == code
    assert refusal is None or (isinstance(refusal, Refusal) and refusal.site == "layer.0.attn#0")


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 9), st.integers(0, 2), st.booleans())
@settings(max_examples=40, deadline=None)
def test_rewritten_cascade_is_masked_attention(q_len, kv_len, size, sinks, causal):
    """The oracle of the rewritten cascade against a dense softmax written here."""
    generator = torch.Generator().manual_seed(q_len * 100 + kv_len)
    site = make_site(causal=causal, hkv=2, q_len=q_len, kv_len=kv_len)
    shapes = {"Q": (2, 4, q_len, 8), "K": (2, 2, kv_len, 8), "V": (2, 2, kv_len, 8)}
    inputs = {
        n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()
    }
    found = interpret(Window(size, sinks).apply(site.cascade, site), inputs)["AV"]
    k, v = (inputs[n].repeat_interleave(2, dim=1) for n in "KV")
    left, right = (size - 1, 0) if causal else (size // 2, size - 1 - size // 2)
    mask = reference(q_len, kv_len, left, right, sinks, causal, 0)
    scores = (inputs["Q"] @ k.transpose(-1, -2) * 0.5).masked_fill(~mask, -math.inf)
    wanted = torch.softmax(scores, -1).nan_to_num() @ v
    assert torch.allclose(found, wanted, rtol=0, atol=1e-13 * float(v.abs().max()))


@pytest.mark.parametrize("causal", [True, False])
def test_golden(golden, causal):
    site = make_site(causal=causal, hkv=2)
    after = Window(size=256, sinks=4).apply(site.cascade, site)
    name = "causal" if causal else "bidirectional"
    golden(
        f"sparse/window-{name}.txt", f"{site.cascade}\n\n-- window(size=256, sinks=4)\n\n{after}\n"
    )


def test_golden_with_a_cache_and_some_heads(golden):
    site = make_site(causal=True, offset="#kv - #q")
    after = Window(size=256).apply_to_heads(site.cascade, site, (0, 1, 3))
    golden("sparse/window-cache-heads.txt", f"{site.cascade}\n\n-- window(size=256)\n\n{after}\n")
