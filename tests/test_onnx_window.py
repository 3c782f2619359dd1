"""Windows and other masks as ONNX: key ranges derived, tiles executed, numbers against numpy."""

# ruff: noqa: SIM300 (KV is a coordinate, not a constant)

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attn_rewrite.backends.onnx.bands import EVERY_KEY, Affine, Reach, Segment, segments
from attn_rewrite.backends.onnx.elementwise import Coordinate, Elementwise, Frame
from attn_rewrite.backends.onnx.graph import Recorder
from attn_rewrite.backends.onnx.tile_plans import plan_tiles
from attn_rewrite.backends.onnx.tiles import emit_attention
from attn_rewrite.cascade.attention import QK, SoftmaxAttention
from attn_rewrite.cascade.expr import (
    FALSE,
    KV,
    OPERATORS,
    TRUE,
    Const,
    Expr,
    Extent,
    H,
    Q,
    Rank,
    Read,
    call,
    eq,
    substitute,
    where,
)
from attn_rewrite.cascade.ir import TensorDecl
from attn_rewrite.errors import LowerError

HQ, D, F = 4, 8, 6
LAST = Extent("kv") - Extent("q")  # the offset of a query that follows a cache
EPS = float(np.finfo(np.float32).eps)


def causal_window(size: int, offset: Expr | int = 0) -> Expr:
    position = Q + offset
    return (position - KV >= 0) & (position - KV < size)


def symmetric_window(size: int) -> Expr:
    left, right = size // 2, size - 1 - size // 2
    return (Q - KV <= left) & (KV - Q <= right)


# ------------------------------------------------------------------------------------ key ranges


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (causal_window(256), (Segment(Affine(-255), 256 + 127, relative=True),)),
        (symmetric_window(9), (Segment(Affine(-4), 9 + 127, relative=True),)),
        (symmetric_window(10), (Segment(Affine(-5), 10 + 127, relative=True),)),
        (call("abs", Q - KV) <= 3, (Segment(Affine(-3), 7 + 127, relative=True),)),
        ((Q - KV < 5) & (KV - Q < 9), (Segment(Affine(-4), 13 + 127, relative=True),)),
        (
            causal_window(64, LAST),
            (Segment(Affine(-63, (("kv", 1), ("q", -1))), 64 + 127, relative=True),),
        ),
        (
            (Q >= KV) & ((Q - KV < 64) | (KV < 4)),
            (Segment(Affine(0), 4), Segment(Affine(-63), 64 + 127, relative=True)),
        ),
        (eq(call("floordiv", Q, 16), call("floordiv", KV, 16)),
         (Segment(Affine(-15), 31 + 127, relative=True),)),
        (eq(Q, KV), (Segment(Affine(0), 128, relative=True),)),
        ((KV >= Extent("kv") - 3) & TRUE, (Segment(Affine(-3, (("kv", 1),)), 3),)),
        (~((Q - KV >= 8) | (KV > Q)), (Segment(Affine(-7), 8 + 127, relative=True),)),
        (where(KV < 2, TRUE, causal_window(8)),
         (Segment(Affine(0), 2), Segment(Affine(-7), 8 + 127, relative=True))),
        (causal_window(8) & Read("M0", (Rank("b"), KV)),
         (Segment(Affine(-7), 8 + 127, relative=True),)),
        # two windows that touch become one range, windows far apart stay two
        (causal_window(8) | ((Q - KV >= 8) & (Q - KV < 20)),
         (Segment(Affine(-19), 20 + 127, relative=True),)),
        (causal_window(8) | ((Q - KV >= 1000) & (Q - KV < 1008)),
         (Segment(Affine(-1007), 8 + 127, relative=True),
          Segment(Affine(-7), 8 + 127, relative=True))),
        (FALSE, ()),
        (causal_window(8) & (Q - KV > 8), ()),
    ],
)  # fmt: skip
def test_key_ranges_of_known_masks(mask: Expr, expected: tuple[Segment, ...]) -> None:
    assert segments(mask, 128) == expected


