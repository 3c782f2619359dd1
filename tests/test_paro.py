"""PAROAttention: block statistics, choices with known answers, and calibration of a whole model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

import attn_rewrite as ar
from attn_rewrite.backends.torch.statistics import HeadMap, block_statistics, row_lse
from attn_rewrite.block_choice import (
    Target,
    best,
    block_scores,
    choose_blocks,
    incoherence,
    recall_of,
    sparse_share,
    target_score,
    text_blocks,
)
from attn_rewrite.cascade.attention import QK, SoftmaxAttention, softmax_cascade
from attn_rewrite.cascade.expr import KV, TRUE, Expr, Q
from attn_rewrite.cascade.ir import Cascade, TensorDecl
from attn_rewrite.cascade.oracle import interpret
from attn_rewrite.cascade.text import parse_expr
from attn_rewrite.errors import PolicyError, ToolError
from attn_rewrite.plan import Plan, Step, rewritten
from attn_rewrite.policy_text import parse_pipeline
from attn_rewrite.site import Refusal
from attn_rewrite.tables import read_tables, write_tables
from attn_rewrite.token_layout import TokenLayout
from attn_rewrite.token_order import axis_order, axis_orders
from tests.command import attn_rewrite
from tests.sites import make_site

# Metrics with known answers (spec, section 11)


def alike(grid: tuple[int, int, int], axes: str) -> np.ndarray:
    """A map where each token sees, evenly, those that share its coordinates on ``axes``."""
    at = np.indices(grid).reshape(3, -1)
    same = np.all([at["fhw".index(a)][:, None] == at["fhw".index(a)][None] for a in axes], 0)
    return same / same.sum(1, keepdims=True)


def statistics(
    p: np.ndarray, order: np.ndarray, block: int, epsilon: float = 1e-3
) -> list[np.ndarray]:
    """Sums, maxima, small elements and areas of blocks, by loops."""
    p = p[np.ix_(order, order)]
    n = -(-len(p) // block)
    out = np.zeros((4, n, n))
    for i in range(n):
        for j in range(n):
            cell = p[i * block : (i + 1) * block, j * block : (j + 1) * block]
            out[:, i, j] = cell.sum(), cell.max(), (cell < epsilon).sum(), cell.size
    return list(out)


def metrics(grid: tuple[int, int, int], axes: str, block: int) -> dict[str, tuple[float, float]]:
    layout, p = TokenLayout(grid), alike(grid, axes)
    found = {}
    for name in axis_orders(layout):
        sums, tops, small, areas = statistics(p, axis_order(layout, name).indices(len(p)), block)
        found[name] = sparse_share(small, areas, 0.9), incoherence(sums, tops, areas)
    return found


P3 = [
    ((4, 2, 2), "f", {"fhw": (0.75, 1), "fwh": (0.75, 1), "hfw": (0.5, 2), "wfh": (0.5, 2), "hwf": (0, 4), "whf": (0, 4)}),
    ((4, 2, 2), "hw", {"hwf": (0.75, 1), "whf": (0.75, 1), "hfw": (0.5, 2), "wfh": (0.5, 2), "fhw": (0, 4), "fwh": (0, 4)}),
    ((4, 4, 4), "hw", {"hwf": (0.9375, 1), "whf": (0.9375, 1), **dict.fromkeys(("fhw", "fwh", "hfw", "wfh"), (0.75, 4))}),
]  # fmt: skip


@pytest.mark.parametrize(("grid", "axes", "wanted"), P3)
def test_block_metrics(grid: tuple[int, int, int], axes: str, wanted: dict[str, Any]) -> None:
    found = metrics(grid, axes, 4)
    assert found == {n: (pytest.approx(a), pytest.approx(b)) for n, (a, b) in wanted.items()}


def test_the_sign_of_the_published_score() -> None:
    """P4: as printed it takes the order without one empty block."""
    found = metrics((4, 2, 2), "f", 4)
    names = list(found)
    sparse, quant = (list(c) for c in zip(*found.values(), strict=True))
    right = block_scores(sparse, quant, 0.5)
    printed = block_scores(sparse, quant, 0.5, literal=True)
    assert names[best(right, [0.0] * 6)] in ("fhw", "fwh")
    assert names[best(printed, [0.0] * 6)] in ("hwf", "whf")
    assert min(printed) == pytest.approx(0.1429, abs=1e-4)
    assert printed[names.index("fhw")] == pytest.approx(0.1857, abs=1e-4)
    assert min(right) == pytest.approx(0.0714, abs=1e-4)


def test_small_elements_are_no_empty_blocks() -> None:
    """P5: every block passes for skippable, and none is empty."""
    layout, p = TokenLayout((4, 4, 4)), alike((4, 4, 4), "hw")
    none = np.zeros((4, 4), bool)
    recalls = {}
    for name in ("fhw", "hwf"):
        sums, _, small, areas = statistics(p, axis_order(layout, name).indices(64), 16)
        if name == "fhw":
            assert sparse_share(small, areas, 0.9) == 1.0
            assert (sums > 0).all()
        recalls[name] = recall_of(sums, choose_blocks(sums, none, Target(density=0.25)))
    assert recalls == {"fhw": pytest.approx(0.25), "hwf": pytest.approx(1.0)}


def test_plan_geometry() -> None:
    """P6: text and what shares its blocks is dense; one bit a block."""
    tokens = 13 * 30 * 45
    assert tokens == 17_550
    text = text_blocks(226 + tokens, 64, 226, 226 + tokens)
    assert (len(text), int((~text).sum())) == (278, 274)
    assert 274**2 / 8 == 9384.5
    wan = text_blocks(75_600, 64, 0, 75_600)
    assert (len(wan), int(wan.sum()), 75_600 - 1181 * 64) == (1182, 0, 16)


def test_incoherence() -> None:
    """P9, and blocks that hold nothing."""
    one = np.ones((1, 1))
    assert incoherence(11 * one, 8 * one, 4 * one) == pytest.approx(2.909, abs=1e-3)
    assert incoherence(26 * one, 8 * one, 4 * one) == pytest.approx(1.231, abs=1e-3)
    assert incoherence(0 * one, 0 * one, 4 * one) == 1.0


@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 6),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_chosen_blocks(rows: int, columns: int, share: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    sums = rng.random((rows, columns)) ** 4
    forced = rng.random((rows, columns)) < 0.2
    free = int((~forced).sum())
    dense = choose_blocks(sums, forced, Target(density=share))
    enough = choose_blocks(sums, forced, Target(recall=share))
    for keep in (dense, enough):
        assert keep[forced].all()
        assert keep.any(1).all()
    empty = int((~forced.any(1)).sum())
    assert int(dense[~forced].sum()) == max(round(share * free), empty)
    assert recall_of(sums, enough) >= share - 1e-9
    # Nothing that is kept for its mass could be left out.
    spare = enough & ~forced
    spare[np.arange(rows), sums.argmax(1)] = False
    if spare.any():
        lightest = np.where(spare, sums, np.inf).argmin()
        less = enough.copy()
        less.reshape(-1)[lightest] = False
        assert recall_of(sums, less) < share


def test_target_scores() -> None:
    sums = np.diag([4.0, 3.0, 2.0, 1.0])
    none = np.zeros((4, 4), bool)
    assert target_score(sums, none, Target(density=0.25)) == pytest.approx(0)
    assert target_score(sums, none, Target(recall=0.9)) == pytest.approx(
        4 / 16
    )  # a block in each row


# The two-pass kernel


def form_of(case: str, group: int) -> tuple[SoftmaxAttention, tuple[TensorDecl, ...]]:
    score: Expr = QK * 0.3
    guard, sink, reads = TRUE, None, ()
    if case == "causal":
        guard = Q >= KV
    if case == "bias":
        reads = (TensorDecl("B0", ("h", "q", "kv")),)
        score = score + parse_expr("B0[h, q, kv]")
    if case == "tanh":
        score = parse_expr("tanh(QK[b, h, q, kv]) * 5")
    if case == "sink":
        sink = parse_expr("q * 0.1 - 1")
    if case == "empty":
        guard = parse_expr("q >= 3") & parse_expr("kv != q")
    return SoftmaxAttention(score, guard, sink=sink, group=group, reads=reads), reads


@pytest.mark.parametrize("case", ["plain", "causal", "bias", "tanh", "sink", "empty"])
@pytest.mark.parametrize(
    ("length", "block", "group"), [(1, 4, 1), (26, 4, 2), (64, 16, 1), (37, 64, 2)]
)
def test_statistics_are_those_of_the_map(case: str, length: int, block: int, group: int) -> None:
    form, _ = form_of(case, group)
    torch.manual_seed(length)
    inputs: dict[str, Tensor] = {
        "Q": torch.randn(2, 4, length, 8) * 2, "K": torch.randn(2, 4 // group, length, 8) * 2,
        "V": torch.randn(2, 4 // group, length, 8),
    }  # fmt: skip
    if case == "bias":
        inputs["B0"] = torch.randn(4, length, length)
    whole = interpret(softmax_cascade(form), inputs, also=("A",))["A"]
    order = np.random.default_rng(0).permutation(length)
    places = torch.from_numpy(order)
    for b, h in ((0, 0), (1, 3)):
        head = HeadMap(form, inputs, b, h)
        found = block_statistics(head, row_lse(head), places, places, block, 0.02)
        wanted = statistics(whole[b, h].numpy(), order, block, 0.02)
        for got, want in zip(
            (found.sums, found.tops, found.areas), (*wanted[:2], wanted[3]), strict=True
        ):
            assert np.allclose(got.numpy(), want, atol=1e-4)
        # An element next to the threshold may fall on either side of it.
        near = (np.abs(whole[b, h].numpy() - 0.02) < 1e-5).sum()
        assert np.abs(found.small.numpy() - wanted[2]).sum() <= near


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_statistics_of_other_types_and_huge_scores(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q = (torch.randn(1, 1, 24, 8) * 30).to(dtype)
    form = SoftmaxAttention(QK * 10.0)
    inputs = {"Q": q, "K": q, "V": q}
    head = HeadMap(form, inputs, 0, 0)
    at = torch.arange(24)
    found = block_statistics(head, row_lse(head), at, at, 8, 1e-3)
    p = torch.softmax((q.double() @ q.double().mT) * 10.0, -1)[0, 0]
    assert torch.isfinite(found.sums).all()
    assert np.allclose(found.sums.numpy(), statistics(p.numpy(), at.numpy(), 8)[0], atol=1e-2)
    assert float(found.sums.sum()) == pytest.approx(24, rel=1e-3)


def test_no_map_is_ever_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor of a tile is far smaller than the map of one head."""
    length = 6000
    q = torch.randn(1, 1, length, 8)
    head = HeadMap(SoftmaxAttention(QK), {"Q": q, "K": q, "V": q}, 0, 0)
    largest = [0]
    scores = HeadMap.scores

    def watched(self: HeadMap, *args: Tensor) -> Tensor:
        found = scores(self, *args)
        largest[0] = max(largest[0], found.numel())
        return found

    monkeypatch.setattr(HeadMap, "scores", watched)
    at = torch.arange(length)
    found = block_statistics(head, row_lse(head), at, at, 64, 1e-3)
    assert float(found.sums.sum()) == pytest.approx(length, rel=1e-4)
    assert largest[0] <= 1 << 20 < length**2 / 30


