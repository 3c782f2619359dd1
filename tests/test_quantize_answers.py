"""Known answers of quantised attention that `test_quantize` does not hold, by their numbers in the
specification (section 10)."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from attn_rewrite.cascade.attention import QK, SoftmaxAttention, softmax_cascade
from attn_rewrite.cascade.expr import Const, Rank, Read
from attn_rewrite.cascade.ir import TensorDecl
from attn_rewrite.cascade.oracle import Frame, evaluate, interpret
from attn_rewrite.passes.quantize.quantisers import Granularity, Log2
from attn_rewrite.policy_text import parse_pipeline
from tests.sites import make_site
from tests.test_quantize import X, numpy_data, random_inputs, run_on, scheme, value


@pytest.mark.parametrize("hkv", [4, 2])
def test_2_the_log_sum_exp_without_the_mean_of_the_keys(hkv):
    """LSE = that of the codes + scale * q . mean(K), the mean that of the query's key head."""
    site = make_site(hkv=hkv, q_len=9, kv_len=12, scale=0.5)
    inputs = random_inputs(site)
    g = torch.Generator().manual_seed(0)
    # Whole numbers up to 127 whose mean over the keys is 0, and a mean: 8 bits hold them as they
    # are.
    half = torch.randint(-127, 128, (1, hkv, 6, 8), generator=g).double()
    half[:, :, 0, 0], inputs["Q"] = 127.0, torch.randint(-9, 10, (1, 4, 9, 8), generator=g).double()
    inputs["Q"][..., 0, 0] = 127.0
    mean = torch.randint(-50, 50, (1, hkv, 1, 8), generator=g).double()
    inputs["Q"] = inputs["Q"] / 127
    inputs["K"] = torch.cat([half, -half], 2) / 127 + mean
    found = interpret(scheme("int8", site), inputs, also=("GM", "SD", "KM"))
    assert torch.allclose(found["KM"], mean[:, :, 0], atol=1e-12)
    lse = found["GM"] + found["SD"].log()
    group = 4 // hkv
    keys, means = (t.repeat_interleave(group, 1) for t in (inputs["K"], found["KM"]))
    wanted = (0.5 * inputs["Q"] @ keys.mT).logsumexp(-1)
    shift = 0.5 * (inputs["Q"] * means[:, :, None]).sum(-1)
    assert torch.allclose(lse + shift, wanted, rtol=0, atol=1e-9)
    assert not torch.allclose(lse, wanted, atol=1.0)


def test_3_groups_of_threads_on_hopper():
    """Tiles of 64 queries by 128 keys, 16 queries a warp: 512 and 32 scales for 1024 tokens."""

    def groups(granularity, token):
        index = granularity.index(Rank("h"), Rank(token), Rank("d"))[-1]
        return evaluate(index, Frame((token,), {token: torch.arange(1024)}, {token: 1024}, {}))

    queries = groups(Granularity("thread", 16), "q")
    keys = groups(Granularity("thread", 128), "kv")
    assert (len(queries.unique()), len(keys.unique())) == (512, 32)
    assert [n for n in range(32) if queries[n] == 0] == [0, 8]
    assert [n for n in range(128) if keys[n] == 1][:4] == [2, 3, 10, 11]


def test_4_where_the_row_maximum_goes_changes_no_sum():
    assert pytest.approx(447.890, abs=5e-4) == 2**8.807
    assert math.log2(2688) == pytest.approx(11.39232, abs=5e-6)
    site = make_site(q_len=9, kv_len=40)
    inputs = random_inputs(site)
    both = [
        interpret(scheme(f"fp8(p_range={r})", site), inputs, also=("GM", "SD"))
        for r in (256.0, 448.0)
    ]
    assert all(torch.equal(both[0][n], both[1][n]) for n in ("GM", "SD"))
    assert torch.allclose(both[0]["AV"], both[1]["AV"], atol=0.1)
    assert not torch.equal(both[0]["AV"], both[1]["AV"])


def test_12_other_logarithmic_codes():
    one = Const(1.0)
    x = [1, 0.5, 0.3, 0.01, 1e-6, 0]
    assert value(Log2(4, flush=True).value(X, one), x) == [1, 0.5, 0.25, 0.0078125, 0, 0]
    found = value(Log2(4, steps=2, flush=True).value(X, one), x)
    assert found == pytest.approx([1, 0.5, 0.353553, 0.0110485, 0, 0], abs=1e-6)
    ratios = [1 / r for r in (23, 24, 46, 47, 1, 2, 3, 4, 1.49, 1.5)]
    linear = value(Log2(4, linear=True).code(X, one), ratios)
    assert linear == [4, 5, 5, 5, 0, 1, 2, 2, 0, 1]
    assert value(Log2(4).code(X, one), ratios)[:4] == [5, 5, 6, 6]
    with pytest.raises(ValueError, match="1 step a halving"):
        Log2(4, steps=2, linear=True)