@pytest.mark.parametrize(
    "mask",
    [
        TRUE,
        causal_window(8) | (Q < 4),  # global rows see every key
        KV < 2 * Q,  # not parallel to the diagonal
        Read("M0", (Rank("b"), Q, KV)),
        eq(call("mod", Q, 4), call("mod", KV, 4)),
        causal_window(8) | Read("M0", (Rank("b"), KV)),
        call("ne", Q, KV),
        KV >= Extent("q"),
    ],
)
def test_masks_without_a_fixed_band_read_every_key(mask: Expr) -> None:
    assert segments(mask, 128) == (EVERY_KEY,)


@pytest.mark.parametrize(
    ("mask", "reach"),
    [
        (Q >= KV, Reach(high=Affine(0))),
        (KV - Q < 5, Reach(high=Affine(4))),
        (KV <= Q + LAST, Reach(high=Affine(0, (("kv", 1), ("q", -1))))),
        (KV > Q - 3, Reach(low=Affine(-2))),
        (~(Q >= KV), Reach(low=Affine(1))),
        ((Q >= KV) & ((Q - KV < 5) | (Q < 3)), Reach(high=Affine(0))),
        ((Q >= KV) | (Q >= KV - 7), Reach(high=Affine(7))),
        ((Q >= KV) & (Q >= KV + 2), Reach(high=Affine(-2))),
    ],
)
def test_masks_bounded_on_one_side_follow_the_block(mask: Expr, reach: Reach) -> None:
    assert segments(mask, 128) == (reach,)


@pytest.mark.parametrize("lengths", [(1, 1), (100, 100), (7, 61), (61, 7), (64, 64)])
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("side", ["below", "above", "shifted", "behind a cache"])
def test_causal_masks_skip_the_other_half(side: str, group: int, lengths: tuple[int, int]) -> None:
    s, t = lengths
    gap = distance(s, t)
    mask, keep = {
        "below": (Q >= KV, gap >= 0),
        "above": (KV > Q + 2, gap < -2),
        "shifted": (Q - KV >= 9, gap >= 9),
        "behind a cache": (KV <= Q + LAST, distance(s, t, t - s) >= 0),
    }[side]
    form = SoftmaxAttention(QK * 0.4, mask, group=group)
    counted = check(build(form), sample(form, 2, s, t), keep)
    if lengths == (100, 100):
        steps = range(0, 100, 16)
        wanted = {
            "below": sum(min(q + 16, 100) for q in steps),
            "shifted": sum(min(max(q + 7, 1), 100) for q in steps),
        }
        assert counted == 16 * wanted.get(side, counted // 16)
        assert counted < 0.65 * 112 * 100


def evaluate(expr: Expr, env: dict[str, np.ndarray | int]) -> np.ndarray:
    """The meaning of an expression, written against numpy (independent of the emitter)."""
    binary = {
        "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
        "eq": np.equal, "ne": np.not_equal, "or": np.logical_or, "and": np.logical_and,
        "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.true_divide,
        "floordiv": np.floor_divide, "mod": np.mod, "pow": np.float_power,
        "max": np.maximum, "min": np.minimum, "not": np.logical_not, "neg": np.negative,
        "exp": np.exp, "exp2": np.exp2, "log": np.log, "log1p": np.log1p, "sqrt": np.sqrt,
        "tanh": np.tanh, "abs": np.abs, "floor": np.floor, "ceil": np.ceil, "round": np.rint,
        "sign": np.sign, "sin": np.sin, "cos": np.cos, "where": np.where, "clip": np.clip,
        "isneginf": np.isneginf,
        "erf": np.vectorize(math.erf, otypes=[float]),
        "rsqrt": lambda x: 1 / np.sqrt(x),
        "sigmoid": lambda x: 1 / (1 + np.exp(-np.asarray(x, float))),
        "relu": lambda x: np.maximum(x, 0),
        "softplus": lambda x: np.log1p(np.exp(x)),
        "silu": lambda x: x / (1 + np.exp(-np.asarray(x, float))),
        "gelu": lambda x: x * 0.5 * (1 + np.vectorize(math.erf, otypes=[float])(x / 2**0.5)),
        "reciprocal": lambda x: 1 / np.asarray(x, float),
        "cast_f64": np.float64, "cast_f32": np.float32, "cast_f16": np.float16,
        "cast_bf16": lambda x: np.asarray(x, ir.DataType.BFLOAT16.numpy()).astype(float),
        "cast_i64": lambda x: np.asarray(x).astype(np.int64),
        "cast_i32": lambda x: np.asarray(x).astype(np.int64),
        "cast_i8": lambda x: np.asarray(x).astype(np.int64),
        "cast_bool": lambda x: np.asarray(x) != 0,
    }  # fmt: skip
    match expr:
        case Const(value):
            return np.asarray(value)
        case Rank(name):
            return env[name]
        case Extent(rank):
            return np.asarray(env["#" + rank])
        case Read(tensor, index):
            table = env[tensor]
            at = [
                np.clip(evaluate(i, env), 0, n - 1).astype(np.int64)
                for i, n in zip(index, table.shape, strict=True)
            ]
            return table[tuple(at)]
    return binary[expr.op](*(evaluate(a, env) for a in expr.args))


def coordinates(b: int, h: int, s: int, t: int) -> dict[str, np.ndarray | int]:
    axes = {"b": b, "h": h, "q": s, "kv": t}
    shapes = [[-1 if i == j else 1 for j in range(4)] for i in range(4)]
    found = {n: np.arange(x).reshape(sh) for (n, x), sh in zip(axes.items(), shapes, strict=True)}
    return {**found, **{f"#{n}": x for n, x in axes.items()}}


linear_terms = st.builds(
    lambda a, b, c, e: a * Q + b * KV + c + e * (Extent("kv") - Extent("q")),
    st.sampled_from([-2, -1, 0, 1, 1]),
    st.sampled_from([-1, -1, 0, 1]),
    st.integers(-9, 9),
    st.sampled_from([0, 0, 1]),
)
grouped_terms = st.builds(
    lambda r, n, op: call(op, r, n), st.sampled_from([Q, KV]), st.integers(1, 5),
    st.sampled_from(["floordiv", "mod"]),
)  # fmt: skip
atoms = st.one_of(
    st.builds(
        lambda op, a, b: call(op, a, b),
        st.sampled_from(["lt", "le", "gt", "ge", "eq", "ne"]),
        linear_terms,
        st.one_of(st.integers(-4, 4).map(Const), linear_terms, grouped_terms),
    ),
    st.builds(lambda a, n: call("abs", a) <= n, linear_terms, st.integers(0, 6)),
    st.sampled_from([TRUE, FALSE]),
)
masks = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.builds(lambda a, b: a & b, inner, inner),
        st.builds(lambda a, b: a | b, inner, inner),
        st.builds(lambda a: ~a, inner),
        st.builds(lambda c, a, b: where(c, a, b), inner, inner, inner),
    ),
    max_leaves=6,
)


