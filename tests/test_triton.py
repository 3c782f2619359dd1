"""The Triton backend without running a kernel: source, bounds, lists, compilation, export."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import attn_rewrite as ar
from attn_rewrite.backends.triton import autotune
from attn_rewrite.backends.triton.aot import (
    LIMITS,
    Limits,
    compile_source,
    fits,
    occupancy_bound,
    parse_target,
)
from attn_rewrite.backends.triton.base2 import to_base_2
from attn_rewrite.backends.triton.bounds import loop_ranges
from attn_rewrite.backends.triton.bundle import smaller
from attn_rewrite.backends.triton.choose import choose_schedule
from attn_rewrite.backends.triton.derivative import derivative
from attn_rewrite.backends.triton.emit import emit
from attn_rewrite.backends.triton.gradient import backward_of
from attn_rewrite.backends.triton.lists import blockwise_tables, make_lists
from attn_rewrite.backends.triton.lower import lower
from attn_rewrite.backends.triton.prepare import program_of, with_lse
from attn_rewrite.backends.triton.program import Pass, read_program
from attn_rewrite.backends.triton.schedule import Device, Schedule, from_text, padded_side, to_text
from attn_rewrite.backends.triton.staging import fused, stages_of
from attn_rewrite.cascade import NAMED, interpret
from attn_rewrite.cascade.attention import QK, softmax_cascade
from attn_rewrite.cascade.expr import KV, B, Extent, H, Q, Rank, Read, call, eq, walk
from attn_rewrite.cascade.text import parse_expr
from attn_rewrite.errors import LowerError, PolicyError
from attn_rewrite.site import Refusal
from tests.interpreted.dense import CASES


def cascade_of(name: str, group: int = 1):
    return softmax_cascade(CASES[name].form(group), name.replace(" ", "-"))


def source_of(cascade, lanes=None, schedule=None, device=None):
    (stage,) = stages_of(cascade)
    lanes = lanes or dict.fromkeys(stage.program.roles.lanes, 64)
    chosen = schedule or choose_schedule(stage.program, lanes, 2, device or Device())
    return emit(stage.program, chosen, lanes)


# Golden sources


@pytest.mark.parametrize(
    "name",
    [
        "dense",
        "causal",
        "sinks",
        "soft cap",
        "factor",
        "sink logit",
        "per head",
        "lengths",
        "dilated",
    ],
)
def test_golden_sources(name, golden):
    golden(f"triton/{name.replace(' ', '-')}.py.txt", source_of(with_lse(cascade_of(name))).text)


def test_golden_source_with_packed_heads(golden):
    cascade = with_lse(cascade_of("cached", 4))
    (stage,) = stages_of(cascade)
    schedule = choose_schedule(stage.program, {"d": 80, "f": 80}, 2, Device(), {"q": 1})
    assert schedule.pack == 4
    golden("triton/cached-packed-80.py.txt", emit(stage.program, schedule, {"d": 80, "f": 80}).text)


@pytest.mark.parametrize("name", ["clipped-softmax", "attention-weights", "quantised-qkv"])
def test_golden_sources_of_other_cascades(name, golden):
    golden(f"triton/{name}.py.txt", source_of(NAMED[name]).text)


@pytest.mark.parametrize("part", ["queries", "keys"])
def test_golden_sources_of_the_backward(part, golden):
    found = backward_of(CASES["causal"].form(2))
    row, along = ("q", "kv") if part == "queries" else ("kv", "q")
    program = program_of(getattr(found, part), row, along)
    schedule = choose_schedule(program, {"d": 64, "f": 64}, 2, Device())
    golden(
        f"triton/causal-backward-{part}.py.txt", emit(program, schedule, {"d": 64, "f": 64}).text
    )


def test_the_same_cascade_and_schedule_give_the_same_text():
    first, second = source_of(cascade_of("window")), source_of(cascade_of("window"))
    assert first.text == second.text
    assert first.key == second.key


def test_full_tiles_hold_no_mask_arithmetic():
    text = source_of(cascade_of("window")).text
    inside = [n for n, line in enumerate(text.splitlines()) if "keep" in line]
    lines = text.splitlines()
    assert inside
    for n in inside:
        assert "if part != 1:" in lines[n] or "if part != 1:" in lines[n - 1]


# Programs


def test_one_pass_for_softmax_two_for_clipped():
    for name, count in (("attention-3pass", 1), ("clipped-softmax", 2), ("attention-weights", 2)):
        program = read_program(fused(NAMED[name], "kv"))
        assert not isinstance(program, Refusal)
        assert len(program.passes()) == count


def test_a_statistic_over_rows_takes_a_kernel_of_its_own():
    first, second = stages_of(NAMED["softmax-over-queries"])
    assert (first.program.roles.row, first.program.roles.along) == ("m", "p")
    assert (second.program.roles.row, second.program.roles.along) == ("p", "m")
    assert set(first.program.cascade.outputs) <= {t.name for t in second.program.cascade.inputs}


def test_base_two_keeps_no_exponential_and_folds_the_scale():
    program = to_base_2(read_program(fused(cascade_of("dense"), "kv")))
    ops = {n.op for s in program.steps() for n in walk(s.expr) if hasattr(n, "op")}
    assert "exp" not in ops
    (score,) = (s for s in program.steps() if s.name == "S")
    assert score.expr.args[1].value == pytest.approx(0.25 * math.log2(math.e), rel=1e-15)


def test_refusals_say_what_and_why():
    found = read_program(NAMED["sparsemax"])
    assert isinstance(found, Refusal)
    assert "step by step" in found.reason
    assert isinstance(lower(NAMED["talking-heads"]), Refusal)


# Bounds of loops

BOUNDED = [
    "q - kv >= 0", "(q - kv >= 0) & (q - kv < 20)", "kv <= q + #kv - #q", "abs(q - kv) <= 9",
    "(q - kv >= 0) & ((q - kv < 18) | (kv < 5))", "q // 24 == kv // 24", "not(kv > q)",
    "(kv >= clip(q - 5, 0, #kv - 11)) & (kv < clip(q - 5, 0, #kv - 11) + 11)",
    "kv // 8 <= q // 8", "2 * q - kv >= 3", "kv >= 10 - q", "(kv <= q) & ((q + kv) % 2 == 0)",
]  # fmt: skip


def kept(guard, q_len, kv_len):
    """The mask by the oracle of expressions, [q, kv]."""
    cascade = parse_cascade(guard)
    found = interpret(cascade, {"X": torch.ones(q_len, kv_len)})["Y"]
    return found > 0


def parse_cascade(guard):
    from attn_rewrite.cascade import parse

    return parse(
        f"cascade m\nranks q, kv\ninput X[q, kv]\noutput Y\n\nY[q, kv] = X[q, kv] where {guard}\n"
    )


@pytest.mark.parametrize("text", BOUNDED)
@pytest.mark.parametrize(("row", "along"), [("q", "kv"), ("kv", "q")])
def test_bounds_hold_everything_kept_and_full_ranges_nothing_else(text, row, along):
    ranges = loop_ranges(parse_expr(text), row, along)
    if not ranges:
        assert along == "q" or "%" in text or "*" in text
        return
    q_len, kv_len = 40, 45
    mask = kept(parse_expr(text), q_len, kv_len)
    mask = mask if row == "q" else mask.T
    sizes = {"q": q_len, "kv": kv_len}
    covered = torch.zeros_like(mask)
    for r in ranges:
        for i in range(mask.shape[0]):
            low = max([number(s.value, row, i, sizes) for s in r.low], default=0)
            high = min([number(s.value, row, i, sizes) for s in r.high], default=mask.shape[1] - 1)
            inside = slice(max(low, 0), max(high + 1, 0))
            covered[i, inside] = True
            if r.exact:
                assert mask[i, inside].all()
        for side in (*r.low, *r.high):
            values = [number(side.value, row, i, sizes) for i in range(mask.shape[0])]
            steps = np.sign(np.diff(values))
            assert (steps * (side.rising or 1) >= 0).all()
            assert side.rising or not steps.any()
    assert (covered | ~mask).all()


def number(expr, row, at, sizes):
    from attn_rewrite.cascade.expr import Const, substitute
    from attn_rewrite.cascade.interval import Interval, evaluate

    fixed = substitute(expr, {Extent(n): Const(v) for n, v in sizes.items()})
    point = Interval(np.asarray(float(at)), np.asarray(float(at)))
    return int(evaluate(fixed, {row: point}).lo)


@pytest.mark.parametrize(
    "guard", [eq((Q - KV) % 3, 0), (Q - KV) * (Q - KV) < 9, Read("m", (Q, KV)),
              Read("end", (Q,)) >= KV, KV * 2 <= Q]
)  # fmt: skip
def test_what_has_no_bounds(guard):
    assert loop_ranges(guard, "q", "kv", frozenset({"end"})) == ()


def test_a_length_per_batch_entry_is_a_bound_if_it_is_an_integer():
    guard = (Read("lens", (B,)) > KV) & (KV <= Q)
    (found,) = loop_ranges(guard, "q", "kv", frozenset({"lens"}))
    assert len(found.high) == 2
    assert found.exact
    (loose,) = loop_ranges(guard, "q", "kv")
    assert len(loose.high) == 1
    assert not loose.exact


# Lists


@pytest.mark.parametrize(
    "text", [*BOUNDED, "(q - kv) // 8 % 2 == 0", "(q >= kv) & (q - kv < h * 12 + 3)"]
)
@pytest.mark.parametrize("rows", ["q", "kv"])
def test_lists_against_a_token_level_mask(text, rows):
    guard, schedule = parse_expr(text), Schedule(block_rows=32, block_along=16)
    q_len, kv_len, heads = 70, 90, 3
    found = make_lists(guard, schedule, q_len=q_len, kv_len=kv_len, heads=heads, batch=2, rows=rows)
    for h in range(found.tiles.shape[1]):
        mask = kept(parse_expr(text.replace("h *", f"{h} *")), q_len, kv_len)
        mask = mask if rows == "q" else mask.T
        for block, (begin, full, end) in enumerate(found.tiles[0, h]):
            part = mask[block * 32 : (block + 1) * 32]
            tiles = part.split(16, dim=1)
            listed = found.columns[begin:end].tolist()
            assert set(listed) == {i for i, t in enumerate(tiles) if t.any()}
            assert len(listed) == len(set(listed))
            for column in found.columns[full:end]:
                assert tiles[column].all()
                assert tiles[column].shape[1] == 16
            for column in found.columns[begin:full]:
                assert not tiles[column].all() or tiles[column].shape[1] < 16
    assert found.tiles.dtype == found.columns.dtype == np.int32


def test_tables_of_blocks_decide_and_tables_of_positions_do_not():
    blocks = Read("t", (H, Q // 16, KV // 16))
    assert blockwise_tables(blocks & Read("m", (Q, KV))) == {"t"}
    table = np.random.default_rng(0).random((2, 3, 3)) < 0.5
    schedule = Schedule(block_rows=16, block_along=16)
    sizes = {"q_len": 48, "kv_len": 48, "heads": 2, "batch": 1}
    found = make_lists(blocks, schedule, **sizes, tables={"t": table})
    assert (found.kept, found.full) == (table.sum(), table.sum())
    unknown = make_lists(Read("m", (Q, KV)), schedule, **sizes)
    assert (unknown.kept, unknown.full) == (9, 0)


# Derivatives


@pytest.mark.parametrize(
    "text", ["tanh(QK * 0.1) * 3.0", "QK * QK / (QK * QK + 1.0)", "exp(-QK) + log(QK * QK + 2.0)",
             "where(QK > 0.2, QK ** 3, sigmoid(QK))", "softplus(QK) - relu(QK)", "sqrt(QK * QK + 1.0)",
             "silu(QK) + erf(QK) + sin(QK) * cos(QK)", "max(QK, 0.3) + min(QK, 0.1)",
             "clip(QK, -0.5, 0.5) + abs(QK)", "1.0 / (QK + 4.0) + rsqrt(QK * QK + 1.0)"],
)  # fmt: skip
def test_derivatives_against_differences(text):
    from attn_rewrite.cascade import parse

    x = Read("QK", (Rank("i"),))
    expr = parse_expr(text.replace("QK", "QK[i]"))
    slope = derivative(expr, x)
    assert not isinstance(slope, Refusal)
    points = torch.tensor([-1.3, -0.71, -0.23, 0.17, 0.41, 1.9], dtype=torch.float64)

    def value(e, at):
        c = parse(f"cascade c\nranks i\ninput QK[i]\noutput Y\n\nY[i] = {e} + 0.0 * QK[i]\n")
        return interpret(c, {"QK": at})["Y"]

    step = 1e-6
    wanted = (value(expr, points + step) - value(expr, points - step)) / (2 * step)
    assert torch.allclose(value(slope, points), wanted, atol=1e-8, rtol=1e-6)


def test_rounding_has_no_derivative():
    assert isinstance(derivative(call("round", QK), QK), Refusal)


# Compilation ahead of time

COMPILED = [
    ("cuda:90", "causal", "bfloat16", 128), ("hip:gfx942", "dense", "bfloat16", 64),
]  # fmt: skip
COMPILED_SLOWLY = [
    (target, name, dtype, d)
    for target in LIMITS for name in ("dense", "causal", "sinks", "per head")
    for dtype, d in (("bfloat16", 64), ("bfloat16", 128), ("float16", 80), ("float32", 64))
]  # fmt: skip


def compiled(target, name, dtype, d):
    lanes = {"d": d, "f": d}
    (stage,) = stages_of(with_lse(cascade_of(name)))
    size = torch.empty(0, dtype=getattr(torch, dtype)).element_size()
    schedule = choose_schedule(stage.program, lanes, size, parse_target(target))
    return compile_source(emit(stage.program, schedule, lanes), target, dtype, lanes)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTN_REWRITE_CACHE", str(tmp_path / "cache"))
    autotune.remembered.cache_clear()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "compiled"))


@pytest.mark.parametrize(("target", "name", "dtype", "d"), COMPILED)
def test_default_kernels_compile_without_spills(target, name, dtype, d):
    binary = compiled(target, name, dtype, d)
    assert binary.resources.spilled == 0, binary.resources
    assert fits(binary.resources, LIMITS[target])
    assert 0 < binary.resources.occupancy <= 1
    assert set(binary.files) == ({"ptx", "cubin"} if "cuda" in target else {"amdgcn", "hsaco"})
    assert all(binary.files.values())


@pytest.mark.matrix
@pytest.mark.parametrize(("target", "name", "dtype", "d"), COMPILED_SLOWLY)
def test_every_default_kernel_compiles_without_spills(target, name, dtype, d):
    assert fits(compiled(target, name, dtype, d).resources, LIMITS[target])


def test_a_schedule_that_spills_is_found_out():
    lanes = {"d": 64, "f": 64}
    (stage,) = stages_of(cascade_of("dense"))
    greedy = Schedule(block_rows=64, block_along=64, warps=1, stages=1)
    binary = compile_source(emit(stage.program, greedy, lanes), "cuda:90", "float16", lanes)
    assert binary.resources.spilled > 0
    assert not fits(binary.resources, LIMITS["cuda:90"])
    sizes = [s.block_rows * s.block_along for s in smaller(greedy)]
    assert sizes == sorted(sizes, reverse=True)


def test_occupancy_by_hand():
    sm = Limits(registers=65536, shared=228 * 1024, threads=2048, lanes=32)
    assert occupancy_bound(sm, 32, 0, 128) == 1.0
    assert occupancy_bound(sm, 128, 0, 128) == 0.25
    assert occupancy_bound(sm, 32, 100 * 1024, 128) == 2 * 128 / 2048


def test_an_unknown_target_is_a_sentence():
    with pytest.raises(PolicyError, match="cuda:91"):
        parse_target("cuda:91")


# Operators and the pipeline, in a process that has no GPU and interprets nothing


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Linear(64, 192)

    def forward(self, x):
        parts = self.project(x).view(x.shape[0], x.shape[1], 3, 2, 32).permute(2, 0, 3, 1, 4)
        out = torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=True)
        return out.transpose(1, 2).flatten(2)


def make_model():
    torch.manual_seed(0)
    model = Block().eval().to(torch.bfloat16)
    return model, (torch.randn(2, 70, 64, dtype=torch.bfloat16),), {}, None


needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without one")


@needs_no_gpu
def test_without_a_gpu_the_backend_is_refused_in_one_sentence():
    model, args, _, _ = make_model()
    with pytest.raises(LowerError, match="sees none; use backend='torch'"):
        ar.optimize(model, "exact", args, backend="triton")
    with pytest.raises(LowerError, match="sees none"):
        ar.optimize(model, "exact", backend="triton")
    (site,) = ar.optimize(model, "window(size=9)", args, backend="auto").report.sites
    assert site.kernel != "triton"


@needs_no_gpu
def test_an_operator_on_a_cpu_tensor_says_where_it_runs():
    import attn_rewrite.ops  # noqa: F401

    x = [torch.randn(1, 2, 8, 16) for _ in range(3)]
    with pytest.raises(LowerError, match="NVIDIA or AMD GPU"):
        torch.ops.attn_rewrite.triton_cascade(x, None, str(cascade_of("dense")), "", 0.0)


def test_export_with_dynamic_lengths_runs_the_fake_kernel_only():
    import attn_rewrite.ops  # noqa: F401

    text = str(cascade_of("bias", 2))

    class Model(torch.nn.Module):
        def forward(self, *inputs):
            return torch.ops.attn_rewrite.triton_cascade(list(inputs), None, text, "", 0.0)

    x = (torch.randn(2, 4, 37, 16), *(torch.randn(2, 2, 37, 16) for _ in "kv"),
         torch.randn(2, 1, 37, 37))  # fmt: skip
    length = torch.export.Dim("length", max=1 << 20)
    shapes = (({2: length}, {2: length}, {2: length}, {2: length, 3: length}),)
    program = torch.export.export(Model(), x, dynamic_shapes=shapes)
    (node,) = (n for n in program.graph.nodes if "triton_cascade" in str(n.target))
    av, lse = node.meta["val"]
    assert (av.shape[:2], av.dtype, lse.ndim, lse.dtype) == ((2, 4), x[0].dtype, 3, torch.float32)


@pytest.mark.parametrize(("name", "lists"), [("causal", 0), ("dilated ahead", 1)])
def test_compilers_see_the_kernel_and_not_an_opaque_operator(name, lists):
    from torch._functorch.aot_autograd import aot_export_module
    from torch._subclasses.fake_tensor import FakeTensorMode

    import attn_rewrite.ops  # noqa: F401

    text = str(cascade_of(name, 2))

    class Model(torch.nn.Module):
        def forward(self, *inputs):
            found = torch.ops.attn_rewrite.triton_cascade(list(inputs), None, text, "", 0.0)
            return (found[0],)

    with FakeTensorMode():
        shapes = ((2, 4, 512, 64), (2, 2, 512, 64), (2, 2, 512, 64))
        x = [torch.empty(s, device="cuda", dtype=torch.bfloat16) for s in shapes]
        graph, _ = aot_export_module(Model(), x, trace_joint=False)
    targets = [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]
    assert sum("triton_kernel_wrapper" in t for t in targets) == 1
    assert sum("tile_lists" in t for t in targets) == lists
    assert not any("triton_cascade" in t for t in targets)


@pytest.mark.parametrize("name", ["clipped-softmax", "softmax-over-queries", "attention-weights"])
def test_fake_kernels_of_other_cascades_have_the_shapes_of_the_oracle(name):
    from torch._subclasses.fake_tensor import FakeTensorMode

    import attn_rewrite.ops  # noqa: F401

    cascade = NAMED[name]
    sizes = {"p": 5, "m": 7, "e": 4, "f": 3}
    x = [torch.ones([sizes[r] for r in t.ranks]) for t in cascade.inputs]
    wanted = interpret(cascade, dict(zip((t.name for t in cascade.inputs), x, strict=True)))
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in x]
        found = torch.ops.attn_rewrite.triton_cascade(fake, None, str(cascade), "", 0.0)
    assert [t.shape for t in found] == [wanted[n].shape for n in cascade.outputs]


def test_a_wrong_number_of_inputs_is_a_sentence():
    from torch._subclasses.fake_tensor import FakeTensorMode

    import attn_rewrite.ops  # noqa: F401

    with FakeTensorMode():
        x = [torch.empty(1, 2, 8, 16) for _ in range(2)]
    with pytest.raises(LowerError, match="got 2 inputs"):
        torch.ops.attn_rewrite.triton_cascade(x, None, str(cascade_of("dense")), "", 0.0)


def test_the_command_writes_bundles_that_load_without_this_package(tmp_path):
    out = tmp_path / "out"
    command = [
        sys.executable, "-m", "attn_rewrite", "optimize", "tests.test_triton:make_model",
        "--policy", "window(size=20)", "-o", str(out), "--export", "triton:cuda:90",
        "--export", "triton:hip:gfx942", "--json",
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr[-2000:]
    document = json.loads(done.stdout)
    assert [e["file"] for e in document["exports"]] == ["triton/cuda-90", "triton/hip-gfx942"]
    for export, kinds in zip(
        document["exports"], ({"cubin", "ptx"}, {"hsaco", "amdgcn"}), strict=True
    ):
        folder = out / export["file"]
        (kernel,) = export["kernels"]
        assert kernel["resources"]["spilled"] == 0
        names = {p.suffix[1:] for p in folder.glob(f"{kernel['name']}.*")}
        assert names == kinds | {"py", "json"}
        code = "import load, sys; print(load.Bundle.__name__, 'triton' in sys.modules)"
        alone = subprocess.run(
            [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True
        )
        assert alone.stdout.strip() == "Bundle False", alone.stderr
        meta = json.loads((folder / f"{kernel['name']}.json").read_text())
        assert {a["name"] for a in meta["arguments"]} >= {"Q_ptr", "K_ptr", "V_ptr", "n_q", "n_kv"}
        assert meta["dtype"] == "bfloat16"


def test_the_loader_passes_what_the_metadata_says(tmp_path, monkeypatch):
    from attn_rewrite.backends.triton import loader

    calls = []

    class Driver:
        def __getattr__(self, name):
            return lambda *arguments: calls.append((name, arguments)) or 0

    monkeypatch.setattr(loader.ctypes, "CDLL", lambda name: Driver())
    meta = {
        "function": "attention", "threads": 128, "shared_bytes": 4096, "unit_strides": ["Q_d"],
        "trailing_null_pointers": 2,
        "arguments": [{"name": "Q_ptr", "type": "*bf16", "multiple_of": 16},
                      {"name": "n_q", "type": "i32", "multiple_of": 1}],
    }  # fmt: skip
    (tmp_path / "k.json").write_text(json.dumps(meta))
    (tmp_path / "k.cubin").write_bytes(b"code")
    index = {"target": "cuda:90", "sites": {"attention#0": ["k"]}}
    (tmp_path / "kernels.json").write_text(json.dumps(index))
    (kernel,) = loader.Bundle(tmp_path).of_site("attention#0")
    kernel((7, 1, 1), Q_ptr=4096, n_q=300)
    assert [name for name, _ in calls] == [
        "cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute", "cuLaunchKernel"
    ]  # fmt: skip
    arguments = calls[-1][1]
    assert arguments[1:7] == (7, 1, 1, 128, 1, 1)
    assert len(arguments[9]) == 4
    for wrong in ({"Q_ptr": 4097, "n_q": 300}, {"Q_ptr": 4096, "n_q": 300, "Q_d": 2}):
        with pytest.raises(ValueError, match="must be"):
            kernel((7, 1, 1), **wrong)


# Schedules and tuning


def test_schedules_as_text():
    chosen = Schedule(block_rows=128, pack=4, widen=frozenset({"V"}))
    assert from_text(to_text(chosen)) == chosen
    assert to_text(Schedule()) == "{}"
    for wrong in ({"block_rows": 48}, {"block_along": 8}, {"skipping": "some"}, {"precision": "x"}):
        with pytest.raises(ValueError, match="expected"):
            Schedule(**wrong)
    assert [padded_side(n) for n in (1, 16, 17, 64, 80, 256)] == [16, 16, 32, 64, 128, 256]


def test_tuning_times_a_small_space_once_and_remembers():
    timed = []

    def timer(schedule):
        timed.append(schedule)
        return math.inf if schedule.warps == 8 else schedule.block_along / 10 + schedule.stages

    lanes, default = {"d": 64, "f": 64}, Schedule(block_rows=64, block_along=64, stages=3)
    best = autotune.tuned("key", default, lanes, 2, timer)
    assert timed[0] == default
    assert len(timed) == len(set(timed)) <= 24
    assert (best.block_along, best.stages, best.warps) == (32, 2, 4)
    count = len(timed)
    assert autotune.tuned("key", default, lanes, 2, timer) == best
    assert len(timed) == count
    assert autotune.tuned("other", default, lanes, 2, lambda s: math.inf) == default
    assert autotune.remembered("other") is None


def test_a_class_of_shapes_holds_many_lengths():
    program = read_program(fused(cascade_of("dense"), "kv"))
    keys = [
        autotune.cache_key(program, {"b": 1, "h": 8, "q": n, "kv": n}, "bfloat16", "H200")
        for n in (9000, 12000, 16384, 16385)
    ]
    assert keys[0] == keys[1] == keys[2] != keys[3]


def test_passes_of_the_library_are_frozen():
    program = read_program(fused(cascade_of("dense"), "kv"))
    (found,) = (s for s in program.stages if isinstance(s, Pass))
    assert {s.name for s in found.states} == {"RGM", "RSD", "RSNV"}
    assert hash(program) == hash(read_program(fused(cascade_of("dense"), "kv")))


# Quantised operands


def quantised(text, width=64, **facts):
    from attn_rewrite.policy_text import parse_pipeline
    from tests.sites import make_site

    site = make_site(d_qk=width, d_v=width, q_len=1024, kv_len=1024, **facts)
    (transform,) = parse_pipeline(text)
    return transform.apply(site.cascade, site)


def test_a_golden_source_over_codes(golden):
    kernel = lower(quantised("int8(pv=true)"), extents={"d": 64, "f": 64})
    golden("triton/int8-pv.py.txt", kernel.source)


def test_what_a_quantised_kernel_says_of_itself():
    one, two = (lower(quantised(t), extents={"d": 64, "f": 64}) for t in ("int8", "int8(pv=true)"))
    assert one.why.startswith("generated with 1 pass over the keys")
    assert two.why.startswith("generated with 2 passes over the keys")
    assert "codes and scales are made before it" in one.why


@pytest.mark.parametrize("target", ["cuda:80", "hip:gfx942"])
def test_targets_without_these_8_bit_floats_refuse(target):
    for text in ("fp8", "int8(pv='fp8')"):
        found = lower(quantised(text), device=parse_target(target))
        assert isinstance(found, Refusal)
        assert found.code == "triton-fp8"
        assert target in found.reason
    assert not isinstance(lower(quantised("int8"), device=parse_target(target)), Refusal)


CODES = [
    ("cuda:90", "int8(pv=true)"), ("cuda:90", "int4"), ("cuda:90", "fp8"), ("hip:gfx942", "int8"),
]  # fmt: skip
CODES_SLOWLY = [
    ("cuda:80", "int8"), ("cuda:80", "int8(pv=true)"), ("cuda:100", "int8(pv=true)"),
    ("cuda:100", "fp8"), ("cuda:90", "int8(pv='fp8', granularity='thread')"),
    ("hip:gfx942", "int8(pv=true)"), ("cuda:90", "fp8(kind='e5m2', pv=false)"),
    ("cuda:80", "int4"), ("cuda:100", "int4(pv=true)"), ("hip:gfx942", "int4"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("target", "text"),
    [*CODES, *(pytest.param(*c, marks=pytest.mark.matrix) for c in CODES_SLOWLY)],
)
def test_kernels_over_codes_compile(target, text):
    from attn_rewrite.backends.triton.bundle import fit

    lanes = {"d": 64, "f": 64}
    kernel = lower(quantised(text), extents=lanes, device=parse_target(target))
    assert not isinstance(kernel, Refusal), kernel
    (source,) = kernel.sources
    _, binary = fit(source, target, "bfloat16", lanes)
    assert binary.resources.spilled == 0
    if target.startswith("cuda"):
        ptx = binary.files["ptx"].decode()
        integer = "s32.s8.s8" in ptx or "kind::i8" in ptx
        assert integer == ("int" in text), "products of codes run on tensor cores as integers"


@pytest.mark.parametrize("text", ["int8", "int4", "int8(pv=true)", "fp8"])
def test_narrow_heads_over_codes_compile(text):
    """A product of 8-bit numbers has at least 32 terms on tensor cores."""
    from attn_rewrite.backends.triton.bundle import fit

    lanes = {"d": 16, "f": 16}
    kernel = lower(quantised(text, 16), extents=lanes, device=parse_target("cuda:90"))
    (source,) = kernel.sources
    _, binary = fit(source, "cuda:90", "bfloat16", lanes)
    assert binary.resources.spilled == 0
