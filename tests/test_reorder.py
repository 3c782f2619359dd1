"""Orders of tokens: known answers, and attention that is the same in any order."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attn_rewrite.backends.torch import lower
from attn_rewrite.cascade.attention import QK, SoftmaxAttention, softmax_cascade
from attn_rewrite.cascade.expr import KV, Q, Read
from attn_rewrite.cascade.fold_digits import fold_digits
from attn_rewrite.cascade.ir import Cascade, TensorDecl
from attn_rewrite.cascade.oracle import interpret
from attn_rewrite.cascade.points import values
from attn_rewrite.cascade.reordered import as_reordered, reordered_cascade
from attn_rewrite.cascade.text import parse, parse_expr
from attn_rewrite.chunked import oracle
from attn_rewrite.errors import PolicyError
from attn_rewrite.graph import EagerBuilder
from attn_rewrite.measuring import measure
from attn_rewrite.plan import Step, rewritten
from attn_rewrite.policy_text import parse_pipeline
from attn_rewrite.simulate.mask import count_mask
from attn_rewrite.site import Refusal
from attn_rewrite.token_layout import TokenLayout
from attn_rewrite.token_order import axis_order, axis_orders, tile_order
from tests.sites import make_site

# Spec, section 11, P1: the first source indices of each order of a grid of 2 x 3 x 4.
P1 = {
    "hwf": [0, 12, 1, 13, 2, 14, 3, 15],
    "whf": [0, 12, 4, 16, 8, 20, 1, 13],
    "wfh": [0, 4, 8, 12, 16, 20, 1, 5],
    "hfw": [0, 1, 2, 3, 12, 13, 14, 15],
    "fwh": [0, 4, 8, 1, 5, 9, 2, 6],
    "fhw": [0, 1, 2, 3, 4, 5, 6, 7],
}
# P2: the order that undoes it, on the grid it makes.
INVERSES = {"fhw": "fhw", "fwh": "fwh", "hwf": "wfh", "hfw": "hfw", "whf": "whf", "wfh": "hwf"}


@pytest.mark.parametrize("name", sorted(P1))
def test_axis_orders_have_the_published_index_maps(name: str) -> None:
    layout = TokenLayout((2, 3, 4))
    order = axis_order(layout, name)
    assert order.indices(24)[:8].tolist() == P1[name]
    axes = ["fhw".index(c) for c in name]
    assert (
        order.indices(24).tolist()
        == np.arange(24).reshape(2, 3, 4).transpose(axes).ravel().tolist()
    )
    turned = TokenLayout(tuple(layout.grid[a] for a in axes))
    undone = axis_order(turned, INVERSES[name])
    assert order.indices(24)[undone.indices(24)].tolist() == list(range(24))
    assert order.indices(24)[order.inverse().indices(24)].tolist() == list(range(24))


def test_hwf_twice_is_not_the_identity() -> None:
    once = axis_order(TokenLayout((2, 3, 4)), "hwf").indices(24)
    assert once[once].tolist() != list(range(24))


def test_patches_of_draft_attention() -> None:
    """Spec, section 11, D1."""
    order = tile_order(TokenLayout((16, 32)), (8, 16)).indices(512)
    at = [0, 15, 16, 127, 128, 255, 256, 511]
    assert order[at].tolist() == [0, 15, 32, 239, 16, 255, 256, 511]


def test_tiles_of_a_small_grid() -> None:
    """Structured-sparse, section 11, NA-8."""
    assert tile_order(TokenLayout((4, 6)), (2, 3)).indices(24).tolist() == [
        0, 1, 2, 6, 7, 8, 3, 4, 5, 9, 10, 11, 12, 13, 14, 18, 19, 20, 15, 16, 17, 21, 22, 23,
    ]  # fmt: skip


def test_classes_of_a_dilation_stand_together() -> None:
    """Structured-sparse, section 11, NA-8: an axis of 7 padded to 8, tiles of 2, dilation 2."""
    order = tile_order(TokenLayout((8,)), (2,), (2,)).indices(8)
    assert order.tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    layout = TokenLayout((4, 12), text=1)
    found = tile_order(layout, (2, 3), (1, 2)).indices(49)
    want = [
        1 + 12 * (2 * row + y) + 2 * (3 * column + x) + rest
        for rest in range(2) for row in range(2) for column in range(2)
        for y in range(2) for x in range(3)
    ]  # fmt: skip
    assert found.tolist() == [0, *want]


def test_dilated_neighborhoods_are_dense_in_few_tiles() -> None:
    """Blocks that a dilated window keeps: half the map as it stands, few by class."""
    layout = TokenLayout((16, 16))
    window = "neighborhood(window=[4, 4], dilation=[4, 4])"
    counts = [
        count_mask(policy, layout, block=16).to_json()
        for policy in (window, f"{window} | reorder(dilation=[4, 4])")
    ]
    assert counts[0]["element_density"] == counts[1]["element_density"] == 1 / 16
    assert [c["blocks_kept"] for c in counts] == [64, 16]
    assert counts[1]["blocks_full"] == 16


@given(
    grid=st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple),
    text=st.integers(0, 3),
    suffix=st.integers(0, 2),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_orders_are_permutations_and_text_stays(
    grid: tuple[int, ...], text: int, suffix: int, data: st.DataObject
) -> None:
    layout = TokenLayout(grid, text=text, suffix=suffix)
    if data.draw(st.booleans()):
        order = axis_order(layout, data.draw(st.sampled_from(axis_orders(layout))))
    else:
        divisors = [[d for d in range(1, n + 1) if n % d == 0] for n in grid]
        order = tile_order(layout, tuple(data.draw(st.sampled_from(d)) for d in divisors))
    found = order.indices(layout.q_len)
    assert sorted(found) == list(range(layout.q_len))
    assert found[:text].tolist() == list(range(text))
    assert found[text + layout.tokens :].tolist() == list(range(text + layout.tokens, layout.q_len))
    back = values(order.place(Q), {"q": np.arange(layout.q_len)})
    assert np.broadcast_to(back, found.shape)[found].tolist() == list(range(layout.q_len))


def test_orders_that_do_not_fit() -> None:
    layout = TokenLayout((4, 6))
    with pytest.raises(PolicyError, match=r"hwf.*there are: hw, wh"):
        axis_order(layout, "hwf")
    with pytest.raises(PolicyError, match="does not divide"):
        tile_order(layout, (3, 3))
    with pytest.raises(PolicyError, match="axes"):
        tile_order(layout, (2, 2, 2))
    with pytest.raises(PolicyError, match="tile 2x3 with dilation 1x4 does not divide"):
        tile_order(layout, (2, 3), (1, 4))
    with pytest.raises(PolicyError, match="dilation 2 has 1 axes"):
        tile_order(layout, (2, 3), (2,))


@pytest.mark.parametrize(
    "text",
    [
        "(q // 4 * 12 + q % 4) // 12", "(q // 4 * 12 + q % 4 + 5) % 12", "(q % 6 * 4 + q // 6) % 4",
        "(q % 6 * 4 + q // 6) // 4 % 3", "q // 5 % 4", "(q - kv) // 3", "(q % 4 - 1) // 2",
        "(q // 2 + kv * 12) % 6 // 3", "(q * 2.5) // 2",
    ],
)  # fmt: skip
def test_digits_of_digits_keep_their_value(text: str) -> None:
    expr = parse_expr(text)
    found = fold_digits(expr, {"q": 24, "kv": 24})
    at = {"q": np.arange(24)[:, None], "kv": np.arange(24)[None]}
    wanted = values(expr, at)
    assert np.array_equal(
        np.broadcast_to(values(found, at), (24, 24)), np.broadcast_to(wanted, (24, 24))
    )


def test_digits_are_found_again() -> None:
    layout = TokenLayout((2, 3, 4))
    order = axis_order(layout, "hwf")
    turned = [fold_digits(axis, {"q": 24}) for axis in layout.axes(order.source(Q))]
    assert [str(t) for t in turned] == ["q % 2", "q // 8", "q // 2 % 4"]


# Attention


def attention(form: SoftmaxAttention) -> Cascade:
    return softmax_cascade(form)


def operands(
    hq: int, hkv: int, length: int, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    torch.manual_seed(length * 31 + hq)
    shapes = {"Q": (2, hq, length, 8), "K": (2, hkv, length, 8), "V": (2, hkv, length, 6)}
    return {n: torch.randn(*s, dtype=dtype) for n, s in shapes.items()}


def dense(q: Tensor, k: Tensor, v: Tensor, score: Any) -> Tensor:
    """Attention written by hand in float64; ``score`` edits [b, h, q, kv] scores."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.double().repeat_interleave(group, 1) for t in (k, v))
    s = score(q.double() @ k.mT)
    p = torch.softmax(s, -1).nan_to_num(0.0)
    return p @ v