@settings(max_examples=400, deadline=None)
@given(mask=masks, rows=st.integers(1, 5), s=st.integers(1, 11), t=st.integers(1, 13))
def test_key_ranges_hold_every_kept_pair(mask: Expr, rows: int, s: int, t: int) -> None:
    kept = np.broadcast_to(evaluate(mask, coordinates(1, 1, s, t)), (1, 1, s, t))[0, 0]
    ranges = segments(mask, rows)
    extents = {"q": s, "kv": t}
    for q0 in range(s):
        covered = np.zeros(t, bool)
        for r in ranges:
            if isinstance(r, Reach):
                low = 0 if r.low is None else q0 + r.low.at(extents)
                high = t if r.high is None else q0 + rows + r.high.at(extents)
                covered[max(low, 0) : max(high, 0)] = True
                continue
            first = r.start.const + sum(c * extents[n] for n, c in r.start.extents)
            first = (first + q0 if r.relative else first) if r.width is not None else 0
            last = t if r.width is None else first + r.width
            covered[max(first, 0) : max(last, 0)] = True
        lost = kept[q0 : q0 + rows] & ~covered
        assert not lost.any(), f"{mask}: rows from {q0} lose keys {np.argwhere(lost)}"


# ------------------------------------------------------------------------------------ expressions