# blocks


def blocks_step(pipeline: str, heads: tuple[int, ...] | None = None) -> tuple[Any, Cascade]:
    site = make_site(q_len=24, kv_len=24)
    cascade = rewritten(site, Step(site.name, parse_pipeline(pipeline), heads))
    assert isinstance(cascade, Cascade), cascade
    return site, cascade


def test_two_meanings_of_a_mask() -> None:
    """P7: post-mask output is the renormalised one times the share of the row that was kept."""
    torch.manual_seed(0)
    inputs = {n: torch.randn(1, 4, 24, 8, dtype=torch.float64) for n in "QKV"}
    table = torch.rand(4, 3, 3) > 0.4
    table |= torch.eye(3, dtype=torch.bool)
    held = {**inputs, "t": table}
    outputs = []
    for semantics in ("renormalised", "post-mask"):
        _, cascade = blocks_step(f'blocks(table="t", block=8, semantics="{semantics}")')
        outputs.append(interpret(cascade, held)["AV"])
    keep = table.repeat_interleave(8, 1).repeat_interleave(8, 2)[None]
    p = torch.softmax(inputs["Q"] @ inputs["K"].mT * 0.5, -1)
    ratio = (p * keep).sum(-1, keepdim=True)
    assert torch.allclose(outputs[1], (p * keep) @ inputs["V"], atol=1e-12)
    assert torch.allclose(outputs[1], outputs[0] * ratio, atol=1e-12)
    assert not torch.allclose(outputs[1], outputs[0], atol=1e-3)


