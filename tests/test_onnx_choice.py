"""The choice of a form in ONNX Runtime: work counted, prices, an If on the length in a session."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnxruntime as ort
import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.nn import functional

from attn_rewrite import export_onnx
from attn_rewrite.backends.onnx import choice, cost, prices
from attn_rewrite.backends.onnx.artifact import OnnxArtifact
from attn_rewrite.backends.onnx.blocks import Problem, plan_blocks
from attn_rewrite.backends.onnx.choice import Lengths, choose
from attn_rewrite.backends.onnx.cost import Sizes, estimate, work
from attn_rewrite.backends.onnx.grouped import window_of
from attn_rewrite.backends.onnx.tile_plans import plan_heads, plan_tiles
from attn_rewrite.cascade.attention import QK, SoftmaxAttention, softmax_cascade
from attn_rewrite.cascade.expr import KV, TRUE, Expr, Extent, H, Q, call, eq

HEADS, KEY_HEADS, WIDTH = 4, 2, 8
RESULTS = Path(__file__).parents[1] / "examples" / "benchmarks" / "results" / "onnx_prices.json"
SIZES = Sizes(heads=4, key_heads=2, q_len=10, kv_len=10, width=8, out=6, batch=3)
OPERATOR = "GroupQueryAttention"


# ------------------------------------------------------------------------------------ work


def test_work_of_operators() -> None:
    moved = 3 * (4 * 10 + 2 * 10) * 14  # q, k, v and the output
    scores = 3 * 4 * 10 * 10
    assert work("dense", SIZES).counts() == (1, 0, moved, scores, scores * 14)
    half = 3 * 4 * 55  # ten rows of one to ten keys
    assert work(OPERATOR, SIZES).counts() == (1, 0, moved, half, half * 14)


def test_work_of_tiles() -> None:
    plan = plan_tiles(SoftmaxAttention(QK, (Q >= KV) & (Q - KV < 3)), 4)
    assert plan.width == 6
    scores = 3 * 4 * 10 * 6
    moved = 3 * (4 * 10 * 14 + 2 * 3 * 6 * 14 * 10 // 12)  # three steps of six keys, the last short
    found = work(plan, SIZES)
    assert (found.calls, found.steps, found.scores, found.products) == (1, 3, scores, scores * 14)
    assert found.moved == pytest.approx(moved, rel=0.1)


def test_work_of_blocks_and_of_heads() -> None:
    guard = eq(call("floordiv", Q, 4), call("floordiv", KV, 4))
    plan = plan_blocks(guard, Problem(4, 2, 16, 16), 4)
    sizes = Sizes(4, 2, 16, 16, 8, 6)
    found = work(plan, sizes)
    assert (found.scores, found.moved) == (16 * 16, (4 * 16 + 16 * 4) * 14)
    form = SoftmaxAttention(QK, (Q >= KV) & (Q - KV < 2 + 2 * H), group=2)
    each = plan_heads(form, 4, 4)
    total = work(each, sizes)
    assert total.calls == 1
    assert total.scores == sum(16 * plan.width for _, plan in each.parts)


def test_estimates_are_what_was_measured() -> None:
    """The table in the package explains the times in the results file, as it says it does."""
    rows = json.loads(RESULTS.read_text())["rows"]
    worst = dict.fromkeys(prices.PRICES, 0.0)
    for row in rows:
        said = sum(n * p for n, p in zip(row["counts"], prices.PRICES[row["price"]], strict=True))
        worst[row["price"]] = max(worst[row["price"]], abs(said / row["seconds"] - 1))
    assert {n: round(e, 2) for n, e in worst.items()} == prices.ERRORS
    assert all(p >= 0 for found in prices.PRICES.values() for p in found)


def test_what_the_table_says_of_known_cases() -> None:
    """Facts of the measurements that the choice rests on, each far from a tie."""
    at = Sizes(12, 12, 4096, 4096, 64, 64)
    window = plan_tiles(SoftmaxAttention(QK, (Q >= KV) & (Q - KV < 256)), 128)
    half = plan_tiles(SoftmaxAttention(QK, Q >= KV), 128)
    assert 3 * estimate(window, at) < estimate(f"{OPERATOR} with a window", at)
    assert estimate(half, at) < 0.8 * estimate("dense with a mask", at)
    assert estimate("MultiHeadAttention", at) < estimate("dense", at)


# ------------------------------------------------------------------------------------ choice

LONG = Lengths(SIZES, 1, 1000, "s")


@pytest.fixture
def priced(monkeypatch: pytest.MonkeyPatch) -> None:
    """flat: 1000 s a call; steep: 1 s a call and 1 s for every 120 scores, a row of SIZES' heads
    and batch: equal at a length of about 31; never: dearer than steep everywhere."""
    table = {
        "flat": (1000.0, 0.0, 0.0, 0.0, 0.0),
        "steep": (1.0, 0.0, 0.0, 1 / 12, 0.0),
        "never": (2.0, 0.0, 0.0, 1 / 12, 0.0),
        "near": (995.0, 0.0, 0.0, 1e-6, 0.0),
    }
    monkeypatch.setattr(cost, "PRICES", table)


@pytest.mark.usefixtures("priced")
def test_the_switch_is_where_the_costs_are_equal() -> None:
    found = choose({"flat": "flat", "steep": "steep", "never": "never"}, LONG)
    assert (found.name, found.short, found.switch) == ("flat", "steep", math.isqrt(999))
    assert "never slower by measured prices" in found.why
    assert f"up to {found.switch} tokens steep is cheaper" in found.why


@pytest.mark.usefixtures("priced")
@pytest.mark.parametrize(
    ("lengths", "name"),
    [
        (Lengths(SIZES, 32, 1000, "s"), "flat"),  # the range is beyond the switch
        (Lengths(SIZES, 1, 31, "s"), "steep"),  # or before it
        (Lengths(SIZES, 10, 10), "steep"),  # fixed lengths
        (Lengths(SIZES, 1, 1000), "flat"),  # no single symbol to ask for
    ],
)
def test_one_form_where_the_range_has_no_switch(lengths: Lengths, name: str) -> None:
    found = choose({"flat": "flat", "steep": "steep"}, lengths)
    assert (found.name, found.short) == (name, None)


@pytest.mark.usefixtures("priced")
def test_no_branch_for_a_small_gain_or_beyond_what_an_export_checks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    near = choose({"flat": "flat", "near": "near"}, Lengths(SIZES, 1, 8000, "s"))
    assert (near.name, near.short) == ("flat", None)  # half a percent at most
    monkeypatch.setattr(choice, "LONGEST_SWITCH", 30)
    assert choose({"flat": "flat", "steep": "steep"}, LONG).short is None


@pytest.mark.parametrize(
    ("guard", "size"),
    [
        (Q >= KV, math.inf),
        (KV <= Q, math.inf),
        (~(KV > Q), math.inf),
        (Q + Extent("kv") - Extent("q") >= KV, math.inf),
        ((Q >= KV) & (Q - KV < 5), 5),
        ((KV <= Q) & (KV > Q - 5), 5),
        ((KV <= Q) & (KV >= Q - 5), 6),
        ((Q >= KV) & (Q - KV < 5) & (Q - KV < 3), 3),
        (TRUE, None),
        (Q > KV, None),  # not its own position
        (KV - Q < 5, None),  # looks ahead
        ((Q >= KV) & (Q + KV < 9), None),
        ((Q >= KV) & (KV < 4), None),
        ((Q >= KV) & ((Q - KV < 5) | (KV < 2)), None),
        ((Q >= KV) & (KV > Q - 3 * H), None),
        (Q + Extent("kv") >= KV, None),
    ],
)
def test_windows_of_known_masks(guard: Expr, size: float | None) -> None:
    assert window_of(guard) == size


# ------------------------------------------------------------------------------------ files


class Attention(nn.Module):
    """[b, h, s, d] in and out; two query heads share a key head."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        attend = functional.scaled_dot_product_attention
        return attend(q, k, v, enable_gqa=True, **self.options)