def run_expression(expr: Expr, reads: dict[str, np.ndarray], sizes: tuple[int, ...]) -> np.ndarray:
    """Emit ``expr`` over a whole [b, h, q, kv] space in single precision and run it."""
    r = Recorder("expr", 20)
    inputs = [
        ir.Value(
            name=n, shape=ir.Shape(a.shape), type=ir.TensorType(ir.DataType.from_numpy(a.dtype))
        )
        for n, a in reads.items()
    ]
    lengths = {n: r.integers([x]) for n, x in zip(("b", "h", "q", "kv"), sizes, strict=True)}
    frame = Frame(
        {n: Coordinate(r.counting(x), True) for n, x in lengths.items()},
        lengths,
        {v.name: (v, TensorDecl(v.name, ())) for v in inputs},
        {},
        ir.DataType.FLOAT,
    )
    typed = Elementwise(r, frame).emit(expr)
    to = {"bool": ir.DataType.BOOL, "int": ir.DataType.INT64, "float": ir.DataType.FLOAT}
    out = r.op("Expand", typed.value, r.integers(list(sizes)))
    out.name, out.dtype = "y", to[typed.kind]
    out.shape = ir.Shape(sizes)
    return session(r, inputs, out).run(None, reads)[0]


def session(r: Recorder, inputs: list[ir.Value], out: ir.Value) -> ort.InferenceSession:
    graph = ir.Graph(inputs, [out], nodes=r.nodes, name="g", opset_imports={"": r.opset})
    proto = ir.to_proto(ir.Model(graph, ir_version=10))
    onnx.checker.check_model(proto, full_check=True)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(proto.SerializeToString(), options)


INTEGER = Q * 3 - KV * 2 - 4  # negative, zero and positive
REAL = (Q - KV) / 4 - 0.5  # exact in float32
POSITIVE = (Q + KV + 1) / 4
DOMAIN = {"log": POSITIVE, "log1p": POSITIVE, "sqrt": POSITIVE, "rsqrt": POSITIVE,
          "reciprocal": POSITIVE, "pow": POSITIVE}  # fmt: skip


NO_KERNEL = {"cast_f8e4m3", "cast_f8e5m2"}


@pytest.mark.parametrize("name", sorted(NO_KERNEL))
def test_8_bit_floats_are_refused(name: str) -> None:
    with pytest.raises(LowerError, match="8-bit floats inside a score have no kernel"):
        run_expression(call(name, REAL), {}, (1, 1, 5, 7))


@pytest.mark.parametrize("name", sorted(OPERATORS.keys() - NO_KERNEL))
def test_every_operator_means_in_onnx_what_it_means_in_numpy(name: str) -> None:
    operator = OPERATORS[name]
    first = DOMAIN.get(name, REAL)
    cases = {
        1: [(first,), (INTEGER,)] if name not in DOMAIN else [(first,)],
        2: [(first, REAL + 0.375), (INTEGER, Q + 1)] if name != "pow" else [(first, REAL)],
        3: [(REAL, Const(-0.5), Const(0.25)), (INTEGER, Const(-2), Const(3))],
    }[operator.arity]
    if name in ("and", "or", "not"):
        cases = [(Q > KV, Q + KV > 2)[: operator.arity]]
    if name == "where":
        cases = [(Q > KV, REAL, INTEGER), (Q > KV, Q > 1, KV > 1), (INTEGER, Q, KV)]
    if name == "isneginf":
        cases = [(where(Q > KV, Const(-math.inf), REAL),), (Const(math.inf) + REAL,)]
    for args in cases:
        expr = call(name, *args)
        got = run_expression(expr, {}, (1, 1, 5, 7))
        expected = np.broadcast_to(evaluate(expr, coordinates(1, 1, 5, 7)), got.shape)
        top = np.max(np.abs(expected), where=np.isfinite(expected), initial=1.0)
        np.testing.assert_allclose(
            got, expected, rtol=4 * EPS, atol=4 * EPS * top, err_msg=str(expr)
        )
        assert (got.dtype == bool) == (expected.dtype == bool), str(expr)


B_ = Rank("b")


