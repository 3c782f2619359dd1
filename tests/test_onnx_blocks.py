"""Block lists as ONNX: exact steps, executed tiles counted in a session, numbers against numpy."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.export import Dim

import attn_rewrite as ar
from attn_rewrite import export_onnx
from attn_rewrite.backends.onnx.blocks import BlockPlan, Problem, plan_blocks
from attn_rewrite.backends.onnx.graph import Recorder
from attn_rewrite.backends.onnx.tiles import emit_attention
from attn_rewrite.cascade.attention import QK, SoftmaxAttention
from attn_rewrite.cascade.expr import FALSE, KV, Const, Expr, H, Q, Rank, Read, call, eq
from attn_rewrite.cascade.ir import TensorDecl
from attn_rewrite.errors import LowerError
from attn_rewrite.passes.sparse.window import Window
from attn_rewrite.plan import Plan, Step
from attn_rewrite.policy import Policy, Rule, Where
from tests.test_onnx import WIDTH, Sdpa, Tiled, bound, capture, reference, tokens
from tests.test_onnx_window import HQ, D, F, dense, evaluate

EPS = float(np.finfo(np.float32).eps)
B = Rank("b")
LISTED = Read("L", (H, call("floordiv", Q, 8), call("floordiv", KV, 8)))
LIST = TensorDecl("L", ("h", "i", "j"))


@dataclasses.dataclass(frozen=True)
class Case:
    """An attention over fixed lengths, its constant tables and its other reads."""

    form: SoftmaxAttention
    s: int
    t: int
    block: int = 8
    tables: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    reads: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def plan(self) -> BlockPlan:
        problem = Problem(HQ, self.form.group, self.s, self.t)
        return plan_blocks(self.form.guard, problem, self.block, self.tables)


def instrumented(case: Case, opset: int = 20) -> onnx.ModelProto:
    """The attention as a model whose further outputs are the sizes of all Q K^T of its steps."""
    r = Recorder("site", opset)

    def value(name: str, array_type: ir.DataType, shape: list[str | int]) -> ir.Value:
        return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(array_type))

    kind, hkv = ir.DataType.FLOAT, HQ // case.form.group
    inputs = [
        value("q", kind, ["batch", HQ, case.s, D]),
        value("k", kind, ["batch", hkv, case.t, D]),
        value("v", kind, ["batch", hkv, case.t, F]),
    ]
    for name, array in {**case.tables, **case.reads}.items():
        inputs.append(value(name, ir.DataType.from_numpy(array.dtype), list(array.shape)))
    out = emit_attention(r, inputs, case.form, case.plan)
    out.name, out.dtype, out.shape = "y", kind, ir.Shape(["batch", HQ, case.s, F])
    graph = ir.Graph(inputs, [out], nodes=r.nodes, name="g", opset_imports={"": opset})
    proto = ir.to_proto(ir.Model(graph, ir_version=10))
    onnx.checker.check_model(proto, full_check=True)
    for i, scan in enumerate(n for n in proto.graph.node if n.op_type == "Scan"):
        body = scan.attribute[[a.name for a in scan.attribute].index("body")].g
        product = next(n for n in body.node if n.op_type == "MatMul")
        body.node.append(onnx.helper.make_node("Size", [product.output[0]], [f"size_{i}"]))
        body.output.append(onnx.helper.make_tensor_value_info(f"size_{i}", 7, []))
        scan.attribute[[a.name for a in scan.attribute].index("scan_output_axes")].ints.append(0)
        scan.output.append(f"sizes_{i}")
        proto.graph.output.append(onnx.helper.make_tensor_value_info(f"sizes_{i}", 7, ["steps"]))
    return proto


def kept(case: Case, b: int) -> np.ndarray:
    """The mask, token by token."""
    shape = {"b": (b, 1, 1, 1), "h": (HQ, 1, 1), "q": (case.s, 1), "kv": (case.t,)}
    env = {n: np.arange(np.prod(x)).reshape(x) for n, x in shape.items()}
    env |= {"#q": case.s, "#kv": case.t, **case.tables, **case.reads}
    return np.broadcast_to(evaluate(case.form.guard, env), (b, HQ, case.s, case.t)).astype(bool)


def expected_blocks(case: Case, keep: np.ndarray, block: int) -> int:
    """Blocks in which some pair is kept, over all heads."""
    rows, columns = -(-case.s // block), -(-case.t // block)
    padded = np.zeros((HQ, rows * block, columns * block), bool)
    padded[:, : case.s, : case.t] = keep.any(0)
    return int(padded.reshape(HQ, rows, block, columns, block).any((2, 4)).sum())


def check(case: Case, b: int = 2, *, exact: bool = True) -> int:
    """Numbers against float64, tiles against the token mask; returns the blocks executed."""
    rng, hkv = np.random.default_rng(0), HQ // case.form.group
    shapes = {"q": (b, HQ, case.s, D), "k": (b, hkv, case.t, D), "v": (b, hkv, case.t, F)}
    arrays = {n: rng.normal(size=x).astype(np.float32) for n, x in shapes.items()}
    arrays |= case.tables | case.reads
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(instrumented(case).SerializeToString(), options)
    got, *sizes = session.run(None, arrays)
    keep = kept(case, b)
    wide = dense(case.form, arrays, keep, np.float64)
    own = dense(case.form, arrays, keep, np.float32)
    bound = max(2 * np.abs(own - wide).max(), 4 * EPS * np.abs(wide).max())
    assert got.shape == wide.shape
    assert np.abs(got - wide).max() <= bound
    plan = case.plan
    executed = sum(int(x.sum()) for x in sizes) // (b * plan.block**2)
    assert executed == plan.executed
    if exact:
        assert executed == expected_blocks(case, keep, plan.block)
    return executed


GUARDS: dict[str, Expr] = {
    "causal": Q >= KV,
    "grid": eq(call("floordiv", Q, 16), call("floordiv", KV, 16)),
    "strided": eq(call("mod", call("floordiv", KV, 8), 3), call("mod", call("floordiv", Q, 8), 3)),
    "per head": (Q >= KV) & (Q - KV < 8 + 8 * H),
    "shards": eq(call("mod", call("floordiv", KV, 8), HQ), H) | eq(Q, KV),
    "global rows": (Q < 5) | (KV < 3) | eq(Q, KV),
    "empty rows": (KV < Q - 20) & (H < 3),
    "one block": (Q < 8) & (KV < 8) & eq(H, 2),
}


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("lengths", [(48, 48), (45, 51), (1, 40), (50, 7)])
@pytest.mark.parametrize("name", GUARDS)
def test_closed_form_guards(name: str, lengths: tuple[int, int], group: int) -> None:
    check(Case(SoftmaxAttention(QK * 0.4, GUARDS[name], group=group), *lengths))


def test_a_guard_that_keeps_nothing_runs_nothing() -> None:
    assert check(Case(SoftmaxAttention(QK, FALSE), 20, 30)) == 0


def blocks(seed: int, rows: int, columns: int, share: float = 0.3) -> np.ndarray:
    return np.random.default_rng(seed).random((HQ, rows, columns)) < share


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sizes", [(64, 64), (60, 43)])
def test_block_lists_of_every_head(sizes: tuple[int, int], causal: bool) -> None:
    s, t = sizes
    guard = (LISTED & (Q >= KV)) if causal else LISTED
    table = blocks(3, -(-s // 8), -(-t // 8))
    case = Case(SoftmaxAttention(QK * 0.4, guard, reads=(LIST,)), s, t, tables={"L": table})
    executed = check(case)
    assert 0 < executed <= table.sum()


def test_sink_soft_cap_bias_and_weight_inside_the_tiles() -> None:
    bias = np.random.default_rng(1).normal(size=(HQ, 40, 40)).astype(np.float32)
    logit = np.linspace(-1, 1, HQ).astype(np.float32)
    table = blocks(5, 5, 5, 0.5)
    form = SoftmaxAttention(
        5.0 * call("tanh", QK * 0.1) + Read("Bias", (H, Q, KV)),
        LISTED,
        weight=1 + call("cast_f32", KV) * 0.01,
        sink=Read("Logit", (H,)),
        reads=(LIST, TensorDecl("Bias", ("h", "q", "kv")), TensorDecl("Logit", ("h",))),
    )
    check(Case(form, 40, 40, tables={"L": table}, reads={"Bias": bias, "Logit": logit}))


def test_a_padding_mask_of_the_batch_is_evaluated_in_the_tiles() -> None:
    real = np.arange(40)[None] < np.array([[40], [11]])
    guard = GUARDS["grid"] & Read("M", (B, KV))
    form = SoftmaxAttention(QK, guard, reads=(TensorDecl("M", ("b", "kv")),))
    check(Case(form, 40, 40, reads={"M": real}), exact=False)


def test_steps_hold_rows_of_one_count_within_the_budget() -> None:
    plan = plan_blocks(Q >= KV, Problem(12, 1, 4096, 4096), 64)
    assert (plan.executed, plan.total) == (12 * 64 * 65 // 2, 12 * 64 * 64)
    assert sum(g.rows.size for g in plan.groups) == 12 * 64
    for g in plan.groups:
        assert (g.size * g.spans[:, 1] * 64 * 64 <= 1 << 20).all()
        assert g.size & (g.size - 1) == 0
    assert len(plan.groups) <= 21


def test_the_block_is_halved_where_that_saves() -> None:
    problem = Problem(2, 1, 2048, 2048)
    assert plan_blocks((Q >= KV) & (Q - KV < 64), problem, 128).block == 64
    assert (
        plan_blocks(eq(call("floordiv", Q, 512), call("floordiv", KV, 512)), problem, 128).block
        == 128
    )


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    s=st.integers(1, 40),
    t=st.integers(1, 40),
    block=st.sampled_from([4, 8, 16]),
    seed=st.integers(0, 99),
    a=st.sampled_from(sorted(GUARDS)),
    b=st.sampled_from(sorted(GUARDS)),
    either=st.booleans(),
)
def test_any_guard(s: int, t: int, block: int, seed: int, a: str, b: str, either: bool) -> None:
    guard = GUARDS[a] | GUARDS[b] if either else GUARDS[a] & GUARDS[b]
    check(Case(SoftmaxAttention(QK * Const(0.3), guard), s, t, block), b=1, exact=False)


# ------------------------------------------------------------------------------------ whole models


class Listed(Tiled):
    """An attention whose guard reads a block list the model holds."""

    def __init__(self, table: np.ndarray) -> None:
        super().__init__(SoftmaxAttention(QK, LISTED, group=2, reads=(LIST,)), block=8)
        self.register_buffer("table", torch.from_numpy(table))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x, self.table)


def test_a_block_list_of_the_model_leaves_as_blocks(tmp_path: Path) -> None:
    table = blocks(7, 5, 5)
    model, x = Listed(table), tokens(2, 37)
    batch_only = torch.export.export(model.eval(), (x,), dynamic_shapes=({0: Dim("n")},))
    artifact = export_onnx(batch_only, tmp_path / "m.onnx")
    (site,) = artifact.sites
    assert (site.form, site.skips, site.tiles) == ("blocks", True, (int(table.sum()), 4 * 25))
    keep = table.repeat(8, 1).repeat(8, 2)[:, :37, :37]
    for b in (1, 3):
        x = tokens(b, 37, seed=b)
        wanted = reference(model, x, keep)
        assert np.abs(artifact.run({"x": x.numpy()})["output"] - wanted).max() <= bound(
            model, (x,), wanted
        )


@pytest.mark.parametrize("split", [[0, 1], [0], [1, 3]])
def test_heads_of_one_site_with_other_windows(split: list[int], tmp_path: Path) -> None:
    rules = [Rule(where=Where(heads=split), apply=["window(size=8)"]),
             Rule(apply=["window(size=32, sinks=2)"])]  # fmt: skip
    model, x = Sdpa(is_causal=True).eval(), tokens(2, 256)
    done = ar.optimize(model, Policy(rules=rules), (x,))
    artifact = export_onnx(done, tmp_path / "m.onnx")  # compares at two sizes
    (site,) = artifact.sites
    assert (site.form, site.skips) == ("tiles", True)
    distance = np.arange(256)[:, None] - np.arange(256)
    wide = (distance < 32) | (np.arange(256) < 2)
    keep = np.stack([(distance < 8 if h in split else wide) & (distance >= 0) for h in range(HQ)])
    wanted = reference(model, x, keep)
    error = np.abs(artifact.run({"x": x.numpy()})["output"] - wanted).max()
    assert error <= bound(done, (x,), wanted)


def test_a_sparse_site_is_never_a_dense_mask(tmp_path: Path) -> None:
    form = SoftmaxAttention(QK, GUARDS["strided"], group=2)
    program = capture(Tiled(form, 8), tokens(2, 48))
    plan = Plan((Step("attention.0", (Window(size=8),)),))
    with pytest.raises(LowerError, match="fixed lengths") as caught:
        export_onnx(SimpleNamespace(program=program, plan=plan), tmp_path / "m.onnx")
    assert caught.value.refusals[0].code == "onnx-dense-mask"
    assert not list(tmp_path.iterdir())


def test_a_mask_without_bands_leaves_as_blocks_of_the_length_it_was_shown(tmp_path: Path) -> None:
    model, x = Sdpa().eval(), tokens(2, 250)
    done = ar.optimize(model, "longformer(window=16, global_tokens=2)", (x,))
    artifact = export_onnx(done, tmp_path / "m.onnx")
    (site,) = artifact.sites
    assert (site.name, site.form, site.skips) == (done.sites[0].name, "blocks", True)
    assert artifact.inputs[0].shape == ("batch", 250, WIDTH)
    assert "example" in artifact.metadata["attn_rewrite.lengths"]
    at = np.arange(250)
    near = np.abs(at[:, None] - at) <= 8
    keep = near | (at < 2) | (at[:, None] < 2)
    for b in (1, 3):
        x = tokens(b, 250, seed=b)
        wanted = reference(model, x, keep)
        error = np.abs(artifact.run({"x": x.numpy()})["output"] - wanted).max()
        assert error <= bound(done, (x,), wanted)


def _between(x: Expr, low: float, high: float) -> Expr:
    return call("min", call("max", x, low), high)


def _clipped(x: Expr, low: float, high: float) -> Expr:
    return call("clip", x, low, high)


@pytest.mark.parametrize("limited", [_between, _clipped], ids=lambda f: f.__name__)
def test_one_value_is_bounded_twice_inside_the_tiles(limited: Any, tmp_path: Path) -> None:
    """A distance in two tables' ranges (MPNet): both pairs of bounds reach the file."""
    score = QK + limited(Q - KV, -4, 4) * 0.25 + limited(Q - KV, -9, 6) * 0.5
    model = Tiled(SoftmaxAttention(score, (Q - KV >= 0) & (Q - KV < 12), group=2), 8)
    x = tokens(2, 48)
    artifact = export_onnx(capture(model, x), tmp_path / "m.onnx")
    assert artifact.sites[0].form == "tiles"
    distance = np.arange(48)[:, None] - np.arange(48)
    bias = distance.clip(-4, 4) * 0.25 + distance.clip(-9, 6) * 0.5
    wanted = reference(model, x, (distance >= 0) & (distance < 12), bias, scale=1.0)
    error = np.abs(artifact.run({"x": x.numpy()})["output"] - wanted).max()
    assert error <= bound(model, (x,), wanted)