@pytest.mark.parametrize("semantics", ["renormalised", "post-mask"])
def test_blocks_of_some_heads_in_another_order(semantics: str) -> None:
    layout = TokenLayout((2, 3, 4))
    pipeline = f'reorder(order="hwf", layout="{layout}") | blocks(table="t", block=4, semantics="{semantics}")'
    _, cascade = blocks_step(pipeline, (1, 2))
    torch.manual_seed(0)
    inputs = {n: torch.randn(1, 4, 24, 8, dtype=torch.float64) for n in "QKV"}
    table = torch.rand(4, 6, 6) > 0.5
    table |= torch.eye(6, dtype=torch.bool)
    found = interpret(cascade, {**inputs, "t": table})["AV"]
    order = torch.from_numpy(axis_order(layout, "hwf").indices(24))
    keep = torch.ones(4, 24, 24, dtype=torch.bool)
    wide = table.repeat_interleave(4, 1).repeat_interleave(4, 2)
    for h in (1, 2):
        turned = torch.zeros(24, 24, dtype=torch.bool)
        turned[order[:, None], order[None]] = wide[h]
        keep[h] = turned
    s = inputs["Q"] @ inputs["K"].mT * 0.5
    if semantics == "post-mask":
        p = torch.softmax(s, -1) * keep
    else:
        p = torch.softmax(s.masked_fill(~keep, -math.inf), -1)
    assert torch.allclose(found, p @ inputs["V"], atol=1e-12)