@pytest.mark.parametrize(
    ("expr", "shape"),
    [
        (Read("T", (B_, KV)), (2, 7)),
        (Read("T", (KV, B_)), (7, 2)),
        (Read("T", (B_, Const(0), Q, KV)), (2, 1, 5, 7)),
        (Read("T", (Q, H)), (5, 3)),
        (Read("T", (H, Q - KV + 6)), (3, 11)),  # a relative-position table
        (Read("T", (H, call("clip", Q - KV, -3, 3) + 3)), (3, 7)),
        (Read("T", (call("floordiv", H, 2), KV)), (2, 7)),
        (Read("T", (Q + 1,)), (6,)),
        (Read("T", (Q + 1,)), (5,)),  # one past the end reads the last element
        (Read("T", (Const(1),)), (4,)),
        (Read("T", (Q, Q)), (5, 5)),
        (Read("T", ()), ()),
        (Read("T", (B_, H, Q, KV)), (2, 3, 5, 7)),
        (Read("T", (KV, Q, H, B_)), (7, 5, 3, 2)),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.bool_])
def test_reads_gather_what_numpy_indexing_gives(
    expr: Expr, shape: tuple[int, ...], dtype: type
) -> None:
    sizes = (2, 3, 5, 7)
    table = np.asarray(np.random.default_rng(0).normal(size=shape) * 3).astype(dtype)
    got = run_expression(expr, {"T": table}, sizes)
    expected = np.broadcast_to(evaluate(expr, {**coordinates(*sizes), "T": table}), sizes)
    np.testing.assert_array_equal(got, expected)


def test_an_unknown_rank_is_refused_by_name() -> None:
    with pytest.raises(LowerError, match="'w'"):
        run_expression(Rank("w") + 1, {}, (1, 1, 2, 2))
    with pytest.raises(LowerError, match="#w"):
        run_expression(Extent("w") + 1, {}, (1, 1, 2, 2))


# ------------------------------------------------------------------------------------ attention


@dataclasses.dataclass
class Built:
    """An attention as an ONNX session that also counts the scores it computed."""

    session: ort.InferenceSession
    form: SoftmaxAttention

    def run(self, arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, int]:
        out, shapes = self.session.run(None, arrays)
        return out, int(shapes.prod(axis=1).sum()) // (len(out) * HQ)


def build(
    form: SoftmaxAttention,
    *,
    rows: int = 16,
    opset: int = 20,
    dtype: ir.DataType = ir.DataType.FLOAT,
    reads: dict[str, tuple[ir.DataType, list[str | int]]] | None = None,
) -> Built:
    r = Recorder("site", opset)

    def value(name: str, kind: ir.DataType, shape: list[str | int]) -> ir.Value:
        return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(kind))

    hkv = HQ // form.group
    inputs = [
        value("q", dtype, ["batch", HQ, "s", D]),
        value("k", dtype, ["batch", hkv, "t", D]),
        value("v", dtype, ["batch", hkv, "t", F]),
        *(value(n, kind, shape) for n, (kind, shape) in (reads or {}).items()),
    ]
    out = emit_attention(r, inputs, form, plan_tiles(form, rows))
    out.name, out.dtype, out.shape = "y", dtype, ir.Shape(["batch", HQ, "s", F])
    counted = count_scores(r)
    graph = ir.Graph(inputs, [out, counted], nodes=r.nodes, name="g", opset_imports={"": opset})
    proto = ir.to_proto(ir.Model(graph, ir_version=10))
    onnx.checker.check_model(proto, full_check=True)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return Built(ort.InferenceSession(proto.SerializeToString(), options), form)


def count_scores(r: Recorder) -> ir.Value:
    """Add an output to the Scan: the shape of the product Q K^T of every step."""
    (scan,) = [n for n in r.nodes if n.op_type == "Scan"]
    body = scan.attributes["body"].value
    product = next(n for n in body if n.op_type == "MatMul")
    shape = ir.node("Shape", [product.outputs[0]], name="count/shape")
    shape.outputs[0].name, shape.outputs[0].dtype = "count/out", ir.DataType.INT64
    body.append(shape)
    body.outputs.append(shape.outputs[0])
    old = scan.outputs[0]
    new = ir.node(
        "Scan",
        list(scan.inputs),
        {"body": body, "num_scan_inputs": 1, "scan_output_axes": [2, 0]},
        num_outputs=2,
        name="counted",
    )
    new.outputs[0].name, new.outputs[1].name = "counted/0", "counted/1"
    new.outputs[1].dtype, new.outputs[1].shape = ir.DataType.INT64, ir.Shape(["steps", 4])
    ir.convenience.replace_all_uses_with(old, new.outputs[0])
    r.nodes[r.nodes.index(scan)] = new
    return new.outputs[1]