def test_12_steps_of_a_policy():
    site = make_site(q_len=5, kv_len=7)
    found = interpret(scheme("dgq(bits=6, steps=2)", site), random_inputs(site), also=("A", "PI"))
    peak = found["A"].amax()
    codes = torch.round(-2 * torch.log2(found["A"] / peak)).clamp(0, 63)
    assert torch.allclose(found["PI"], peak * 2.0 ** (-codes / 2), rtol=1e-12)


def test_13_a_row_with_a_start_token():
    """[.9 | .06, .03, .01]: the start token stays, the others are powers of two of .06."""
    p = torch.tensor([0.9, 0.06, 0.03, 0.01], dtype=torch.float64)
    site = make_site(
        cascade=softmax_cascade(SoftmaxAttention(score=QK)), kind="cross", hq=1, hkv=1, q_len=1,
        kv_len=4, d_qk=1, d_v=1,
    )  # fmt: skip
    inputs = {
        "Q": torch.ones(1, 1, 1, 1).double(), "K": p.log().view(1, 1, 4, 1),
        "V": torch.ones(1, 1, 4, 1).double(),
    }  # fmt: skip
    found = interpret(scheme("dgq(bits=6)", site), inputs, also=("PI", "PS"))
    assert float(found["PS"]) == pytest.approx(0.06)
    assert found["PI"].flatten().tolist() == pytest.approx([0.9, 0.06, 0.03, 0.0075])


@pytest.mark.parametrize("text", ["int8", "int8(pv=true)", "fp8", "int4", "dgq(start=0)"])
def test_19_an_additive_mask_of_minus_one(text):
    """Logits [0, 0] with [0, -1] added: [.7311, .2689] up to the codes of P, never [.667, .333]."""
    form = SoftmaxAttention(
        score=QK + Read("BIAS", (Rank("kv"),)), reads=(TensorDecl("BIAS", ("kv",)),)
    )
    site = make_site(cascade=softmax_cascade(form), hq=1, hkv=1, q_len=1, kv_len=2, d_qk=1, d_v=2)
    inputs = {
        "Q": torch.zeros(1, 1, 1, 1), "K": torch.ones(1, 1, 2, 1), "V": torch.eye(2)[None, None],
        "BIAS": torch.tensor([0.0, -1.0]),
    }  # fmt: skip
    found = interpret(scheme(text, site), inputs)["AV"].flatten().tolist()
    if text.startswith("dgq"):
        assert found == pytest.approx([0.7311, 0.7311 / 2], abs=1e-4)  # e^-1 is nearest to one half
    else:
        # Half a step of the codes of P: of 127 below the row maximum, or of four bits.
        steps = {"int8": 1e-4, "int4": 1e-4, "int8(pv=true)": 0.7311 / 254, "fp8": 0.2689 / 16}
        assert found == pytest.approx([0.7311, 0.2689], abs=steps[text])


def test_20_dynamic_quantisation_of_onnx_runtime():
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    node = onnx.helper.make_node("DynamicQuantizeLinear", ["x"], ["y", "scale", "zero"])
    of = onnx.helper.make_tensor_value_info
    kind = onnx.TensorProto
    graph = onnx.helper.make_graph(
        [node], "g", [of("x", kind.FLOAT, [6])],
        [of("y", kind.UINT8, [6]), of("scale", kind.FLOAT, []), of("zero", kind.UINT8, [])],
    )  # fmt: skip
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)])
    model.ir_version = 8
    session = runtime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    x = np.array([0, 2, -3, -2.5, 1.34, 0.5], np.float32)
    codes, scale, zero = session.run(None, {"x": x})
    assert codes.tolist() == [153, 255, 0, 26, 221, 179]
    assert float(scale) == pytest.approx(0.0196078, abs=1e-7)
    assert int(zero) == 153


LONG, WIDTH = 2048, 64


def qdq_attention(x, axis=None, zero=True):
    """Attention with QuantizeLinear and DequantizeLinear around both products, as a model, and its
    inputs.  ``axis``: one scale a key (axis 3 of the transposed keys); ``zero``: zero points."""
    onnx = pytest.importorskip("onnx")
    nodes, given = [], {}

    def constant(name, value):
        given[name] = onnx.numpy_helper.from_array(np.asarray(value), name)
        return name

    def coded(name, scale, **along):
        scale = constant(f"{name}_scale", np.float32(scale))
        points = [constant(f"{name}_zero", np.zeros_like(scale_of(name), np.int8))] if zero else []
        kind = {} if zero else {"output_dtype": onnx.TensorProto.INT8}
        make = onnx.helper.make_node
        nodes.append(make("QuantizeLinear", [name, scale, *points], [f"{name}_q"], **along, **kind))
        nodes.append(
            make("DequantizeLinear", [f"{name}_q", scale, *points], [f"{name}_dq"], **along)
        )
        return f"{name}_dq"

    def scale_of(name):
        return onnx.numpy_helper.to_array(given[f"{name}_scale"])

    def add(kind, inputs, output, **attributes):
        nodes.append(onnx.helper.make_node(kind, inputs, [output], **attributes))
        return output

    q, k, v = (t.numpy() for t in x)
    largest = np.abs(k).max() if axis is None else np.abs(k).max((0, 1, 3))
    along = {} if axis is None else {"axis": axis}
    add("Transpose", ["k"], "t", perm=[0, 1, 3, 2])
    add("Mul", ["q", constant("root", np.float32(WIDTH**-0.5))], "scaled")
    left = coded("scaled", np.abs(q).max() * WIDTH**-0.5 / 127)
    add("MatMul", [left, coded("t", largest / 127, **along)], "s")
    add("Softmax", ["s"], "p", axis=-1)
    add("MatMul", [coded("p", 1 / 127), coded("v", np.abs(v).max() / 127)], "o")
    of, kind = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        nodes, "attention", [of(n, kind, list(t.shape)) for n, t in zip("qkv", x, strict=True)],
        [of("o", kind, list(x[0].shape))], initializer=list(given.values()),
    )  # fmt: skip
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)])
    model.ir_version = 10
    return model.SerializeToString(), dict(zip("qkv", (q, k, v), strict=True))