GRID = TokenLayout((2, 3, 4), text=2, suffix=1)
PIPELINES = [
    'reorder(order="hwf", layout="{}")',
    'reorder(order=["wfh", "fhw"], layout="{}")',
    'reorder(tile=[1, 3, 2], layout="{}")',
    'reorder(order="hwf", layout="{}") | reorder(order="whf", layout="{}")',
]


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("case", ["plain", "causal", "bias", "alibi", "mask", "weight"])
def test_reordered_attention_is_the_same(pipeline: str, case: str) -> None:
    """Known answer G1, with masks, biases and positional terms."""
    length, ranks = GRID.q_len, ("b", "h", "q", "kv")
    torch.manual_seed(1)
    bias = torch.randn(2, 4, length, length, dtype=torch.float64)
    keep = torch.rand(2, 1, 1, length) > 0.3
    at = torch.arange(length)
    distance = (at[:, None] - at[None]).abs().double()
    slopes = 0.1 * (torch.arange(4).double() + 1)[:, None, None]
    read = Read("B0", (*(map(parse_expr, ranks)),))
    forms: dict[str, tuple[SoftmaxAttention, Any]] = {
        "plain": (SoftmaxAttention(QK * 0.5, group=2), lambda s: s * 0.5),
        "causal": (
            SoftmaxAttention(QK * 0.5, Q >= KV, group=2),
            lambda s: (s * 0.5).masked_fill(at[:, None] < at[None], -math.inf),
        ),
        "bias": (
            SoftmaxAttention(QK * 0.5 + read, group=2, reads=(TensorDecl("B0", ranks),)),
            lambda s: s * 0.5 + bias,
        ),
        "alibi": (
            SoftmaxAttention(QK * 0.5 - parse_expr("abs(q - kv) * (h + 1) * 0.1"), group=2),
            lambda s: s * 0.5 - distance * slopes,
        ),
        "mask": (
            SoftmaxAttention(
                QK, parse_expr("M0[b, kv]"), group=2, reads=(TensorDecl("M0", ("b", "kv"), dtype="bool"),)
            ),
            lambda s: s.masked_fill(~keep, -math.inf),
        ),
        "weight": (SoftmaxAttention(QK, group=2, weight=parse_expr("q * 0.01 + kv")), lambda s: s),
    }  # fmt: skip
    form, score = forms[case]
    inputs = operands(4, 2, length)
    reads = {"bias": {"B0": bias}, "mask": {"M0": keep[:, 0, 0]}}.get(case, {})
    site = make_site(hq=4, hkv=2, q_len=length, kv_len=length, cascade=softmax_cascade(form))
    cascade = rewritten(site, Step(site.name, parse_pipeline(pipeline.replace("{}", str(GRID)))))
    assert isinstance(cascade, Cascade), cascade
    assert cascade != site.cascade
    assert parse(str(cascade)) == cascade
    if case == "weight":
        wanted = interpret(site.cascade, inputs)["AV"]
    else:
        wanted = dense(inputs["Q"], inputs["K"], inputs["V"], score)
    held = {**inputs, **reads}
    assert torch.allclose(interpret(cascade, held)["AV"], wanted, atol=1e-12)
    assert torch.allclose(oracle(cascade, held, limit=1 << 12), wanted, atol=1e-12)
    kernel = lower(cascade, extents={"q": length, "kv": length, "h": 4, "hkv": 2})
    assert not isinstance(kernel, Refusal)
    found = kernel.emit(EagerBuilder(), list(held.values()))
    assert torch.allclose(found, wanted, atol=1e-10)