def sample(form: SoftmaxAttention, b: int, s: int, t: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng, hkv = np.random.default_rng(seed), HQ // form.group
    shapes = {"q": (b, HQ, s, D), "k": (b, hkv, t, D), "v": (b, hkv, t, F)}
    return {n: rng.normal(size=x).astype(np.float32) for n, x in shapes.items()}


def dense(
    form: SoftmaxAttention, arrays: dict[str, np.ndarray], keep: np.ndarray, kind: type
) -> np.ndarray:
    """Dense attention in ``kind`` over an explicit mask; rows that keep nothing give 0."""
    q, k, v = (arrays[n].astype(kind) for n in "qkv")
    k, v = np.repeat(k, form.group, 1), np.repeat(v, form.group, 1)
    # Coordinates in ``kind`` too, or numpy widens float32 arithmetic with integers to float64.
    places = coordinates(*q.shape[:3], k.shape[2])
    env = {n: np.asarray(x).astype(kind) for n, x in places.items()}
    env |= {
        n: a if a.dtype == bool else a.astype(kind) for n, a in arrays.items() if n not in "qkv"
    }
    product = q @ k.swapaxes(-1, -2)
    score = evaluate_score(form.score, product, env)
    score = np.where(keep, score, -np.inf)
    columns = [score]
    if form.sink is not None:
        sink = evaluate(form.sink, env)
        columns.append(np.broadcast_to(sink, (*score.shape[:3], 1)).astype(kind))
    every = np.concatenate(columns, -1)
    top = every.max(-1, keepdims=True)
    top = np.where(np.isfinite(top), top, 0)
    total = np.exp(every - top).sum(-1, keepdims=True)
    probabilities = np.exp(score - top) / np.where(total == 0, 1, total)
    if form.weight is not None:
        probabilities = probabilities * evaluate(form.weight, env)
    return (probabilities @ v).astype(kind)


def evaluate_score(score: Expr, product: np.ndarray, env: dict) -> np.ndarray:
    point = Read("product", (Rank("b"), H, Q, KV))
    return evaluate(substitute(score, {QK: point}), {**env, "product": product})


def check(built: Built, arrays: dict[str, np.ndarray], keep: np.ndarray) -> int:
    """Compare with float64; returns the number of scores computed per head."""
    got, counted = built.run(arrays)
    reference = dense(built.form, arrays, keep, np.float64)
    own = dense(built.form, arrays, keep, np.float32)
    assert got.shape == reference.shape
    bound = max(2 * np.abs(own - reference).max(), 4 * EPS * np.abs(reference).max())
    assert np.abs(got - reference).max() <= bound
    return counted


def distance(s: int, t: int, offset: int = 0) -> np.ndarray:
    return np.arange(s)[:, None] + offset - np.arange(t)[None, :]


WINDOWS = {
    "causal": (causal_window(40), lambda d: (d >= 0) & (d < 40)),
    "symmetric": (symmetric_window(30), lambda d: (d <= 15) & (d >= -14)),
    "asymmetric": ((Q - KV < 5) & (KV - Q < 9), lambda d: (d < 5) & (d > -9)),
    "one": (eq(Q, KV), lambda d: d == 0),
}


@pytest.mark.parametrize("opset", [18, 20, 23])
@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("window", WINDOWS)
def test_windows_at_every_length_and_batch(window: str, sinks: int, opset: int) -> None:
    mask, kept = WINDOWS[window]
    causal = window == "causal"
    guard = mask | (KV < sinks) if sinks else mask
    guard = (Q >= KV) & guard if causal else guard
    form = SoftmaxAttention(QK * 0.35, guard, group=2)
    built = build(form, opset=opset, rows=32)
    lengths = (1, 7, 128, 333, 1024) if opset == 20 else (7, 333)
    for s, b in zip(lengths, itertools.cycle((1, 3, 2))):
        d = distance(s, s)
        keep = kept(d) | (np.arange(s)[None, :] < sinks)
        keep = keep & (d >= 0) if causal else keep
        counted = check(built, sample(form, b, s, s), keep)
        plan = plan_tiles(form, 32)
        assert plan.width is not None
        steps = math.ceil(s / min(s, 32))
        assert counted <= steps * min(32, s) * min(plan.width, len(plan.segments) * s)
        if s == 1024:
            assert counted < 0.15 * s * s


@pytest.mark.parametrize(("s", "t"), [(1, 1), (1, 300), (5, 300), (300, 5), (64, 65), (65, 64)])
@pytest.mark.parametrize("group", [1, 4])
def test_queries_that_follow_a_cache(s: int, t: int, group: int) -> None:
    form = SoftmaxAttention(QK * 0.35, causal_window(20, LAST), group=group)
    d = distance(s, t, t - s)
    check(build(form), sample(form, 2, s, t), (d >= 0) & (d < 20))


def test_top_left_offset_with_other_key_length_and_empty_rows() -> None:
    form = SoftmaxAttention(QK * 0.35, causal_window(20))
    s, t = 90, 30  # queries beyond 49 see no key
    arrays = sample(form, 2, s, t)
    d = distance(s, t)
    keep = (d >= 0) & (d < 20)
    built = build(form)
    check(built, arrays, keep)
    out, _ = built.run(arrays)
    assert not keep[49:].any()
    np.testing.assert_array_equal(out[:, :, 49:], 0)


def test_padding_read_leaves_empty_rows_zero() -> None:
    pad = Read("M0", (Rank("b"), KV))
    reads = (TensorDecl("M0", ("b", "kv"), dtype="bool"),)
    form = SoftmaxAttention(QK * 0.35, causal_window(20) & pad, reads=reads)
    built = build(form, reads={"M0": (ir.DataType.BOOL, ["batch", "t"])})
    arrays = sample(form, 3, 70, 70)
    arrays["M0"] = np.random.default_rng(1).random((3, 70)) < 0.7
    arrays["M0"][0, :30] = False  # left padding
    arrays["M0"][2] = False  # nothing kept at all
    d = distance(70, 70)
    keep = (d >= 0) & (d < 20) & arrays["M0"][:, None, None, :]
    check(built, arrays, keep)
    np.testing.assert_array_equal(built.run(arrays)[0][2], 0)


SLOPE = Read("slope", (H,))
BIAS = Read("bias", (H, call("clip", Q - KV, -8, 8) + 8))
SCORES = {
    "softcap": call("tanh", QK * 0.35 / 5.0) * 5.0,
    "alibi": QK * 0.35 - SLOPE * (Q - KV),
    "relative": QK * 0.35 + BIAS,
    "log of distance": QK * 0.35 - call("log", Q - KV + 1),  # NaN where masked
    "mask in score": QK * 0.35 + where(KV > 3, 0.0, -math.inf),  # rows 0 to 3 keep nothing
    "no product": SLOPE * (Q - KV),
    "constant": Const(1.0),
}


@pytest.mark.parametrize("name", SCORES)
def test_score_expressions_inside_the_tile(name: str) -> None:
    tables = {
        "slope": (TensorDecl("slope", ("h",)), np.linspace(0.1, 0.9, HQ, dtype=np.float32)),
        "bias": (
            TensorDecl("bias", ("h", "w")),
            np.random.default_rng(3).normal(size=(HQ, 17)).astype(np.float32),
        ),
    }
    form = SoftmaxAttention(
        SCORES[name], causal_window(20), group=2, reads=tuple(d for d, _ in tables.values())
    )
    reads = {n: (ir.DataType.FLOAT, list(a.shape)) for n, (_, a) in tables.items()}
    built = build(form, reads=reads)
    arrays = sample(form, 2, 77, 77) | {n: a for n, (_, a) in tables.items()}
    d = distance(77, 77)
    keep = (d >= 0) & (d < 20)
    with np.errstate(invalid="ignore", divide="ignore"):
        check(built, arrays, keep)


def test_sink_logit_and_weight() -> None:
    reads = (TensorDecl("sink", ("h",)), TensorDecl("factor", ("b", "kv")))
    form = SoftmaxAttention(
        QK * 0.35,
        causal_window(20),
        weight=Read("factor", (Rank("b"), KV)),
        sink=Read("sink", (H,)),
        group=2,
        reads=reads,
    )
    built = build(
        form,
        reads={"sink": (ir.DataType.FLOAT, [HQ]), "factor": (ir.DataType.FLOAT, ["batch", "t"])},
    )
    arrays = sample(form, 2, 50, 20)
    arrays["sink"] = np.array([-3.0, 0.0, 1.0, 4.0], np.float32)
    arrays["factor"] = np.random.default_rng(5).random((2, 20)).astype(np.float32)
    d = distance(50, 20)
    check(built, arrays, (d >= 0) & (d < 20))


@pytest.mark.parametrize(
    ("guard", "kept"),
    [
        (TRUE, lambda d, s: d == d),
        (eq(call("mod", Q - KV, 8), 0), lambda d, s: d % 8 == 0),
        (causal_window(9) | (Q < 3),
         lambda d, s: ((d >= 0) & (d < 9)) | (np.arange(s) < 3)[:, None]),
    ],
)  # fmt: skip
def test_masks_without_a_band_are_right_and_counted_as_dense(guard: Expr, kept) -> None:
    form = SoftmaxAttention(QK * 0.35, guard, group=2)
    assert plan_tiles(form, 16).dense
    built = build(form)
    for s in (1, 40, 64):
        keep = np.broadcast_to(kept(distance(s, s), s), (s, s))
        counted = check(built, sample(form, 2, s, s), keep)
        assert counted >= s * s


def test_a_mask_that_keeps_nothing_gives_zeros() -> None:
    form = SoftmaxAttention(QK, FALSE)
    r = Recorder("site", 20)
    inputs = [
        ir.Value(name=n, shape=ir.Shape(["b", HQ, "s", w]), type=ir.TensorType(ir.DataType.FLOAT))
        for n, w in (("q", D), ("k", D), ("v", F))
    ]
    out = emit_attention(r, inputs, form, plan_tiles(form))
    out.name, out.dtype, out.shape = "y", ir.DataType.FLOAT, ir.Shape(["b", HQ, "s", F])
    got = session(r, inputs, out).run(None, sample(form, 2, 3, 3))[0]
    np.testing.assert_array_equal(got, np.zeros((2, HQ, 3, F), np.float32))


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_precisions(dtype: type) -> None:
    form = SoftmaxAttention(QK * 0.35, causal_window(20), group=2)
    built = build(form, dtype=ir.DataType.from_numpy(np.dtype(dtype)))
    arrays = {n: a.astype(dtype) for n, a in sample(form, 2, 50, 50).items()}
    out, _ = built.run(arrays)
    d = distance(50, 50)
    reference = dense(form, arrays, (d >= 0) & (d < 20), np.float64)
    assert out.dtype == dtype
    assert np.abs(out - reference).max() <= 4 * np.finfo(dtype).eps * np.abs(reference).max()


def test_a_single_query_costs_a_single_row() -> None:
    form = SoftmaxAttention(QK * 0.35, causal_window(20, LAST))
    built = build(form, rows=128)
    _, counted = built.run(sample(form, 1, 1, 4096))
    assert counted == 20 + 127


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(mask=masks, s=st.integers(1, 40), t=st.integers(1, 40), rows=st.sampled_from([1, 3, 16]))
def test_any_mask_of_positions(mask: Expr, s: int, t: int, rows: int) -> None:
    form = SoftmaxAttention(QK * 0.35, mask, group=2)
    if mask == FALSE or not plan_tiles(form, rows).segments:
        return  # covered by test_a_mask_that_keeps_nothing_gives_zeros
    keep = np.broadcast_to(evaluate(mask, coordinates(1, 1, s, t)), (1, 1, s, t))
    check(build(form, rows=rows), sample(form, 2, s, t), keep)