def tensors(b: int, s: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(seed)
    heads = (HEADS, KEY_HEADS, KEY_HEADS)
    return tuple(torch.randn(b, h, s, WIDTH, generator=random) for h in heads)


def arrays(x: tuple[torch.Tensor, ...]) -> dict[str, np.ndarray]:
    return {n: t.numpy() for n, t in zip("qkv", x, strict=True)}


def wanted(x: tuple[torch.Tensor, ...], window: float) -> tuple[np.ndarray, float]:
    """Dense causal attention in float64, and the bound on an error: what float32 makes of it."""
    found = []
    for kind in (np.float64, np.float32):
        q, k, v = (t.numpy().astype(kind) for t in x)
        k, v = (t.repeat(HEADS // KEY_HEADS, 1) for t in (k, v))
        at = np.arange(q.shape[2])
        near = at[:, None] - at
        score = np.where(
            (near >= 0) & (near < window), q @ k.swapaxes(-1, -2) * WIDTH**-0.5, -np.inf
        )
        weights = np.exp(score - score.max(-1, keepdims=True))
        found.append(weights / weights.sum(-1, keepdims=True) @ v)
    wide, own = found
    eps = float(np.finfo(np.float32).eps)
    return wide, max(2 * float(np.abs(own - wide).max()), 4 * eps * float(np.abs(wide).max()))


def switched(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Prices under which GroupQueryAttention is cheaper up to ``at`` tokens, loops beyond."""
    free, call_only = (0.0, 0.0, 0.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0, 0.0)
    pairs = HEADS * at * (at + 1) / 2
    table = dict.fromkeys(prices.PRICES, free)
    table |= {"tiles": call_only, "dense with a mask": call_only}
    table |= dict.fromkeys((OPERATOR, f"{OPERATOR} with a window"), (0.0, 0.0, 0.0, 1 / pairs, 0.0))
    monkeypatch.setattr(cost, "PRICES", table)


class Windowed(nn.Module):
    """The same with a causal window, as rewriting leaves it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        guard = (Q >= KV) & (Q - size < KV)
        form = SoftmaxAttention(QK * WIDTH**-0.5, guard, group=HEADS // KEY_HEADS)
        self.text = str(softmax_cascade(form))

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.ops.attn_rewrite.tiled_attention(q, k, v, [], self.text, 16)


def exported(
    window: float, place: Path, most: int = 500, least: int = 1, target: str = "onnxruntime"
) -> OnnxArtifact:
    batch, length = Dim("batch", min=1, max=64), Dim("sequence", min=least, max=most)
    axes = {0: batch, 2: length}
    model = Attention(is_causal=True) if window == math.inf else Windowed(int(window))
    example = tensors(2, max(60, least))
    program = torch.export.export(model, example, dynamic_shapes=(axes, axes, axes))
    return export_onnx(program, place, target=target)


def instrumented(artifact: OnnxArtifact) -> ort.InferenceSession:
    """A session whose second output is how many scores the loop computed, -1 where the operator
    ran."""
    proto = onnx.inliner.inline_local_functions(onnx.load(artifact.path))
    (branching,) = [n for n in proto.graph.node if n.op_type == "If"]
    graphs = {a.name: a.g for a in branching.attribute}
    short, long = graphs["then_branch"], graphs["else_branch"]
    (operator,) = [n for n in short.node if n.op_type == OPERATOR]
    assert not any(n.op_type in ("MatMul", "Scan") for n in short.node)
    assert not any(n.op_type == OPERATOR for n in long.node)
    helper, kind = onnx.helper, onnx.TensorProto.INT64
    short.node.append(
        helper.make_node(
            "Constant", [], ["ran_short"], value=helper.make_tensor("c", kind, [], [-1])
        )
    )
    short.output.append(helper.make_tensor_value_info("ran_short", kind, []))
    (scan,) = [n for n in long.node if n.op_type == "Scan"]
    body = next(a.g for a in scan.attribute if a.name == "body")
    product = next(n for n in body.node if n.op_type == "MatMul")
    body.node.append(helper.make_node("Size", [product.output[0]], ["step_scores"]))
    body.output.append(helper.make_tensor_value_info("step_scores", kind, []))
    next(a for a in scan.attribute if a.name == "scan_output_axes").ints.append(0)
    scan.output.append("all_scores")
    long.node.append(helper.make_node("ReduceSum", ["all_scores"], ["ran_long"], keepdims=0))
    long.output.append(helper.make_tensor_value_info("ran_long", kind, []))
    branching.output.append("ran")
    proto.graph.output.append(helper.make_tensor_value_info("ran", kind, []))
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(proto.SerializeToString(), options)


@pytest.mark.parametrize("window", [math.inf, 24])
def test_both_branches_are_exact_and_the_length_decides(
    window: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    switched(monkeypatch, 40)
    artifact = exported(window, tmp_path / "m.onnx")
    (site,) = artifact.sites
    assert (site.short, site.switch, site.axis) == (OPERATOR, 40, "q_2")
    assert site.form == ("half" if window == math.inf else "tiles")
    assert "slower by measured prices" in site.choice
    session = instrumented(artifact)
    ran = {}
    for b, s in ((1, 1), (2, 39), (1, 40), (3, 41), (2, 400)):
        x = tensors(b, s, seed=s)
        y, counted = session.run(None, arrays(x))
        reference, bound = wanted(x, window)
        assert np.abs(y - reference).max() <= bound
        ran[s] = int(counted)
        if counted >= 0:
            assert s < 128 or counted < b * HEADS * s * s  # the loop leaves keys out
            assert counted == b * HEADS * loop_pairs(site.rows, s, window)
    assert [s for s, n in ran.items() if n < 0] == [1, 39, 40]
    assert [s for s, n in ran.items() if n > 0] == [41, 400]
    # What ONNX Runtime itself says of the file that was written.
    ops = {
        s: set(artifact.placement(arrays(tensors(1, s)))["CPUExecutionProvider"]) for s in (40, 41)
    }
    assert {s: (OPERATOR in o, "Scan" in o) for s, o in ops.items()} == {
        40: (True, False), 41: (False, True),
    }  # fmt: skip


def loop_pairs(rows: int, s: int, window: float) -> int:
    """Scores of one head: every step of ``rows`` queries reads the keys that any of them keeps, a
    range that is moved inside the sequence, not cut, where a window is."""
    rows = min(rows, s)
    if window == math.inf:
        return sum(rows * min(start + rows, s) for start in range(0, s, rows))
    return rows * -(-s // rows) * min(s, int(window) + rows - 1)


def test_an_export_checks_the_side_that_its_examples_do_not_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attn_rewrite.backends.onnx import oracle

    seen: list[int] = []
    expected = oracle.expected

    def noted(program: Any, inputs: Any, *rest: Any) -> Any:
        seen.append(inputs["q"].shape[2])
        return expected(program, inputs, *rest)

    monkeypatch.setattr(oracle, "expected", noted)
    for at, lengths in ((40, [60, 40]), (50, [60, 40]), (80, [60, 40, 81]), (30, [60, 40, 30])):
        seen.clear()
        switched(monkeypatch, at)
        exported(24, tmp_path / "m.onnx")
        assert seen == lengths


def test_a_range_on_one_side_gets_one_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    switched(monkeypatch, 40)
    (short,) = exported(math.inf, tmp_path / "s.onnx", most=60, least=2).sites
    assert short.switch == 40
    (long,) = exported(math.inf, tmp_path / "l.onnx", least=64).sites
    assert (long.form, long.short, long.switch) == ("half", "", None)
    assert "slower by measured prices" in long.choice
    switched(monkeypatch, 500)
    (one,) = exported(math.inf, tmp_path / "o.onnx", most=500).sites
    assert (one.form, one.short) == (OPERATOR, "")


def test_fixed_lengths_take_the_cheapest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for at, form in ((40, "half"), (900, OPERATOR)):
        switched(monkeypatch, at)
        program = torch.export.export(Attention(is_causal=True), tensors(2, 300))
        artifact = export_onnx(program, tmp_path / "m.onnx", target="onnxruntime")
        assert artifact.sites[0].form == form
        assert artifact.errors["output"] <= wanted(tensors(2, 300), math.inf)[1]


def test_portable_files_have_no_branch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    switched(monkeypatch, 40)
    artifact = exported(math.inf, tmp_path / "m.onnx", target="portable")
    (site,) = artifact.sites
    assert (site.form, site.short, site.switch, site.choice) == ("half", "", None, "")
    assert not any(n.op_type == "If" for n in onnx.load(artifact.path).graph.node)


@pytest.mark.parametrize("kind", ["bool", "padding", "float", "empty"])
def test_a_mask_is_the_operators_bias(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    switched(monkeypatch, 40)
    b, s = 2, 33
    x, random = tensors(b, s), torch.Generator().manual_seed(1)
    keep = torch.rand(b, 1, s, s, generator=random) < 0.6
    keep[..., 0] = True
    if kind == "empty":
        keep[:, :, 5] = False
    if kind == "padding":
        keep = (torch.arange(s) < torch.tensor([[s], [9]]))[:, None, None]
    mask = torch.randn(1, HEADS, s, s, generator=random) if kind == "float" else keep

    class Masked(nn.Module):
        def forward(self, q: Any, k: Any, v: Any, m: Any) -> Any:
            attend = functional.scaled_dot_product_attention
            return attend(q, k, v, attn_mask=m, enable_gqa=True)

    program = torch.export.export(Masked(), (*x, mask))
    artifact = export_onnx(program, tmp_path / "m.onnx", target="onnxruntime")
    (site,) = artifact.sites
    assert site.form == "MultiHeadAttention"
    assert "dense slower by measured prices" in site.choice
    assert artifact.errors  # compared with float64
    got = artifact.run({**arrays(x), "m": mask.numpy()})["output"]
    if kind == "empty":
        assert not got[:, :, 5].any()
    assert np.isfinite(got).all()