def test_parts_are_read_back() -> None:
    site = make_site(q_len=27, kv_len=27)
    cascade = rewritten(
        site, Step(site.name, parse_pipeline(PIPELINES[0].replace("{}", str(GRID))))
    )
    assert isinstance(cascade, Cascade)
    parts = as_reordered(cascade)
    assert parts is not None
    assert reordered_cascade(parts) == cascade
    assert parts.inner == site.cascade
    assert as_reordered(site.cascade) is None


def test_the_models_own_order_changes_nothing() -> None:
    site = make_site(q_len=27, kv_len=27)
    step = Step(site.name, parse_pipeline(f'reorder(order="fhw", layout="{GRID}")'))
    assert rewritten(site, step) is site.cascade


def test_patterns_before_and_after() -> None:
    """Before: about the model's tokens.  After: about the new order; here a window over time."""
    layout = TokenLayout((4, 2, 3))
    n = layout.tokens
    inputs = operands(2, 2, n)
    at = np.arange(n)
    order = axis_order(layout, "hwf").indices(n)
    near = np.abs(at[:, None] - at[None]) <= 2
    after = np.zeros((n, n), bool)
    after[np.ix_(order, order)] = near
    for pipeline, mask in (
        (f'window(size=5) | reorder(order="hwf", layout="{layout}")', near),
        (f'reorder(order="hwf", layout="{layout}") | window(size=5)', after),
    ):
        site = make_site(hq=2, hkv=2, q_len=n, kv_len=n)
        cascade = rewritten(site, Step(site.name, parse_pipeline(pipeline)))
        assert isinstance(cascade, Cascade)
        keep = torch.from_numpy(mask)
        wanted = dense(
            inputs["Q"], inputs["K"], inputs["V"],
            lambda s, keep=keep: (s * 0.5).masked_fill(~keep, -math.inf),
        )  # fmt: skip
        assert torch.allclose(interpret(cascade, inputs)["AV"], wanted, atol=1e-12)