# Calibration of a model

GRID = TokenLayout((4, 4, 8))
SELF = ar.Where(kind="self")


class Video(nn.Module):
    """Attention over 4 x 4 x 8 tokens whose heads see a frame, a place in all frames, and all."""

    def __init__(self, layers: int = 1) -> None:
        super().__init__()
        at = torch.from_numpy(np.indices(GRID.grid).reshape(3, -1))
        hot = [nn.functional.one_hot(at[0], 32), nn.functional.one_hot(at[1] * 8 + at[2], 32)]
        codes = torch.stack([*hot, torch.zeros_like(hot[0])]).float() * 6  # [heads, tokens, 32]
        self.codes: Tensor
        self.register_buffer("codes", codes)
        self.mix = nn.ModuleList(nn.Linear(48, 48) for _ in range(layers))
        self.out = nn.Linear(48, 48)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        for mix in self.mix:
            b, n, _ = x.shape
            v = mix(x).view(b, n, 3, 16).transpose(1, 2)
            q = torch.cat([self.codes.expand(b, -1, -1, -1), v * 0.05], -1)
            y = nn.functional.scaled_dot_product_attention(q, q, v, scale=0.5)
            x = x + y.transpose(1, 2).flatten(2)
        return self.out(x)


def calls(count: int, seed: int = 1) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(1, 48, *GRID.grid, generator=g) for _ in range(count)]


def calibrated(policy: str, **options: Any) -> tuple[Video, ar.OptimizedModule]:
    torch.manual_seed(0)
    model = Video().eval()
    given = options.pop("calibration", calls(2))
    return model, ar.optimize(model, policy, (calls(1, 9)[0],), calibration=given, **options)