def run_qdq(model, inputs, tmp_path, **entries):
    """What a session gives, and how often it fused a product to integers."""
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    for name, entry in entries.items():
        options.add_session_config_entry(f"session.{name}", entry)
    session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    kinds = [n.op_type for n in onnx.load(tmp_path / "fused.onnx").graph.node]
    return session.run(None, inputs)[0], kinds.count("MatMulIntegerToFloat")


def similarity(found, x):
    q, k, v = (t.double() for t in x)
    wanted = ((q @ k.mT * WIDTH**-0.5).softmax(-1) @ v).flatten()
    return float(
        torch.nn.functional.cosine_similarity(torch.tensor(found).double().flatten(), wanted, 0)
    )


def operands(length):
    make = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, length, WIDTH, generator=make) for _ in "qkv"]


def test_20_a_static_scale_of_probabilities_is_a_disaster(tmp_path):
    """Both products fuse to integers, and divided probabilities round away as rows grow."""
    found = []
    for length in (64, LONG):
        x = operands(length)
        out, fused = run_qdq(*qdq_attention(x), tmp_path)
        assert fused == 2
        found.append(similarity(out, x))
    assert found[0] > 0.9
    assert found[1] < 0.6


def test_20_a_zero_point_for_each_key_fails_in_the_fused_product(tmp_path):
    """It holds without the zero points, and where the fusion is off."""
    runtime = pytest.importorskip("onnxruntime")
    x = operands(64)
    failing = qdq_attention(x, axis=3)
    with pytest.raises(runtime.capi.onnxruntime_pybind11_state.Fail, match="zero point"):
        run_qdq(*failing, tmp_path)
    whole, fused = run_qdq(*failing, tmp_path, disable_quant_qdq="1")
    assert fused == 0
    without, _ = run_qdq(*qdq_attention(x, axis=3, zero=False), tmp_path)
    assert np.abs(whole - without).max() < 1e-5
    assert similarity(whole, x) > 0.9


def decibels(text, q, k, v):
    site = make_site(
        hq=1, hkv=1, q_len=len(q), kv_len=len(k), d_qk=q.shape[1], d_v=v.shape[1],
        scale=q.shape[1] ** -0.5,
    )  # fmt: skip
    site = replace(site, cascade=softmax_cascade(SoftmaxAttention(score=QK * q.shape[1] ** -0.5)))
    inputs = {"Q": q[None, None], "K": k[None, None], "V": v[None, None]}
    (transform,) = parse_pipeline(text)
    wanted = interpret(site.cascade, inputs)["AV"]
    error = interpret(transform.apply(site.cascade, site), inputs)["AV"] - wanted
    return 10 * float(torch.log10(wanted.square().sum() / error.square().sum()))


@pytest.mark.parametrize("width", [64, 128])
def test_23_noise_of_8_bit_floats(width):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1024, width, generator=g).double() for _ in range(3))
    assert decibels("fp8", q[:256], k, v) > 25
    assert run_on("int8", q[:256], k, v)[0] > 99.98
    assert run_on("int8(pv=true)", q[:256], k, v)[0] > 99.9


def test_27_rotation_does_not_mend_channel_bias():
    q, k, v = numpy_data()
    rng = np.random.default_rng(1)
    k = k + 4 * torch.from_numpy(rng.standard_normal(64))
    q = (q + 2 * torch.from_numpy(rng.standard_normal(64)))[:256]
    smooth = "smooth_k={0}, smooth_q={0}"
    found = {
        (s, r): run_on(f"int4(granularity='block', {smooth.format(s)}, rotate={r})", q, k, v)[1]
        for s in ("true", "false")
        for r in ("true", "false")
    }
    assert found["false", "true"] > 0.8 * found["false", "false"]
    assert found["true", "false"] < 0.5 * found["false", "false"]
    assert found["true", "true"] < 1.1 * found["true", "false"]