def test_causal_site_keeps_its_mask_and_no_more() -> None:
    site = make_site(q_len=27, kv_len=27, causal=True)
    layout = str(GRID)
    pipeline = f'reorder(order="hwf", layout="{layout}") | window(left=27, right=27)'
    cascade = rewritten(site, Step(site.name, parse_pipeline(pipeline)))
    assert isinstance(cascade, Cascade)
    inputs = operands(4, 4, 27)
    wanted = interpret(site.cascade, inputs)["AV"]
    assert torch.allclose(interpret(cascade, inputs)["AV"], wanted, atol=1e-12)


def test_orders_of_some_heads() -> None:
    layout = str(GRID)
    site = make_site(q_len=27, kv_len=27)
    steps = [
        Step(site.name, parse_pipeline(f'reorder(order="hwf", layout="{layout}")'), (0, 1)),
        Step(site.name, parse_pipeline(f'reorder(order="wfh", layout="{layout}")'), (3,)),
    ]
    cascade = rewritten(site, *steps)
    assert isinstance(cascade, Cascade)
    inputs = operands(4, 4, 27)
    wanted = interpret(site.cascade, inputs)["AV"]
    assert torch.allclose(interpret(cascade, inputs)["AV"], wanted, atol=1e-12)
    parts = as_reordered(cascade)
    assert parts is not None
    for head, name in enumerate(["hwf", "hwf", "fhw", "wfh"]):
        at = values(parts.q, {"h": np.asarray(head), "q": np.arange(27)})
        assert np.broadcast_to(at, (27,)).tolist() == axis_order(GRID, name).indices(27).tolist()