def test_each_head_gets_the_order_of_its_structure() -> None:
    model, found = calibrated("paro(density=0.25, block=8)")
    (step,) = found.plan.steps
    orders = step.transforms[0].order  # type: ignore[attr-defined]
    assert orders[0][0] == "f"
    assert orders[1][-1] == "f"
    table = found.plan.tables["attention#0/paro"]
    assert table.shape == (3, 16, 16)
    assert (table.reshape(3, -1).sum(1) == 64).all()
    report = found.report.sites[0]
    assert report.exactness == "approximate"
    assert report.approximation is not None
    # Heads 0 and 1 keep all they see: 4 frames of 4 x 4 blocks, and the diagonal.
    x = calls(1, 9)[0]
    heads_of = _heads(model, found, x)
    assert heads_of[0] < 1e-4
    assert heads_of[1] < 1e-4
    assert heads_of[2] > 1e-2
    assert "calibrated over 2 calls" in step.note


def _heads(model: Video, found: ar.OptimizedModule, x: Tensor) -> list[float]:
    """The error of each head, seen through an output layer that copies."""
    with torch.no_grad():
        a, b = model(x), found(x)
        error = torch.linalg.lstsq(model.out.weight, (a - b)[0].mT).solution.view(3, 16, -1)
    return [float(e.abs().max()) for e in error]


def test_recall_is_reached_with_few_blocks() -> None:
    _, found = calibrated("paro(recall=0.99, block=8)")
    (table,) = found.plan.tables.values()
    kept = table.reshape(3, -1).mean(1)
    assert kept[0] <= 0.3
    assert kept[1] <= 0.1
    assert kept[2] > 0.9


def test_tiles_are_those_of_the_table() -> None:
    _, found = calibrated("paro(density=0.25, block=32)")
    cost = found.report.sites[0].cost_after
    assert cost is not None
    assert cost.tiles is not None
    assert cost.tiles[0] < cost.tiles[1]
    # Queries and keys are one tensor here, gathered once; values; the output.
    assert found.report.gathers == {"at_sites": 3, "left": 3, "of_tables": 0}


@pytest.mark.parametrize("metric", ["blocks", "literal"])
def test_the_papers_metrics(metric: str) -> None:
    _, found = calibrated(f'paro(density=0.2, block=8, metric="{metric}")')
    order = getattr(found.plan.steps[0].transforms[0], "order", ("fhw",) * 3)
    orders = (order,) * 3 if isinstance(order, str) else order
    assert (orders[0][0] == "f") is (metric == "blocks")


def test_pipelines() -> None:
    _, found = calibrated("paro(density=0.3, block=16) | int8")
    assert found.plan.steps[0].text.endswith("| int8")
    _, found = calibrated('window(size=64) | paro(density=0.3, block=16, semantics="post-mask")')
    assert found.plan.steps[0].text.startswith("window(size=64) | ")
    assert "post-mask" in found.plan.steps[0].text


def test_some_heads_and_candidates() -> None:
    torch.manual_seed(0)
    model = Video().eval()
    policy = ar.Policy(
        [
            ar.Rule(ar.Where(heads=(1,)), 'paro(density=0.1, block=8, orders=["fhw", "whf"])'),
            ar.Rule(apply="paro(density=0.5, block=8)"),
        ]
    )
    found = ar.optimize(model, policy, (calls(1)[0],), calibration=calls(1))
    by_heads = {s.heads: s for s in found.plan.steps}
    assert "whf" in by_heads[(1,)].text
    assert sorted(n.rpartition("/")[2] for n in found.plan.tables) == ["paro", "paro1"]
    cost = found.report.sites[0].implementation
    assert cost is not None


def test_a_plan_is_saved_with_its_tables(tmp_path: Path) -> None:
    _, found = calibrated("paro(density=0.3, block=16)")
    x = calls(1, 5)[0]
    ar.save(found, tmp_path / "out")
    again = ar.load(tmp_path / "out")
    assert again.plan.hash == found.plan.hash
    for name, table in found.plan.tables.items():
        assert np.array_equal(again.plan.tables[name], table)
    with torch.no_grad():
        assert torch.equal(again(x), found(x))
    torch.manual_seed(0)
    replayed = ar.optimize(Video().eval(), "exact", (x,), plan=again.plan)
    with torch.no_grad():
        assert torch.equal(replayed(x), found(x))
    # One bit a block.
    bits = sum(t.size for t in found.plan.tables.values())
    assert (tmp_path / "out" / "plan.safetensors").stat().st_size <= bits // 8 + 512
    other = Plan(found.plan.steps, tables={n: ~t for n, t in found.plan.tables.items()})
    assert other.hash != found.plan.hash


def test_plans_without_their_tables(tmp_path: Path) -> None:
    _, found = calibrated("paro(density=0.3, block=16)")
    text = found.plan.dumps()
    with pytest.raises(PolicyError, match="tables"):
        Plan.from_json(text)
    file = tmp_path / "plan.safetensors"
    with pytest.raises(PolicyError, match="missing"):
        Plan.from_json(text, tables=file)
    write_tables({n: ~t for n, t in found.plan.tables.items()}, file)
    with pytest.raises(PolicyError, match="not the one"):
        Plan.from_json(text, tables=file)
    file.write_bytes(b"nothing")
    with pytest.raises(PolicyError, match="cannot be read"):
        Plan.from_json(text, tables=file)
    with pytest.raises(PolicyError, match="no shape"):
        read_tables({"a": {}}, _written(tmp_path / "b", {"a": np.ones((2, 2), bool)}))
    bare = Plan(found.plan.steps)
    torch.manual_seed(0)
    kept = ar.optimize(Video().eval(), "exact", (calls(1)[0],), plan=bare)
    assert [r.code for r in kept.report.sites[0].refusals] == ["table-missing"]


def _written(path: Path, tables: dict[str, Any]) -> Path:
    write_tables(tables, path)
    return path


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    state = tmp_path / "state"
    seen: list[tuple[int, int, str]] = []

    def stop(done: int, total: int, what: str) -> None:
        seen.append((done, total, what))
        if done == 2:
            raise KeyboardInterrupt

    given = calls(3)
    with pytest.raises(KeyboardInterrupt):
        calibrated("paro(density=0.3, block=16)", calibration=ar.Calibration(given, state, stop))
    assert (
        seen == [(1, 3, "scaled_dot_product_attention#0"), (2, 3, "scaled_dot_product_attention#0")]
        or len(seen) == 2
    )
    later: list[tuple[int, int, str]] = []
    _, found = calibrated(
        "paro(density=0.3, block=16)",
        calibration=ar.Calibration(given, state, lambda *x: later.append(x)),
    )
    assert [w for _, _, w in later][:2] == ["measured before"] * 2
    assert [d for d, _, _ in later] == [1, 2, 3]
    _, whole = calibrated("paro(density=0.3, block=16)", calibration=given)
    assert whole.plan.hash == found.plan.hash
    assert not list(state.glob("*.partial"))
    with pytest.raises(PolicyError, match="another policy, model or inputs"):
        calibrated("paro(density=0.4, block=16)", calibration=ar.Calibration(given, state))
    (file,) = state.glob("site-*")
    whole_file = file.read_bytes()
    for broken in (b"nothing", whole_file[:-5], whole_file.replace(b"[0, 1, 2]", b"{0, 1, 2}")):
        file.write_bytes(broken)
        with pytest.raises(PolicyError, match="cannot be read"):
            calibrated("paro(density=0.3, block=16)", calibration=ar.Calibration(given, state))


def test_a_state_that_cannot_be_written(tmp_path: Path) -> None:
    state = tmp_path / "state"
    (state / "site-0000.partial").mkdir(parents=True)
    with pytest.raises(ToolError, match="cannot be written"):
        calibrated("paro(density=0.3, block=16)", calibration=ar.Calibration(calls(1), state))


def test_a_state_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PolicyError, match="cannot be made"):
        calibrated("paro(density=0.3)", calibration=ar.Calibration(calls(1), tmp_path / "file"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("paro()", "density or recall"), ("paro(density=0.3, recall=0.9)", "density or recall"),
        ("paro(density=2.0)", "at most 1"), ("paro(density=0.3, orders=[])", "orders is empty"),
        ('blocks(table="a/b")', "expected a name"), ("blocks()", "needs table"),
        ('paro(density=0.3, metric="best")', "expected"),
    ],
)  # fmt: skip
def test_policy_errors(text: str, words: str) -> None:
    with pytest.raises(PolicyError, match=words):
        parse_pipeline(text)