@pytest.mark.parametrize(
    ("facts", "pipeline", "code"),
    [
        ({}, 'reorder(order="hw")', "layout-unknown"),
        ({}, 'reorder(order="hwf", layout="grid=2x3x4")', "layout-misfit"),
        ({}, 'reorder(order=["hw", "wh"], layout="grid=4x8")', "reorder-misfit"),
        ({"kind": "cross"}, 'reorder(order="hw")', "reorder-cross"),
        ({"family": "linear"}, 'reorder(order="hw", layout="grid=4x8")', "reorder-linear"),
        ({"offset": "3"}, 'reorder(order="hw", layout="grid=4x8")', "reorder-dynamic"),
        ({}, 'int8 | reorder(order="wh", layout="grid=4x8")', "reorder-late"),
        ({}, 'reorder(order="wh", layout="grid=4x8") | clear(radius=2)', "reorder-early"),
    ],
)
def test_refusals(facts: dict[str, Any], pipeline: str, code: str) -> None:
    site = make_site(**facts)
    found = rewritten(site, Step(site.name, parse_pipeline(pipeline)))
    assert isinstance(found, Refusal), found
    assert found.code == code


def test_heads_that_share_keys_share_an_order() -> None:
    site = make_site(hq=4, hkv=2)
    step = Step(site.name, parse_pipeline('reorder(order="wh", layout="grid=4x8")'), (0,))
    found = rewritten(site, step)
    assert isinstance(found, Refusal)
    assert found.code == "reorder-heads"


@pytest.mark.parametrize(
    "text",
    [
        "reorder()", 'reorder(order="hw", tile=[2, 2])', 'reorder(tile=[0, 2])',
        'reorder(order="hh", layout="grid=4x8")', 'reorder(tile=[3, 3], layout="grid=4x8")',
        "reorder(order=[])", 'reorder(order="hw", dilation=[2, 2])', "reorder(dilation=[0, 2])",
        "reorder(dilation=[])", 'reorder(dilation=[3, 3], layout="grid=4x8")',
    ],
)  # fmt: skip
def test_policy_errors(text: str) -> None:
    with pytest.raises(PolicyError, match="reorder"):
        parse_pipeline(text)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_in_low_precision(dtype: torch.dtype) -> None:
    layout = TokenLayout((4, 8, 8))
    n = layout.tokens
    pipeline = f'reorder(order=["hwf", "whf"], layout="{layout}") | window(size=64)'
    site = make_site(hq=4, hkv=2, q_len=n, kv_len=n)
    cascade = rewritten(site, Step(site.name, parse_pipeline(pipeline)))
    assert isinstance(cascade, Cascade)
    inputs = operands(4, 2, n, dtype)
    # Strided operands, as a model has them.
    inputs = {k: t.transpose(1, 2).contiguous().transpose(1, 2) for k, t in inputs.items()}
    kernel = lower(cascade, extents={"q": n, "kv": n, "h": 4, "hkv": 2}, block=32)
    assert not isinstance(kernel, Refusal)
    assert kernel.name == "tiled"
    wanted = interpret(cascade, inputs)["AV"]
    found = kernel.emit(EagerBuilder(), list(inputs.values()))
    assert found.dtype == dtype
    eager = _eager(cascade, inputs, dtype)
    bound = max(
        2 * measure(eager, wanted).max_abs, 4 * torch.finfo(dtype).eps * float(wanted.abs().max())
    )
    assert measure(found, wanted).max_abs <= bound


def _eager(cascade: Cascade, inputs: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """Masked attention in ``dtype``, the mask taken from the oracle."""
    kept = interpret(cascade, inputs, also=("A",))["A"] > 0
    parts = as_reordered(cascade)
    assert parts is not None
    order = [
        torch.from_numpy(
            np.broadcast_to(
                values(parts.q, {"h": np.asarray(h), "q": np.arange(256)}), (256,)
            ).copy()
        )
        for h in range(4)
    ]
    q, k, v = inputs["Q"], *(inputs[n].repeat_interleave(2, 1) for n in "KV")
    out = torch.zeros(2, 4, 256, 6, dtype=dtype)
    for h, at in enumerate(order):
        s = (q[:, h, at] @ k[:, h, at].mT).float() * 0.5
        p = torch.softmax(s.masked_fill(~kept[:, h], -math.inf), -1).to(dtype)
        out[:, h, at] = p @ v[:, h, at]
    return out