def test_paro_needs_samples() -> None:
    with pytest.raises(PolicyError, match="give calibration inputs"):
        calibrated("paro(density=0.3)", calibration=None)
    with pytest.raises(PolicyError, match="expected 1 at least"):
        calibrated("paro(density=0.3)", calibration=[])
    site = make_site()
    found = rewritten(site, Step(site.name, parse_pipeline('paro(density=0.3, layout="grid=4x8")')))
    assert isinstance(found, Refusal)
    assert found.code == "paro-uncalibrated"


@pytest.mark.parametrize(
    ("policy", "code"),
    [
        ('paro(density=0.3, layout="grid=4x4")', "layout-misfit"),
        ('reorder(order="hwf") | paro(density=0.3, layout="grid=4x4x8")', "paro-reordered"),
        ("int8 | paro(density=0.3)", "paro-late"),
        ('paro(density=0.3, orders=["hw"])', "paro-misfit"),
    ],
)
def test_refusals(policy: str, code: str) -> None:
    torch.manual_seed(0)
    found = ar.optimize(Video().eval(), policy, (calls(1)[0],), calibration=calls(2), verify=False)
    assert [r.code for r in found.report.sites[0].refusals] == [code]


def test_shared_keys_and_text_around_the_grid() -> None:
    """Grouped heads share an order; blocks that touch text are dense."""

    class Joint(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    layout = TokenLayout((2, 4, 8), text=5, suffix=3)
    n = layout.q_len
    torch.manual_seed(0)
    inputs = (torch.randn(2, 4, n, 8), torch.randn(2, 2, n, 8), torch.randn(2, 2, n, 8))
    policy = f'paro(density=0.3, block=8, layout="{layout}")'
    found = ar.optimize(
        Joint(), ar.Policy([ar.Rule(ar.Where(kind=("self", "cross", "joint")), policy)]), inputs,
        calibration=[inputs], dynamic_shapes={},
    )  # fmt: skip
    (step,) = found.plan.steps
    assert not found.report.sites[0].refusals, found.report.sites[0].refusals
    (table,) = found.plan.tables.values()
    text = text_blocks(n, 8, 5, 5 + 64)
    assert table[:, text].all()
    assert table[:, :, text].all()
    free = ~(text[:, None] | text[None])
    assert (table[:, free].sum(1) == round(0.3 * free.sum())).all()
    order = getattr(step.transforms[0], "order", "fhw")
    assert isinstance(order, str) or len(order) == 2


def test_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "small_video.py").write_text(
        "import torch\nfrom tests.test_paro import Video, calls\n\n"
        "def model():\n    torch.manual_seed(0)\n    return Video().eval(), (calls(1, 9)[0],), {}, {}\n"
    )
    root = Path(__file__).resolve().parents[1]
    monkeypatch.setenv(
        "PYTHONPATH", f"{tmp_path}:{root}:{__import__('os').environ.get('PYTHONPATH', '')}"
    )
    save_file({"x": torch.cat(calls(2))}, tmp_path / "samples.safetensors")
    done = attn_rewrite(
        "optimize", "small_video:model", "--policy", "paro(density=0.3, block=16)",
        "--calibration", tmp_path / "samples.safetensors", "--calibration-state", tmp_path / "state",
        "-o", tmp_path / "out", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "calibrating: 2 of 2" in done.err
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert len(plan["tables"]) == 1
    assert (tmp_path / "out" / "plan.safetensors").is_file()
    again = attn_rewrite(
        "optimize", "small_video:model", "--plan", tmp_path / "out" / "plan.json", "-o", tmp_path / "two", "--json",
    )  # fmt: skip
    assert again.code == 0, again.err
    assert json.loads((tmp_path / "two" / "plan.json").read_text())["hash"] == plan["hash"]
    lost = attn_rewrite(
        "optimize", "small_video:model", "--policy", "paro(density=0.3)",
        "--calibration-state", tmp_path / "state", "-o", tmp_path / "three",
    )  # fmt: skip
    assert lost.code == 2
    assert "give both" in lost.err
