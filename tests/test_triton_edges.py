"""Faults found by use: the Triton backend's promises that need no kernel to run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import attn_rewrite.ops  # noqa: F401
from attn_rewrite.backends.triton import autotune, build, loader, prepare
from attn_rewrite.backends.triton.aot import (
    LIMITS,
    compile_source,
    fits,
    grid_formula,
    parse_target,
)
from attn_rewrite.backends.triton.choose import choose_schedule, unlisted
from attn_rewrite.backends.triton.decode import decode
from attn_rewrite.backends.triton.emit import emit
from attn_rewrite.backends.triton.gradient import backward_of
from attn_rewrite.backends.triton.launch import Call, arguments, check_device, extents_of
from attn_rewrite.backends.triton.lists import make_lists
from attn_rewrite.backends.triton.prepare import program_of, source_of, stages
from attn_rewrite.backends.triton.schedule import Device, Schedule, to_text
from attn_rewrite.backends.triton.table_lists import table_guard
from attn_rewrite.backends.triton.varlen import Sequences, attend_varlen
from attn_rewrite.cascade.attention import QK, SoftmaxAttention, softmax_cascade
from attn_rewrite.cascade.expr import KV, Extent, Q, Read
from attn_rewrite.cascade.ir import TensorDecl
from attn_rewrite.cascade.text import parse_expr
from attn_rewrite.errors import LowerError, ToolError
from tests.interpreted.dense import CASES

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTN_REWRITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "compiled"))
    autotune.remembered.cache_clear()
    build._kernel.cache_clear()


def program(form):
    (stage,) = stages(str(softmax_cascade(form, "edge")))
    return stage.program


def source(name="causal", group=1, schedule=None, lanes=None):
    lanes = lanes or {"d": 64, "f": 64}
    found = program(CASES[name].form(group))
    return emit(found, schedule or choose_schedule(found, lanes, 2, Device()), lanes)


# Addresses


@pytest.mark.parametrize("name", ["dense", "bias", "factor", "documents", "sink logit", "per head"])
def test_every_term_of_an_address_has_64_bits(name):
    assert_wide_addresses(name, source(name))


def assert_wide_addresses(name, made):
    """Every index that a stride of ``made`` multiplies is converted to 64 bits before."""
    text = made.text
    strides = {p.name for p in made.parameters if p.kind == "stride"}
    terms = re.findall(r"([^+=(]*(?:\([^()]*\))*[^+=(]*) \* (\w+)", text.split('"""')[2])
    terms = [(value, stride) for value, stride in terms if stride in strides]
    assert len(terms) > 8
    for value, stride in terms:
        assert "tl.int64" in value, (name, value, stride)


def test_a_product_of_lengths_has_64_bits():
    form = SoftmaxAttention(
        QK + Read("t", (KV + Q * 4096,)) + Read("u", (Q * 12 + KV,)) * Read("v", (Q * Extent("kv"),)),
        reads=tuple(TensorDecl(n, ("r" + n,)) for n in "tuv"),
    )  # fmt: skip
    text = emit(program(form), Schedule(), {"d": 64, "f": 64}).text
    assert "tl.cast(q, tl.int64) * 4096" in text.replace("q[:, None]", "q")
    assert "tl.cast(q, tl.int64) * n_kv" in text
    assert "q * 12" in text.replace("q[:, None]", "q")


def test_bundles_take_strides_beyond_32_bits(monkeypatch):
    binary = compile_source(source(), "cuda:90", "bfloat16", {"d": 64, "f": 64})
    kinds = {a["kind"]: a["type"] for a in binary.metadata["arguments"]}
    assert kinds["stride"] == "i64"
    assert kinds["extent"] == "i32"
    argument = {"name": "n_q", "type": "i32", "multiple_of": 1}
    assert loader._boxed(argument, 1 << 20).value == 1 << 20
    assert loader._boxed({**argument, "type": "i64"}, 1 << 40).value == 1 << 40
    with pytest.raises(ValueError, match="n_q does not fit i32"):
        loader._boxed(argument, 1 << 31)


# Bundles


def test_the_metadata_says_how_many_programs_to_launch():
    packed = source("cached", 4, Schedule(block_rows=64, pack=4, skipping="bounds"))
    assert grid_formula(packed) == "ceil(q * 4 / 64) * b * (h / 4)"
    kernel = object.__new__(loader.Kernel)
    kernel.meta = {"grid": {"rows": "q", "block_rows": 64, "packed_heads": 4, "ranks": ["b", "h"]}}
    assert kernel.grid(q=33, b=3, h=8) == (3 * 3 * 2, 1, 1)


def test_operands_of_a_bundle_have_the_types_of_the_model():
    dtypes = {"bias": "bfloat16", "Q": "bfloat16"}
    lanes = {"d": 64, "f": 64}
    binary = compile_source(source("bias"), "cuda:90", "bfloat16", lanes, dtypes=dtypes)
    types = {a["name"]: a["type"] for a in binary.metadata["arguments"]}
    assert (types["bias_ptr"], types["AV_ptr"], types["LSE_ptr"]) == ("*bf16", "*bf16", "*fp32")
    assert binary.metadata["warps"] * 32 == binary.metadata["threads"]
    assert binary.metadata["tile_lists"] is None


def test_a_type_that_a_target_lacks_is_one_sentence():
    with pytest.raises(ToolError) as problem:
        compile_source(source(), "cuda:80", "float8_e4m3fn", {"d": 64, "f": 64})
    assert "fp8e4nv not supported in this architecture" in str(problem.value)
    assert "\n" not in str(problem.value)


@pytest.mark.parametrize("kept", [False, True])
def test_an_assembler_that_is_missing_is_one_sentence(monkeypatch, kept):
    from triton.backends.nvidia import compiler

    def missing(*_):
        raise RuntimeError("Cannot find ptxas")

    lanes = {"d": 16, "f": 16}
    if kept:  # Triton has the binary in its cache; the report of resources assembles again
        compile_source(source(lanes=lanes), "cuda:90", "bfloat16", lanes)
    monkeypatch.setattr(compiler, "get_ptxas", missing)
    with pytest.raises(ToolError) as problem:
        compile_source(source(lanes=lanes), "cuda:90", "bfloat16", lanes)
    assert "Cannot find ptxas" in str(problem.value)
    assert "\n" not in str(problem.value)


def test_accumulation_registers_are_counted_once():
    from types import SimpleNamespace

    from attn_rewrite.backends.triton.aot import _resources

    text = "  - .agpr_count:     112\n    .vgpr_count:     368\n    .vgpr_spill_count: 3\n"
    found = _resources(
        "hip:gfx942", Device("hip", "gfx942"), {"amdgcn": text.encode()},
        SimpleNamespace(shared=20480), 256,
    )  # fmt: skip
    assert (found.registers, found.spilled) == (368, 12)
    assert found.occupancy == 256 / 2048


SPILLED = [
    ("cuda:90", "sinks", 72), ("cuda:100", "sinks", 72), ("cuda:80", "sinks", 72),
    ("cuda:100", "sinks", 256), ("cuda:80", "causal", 120), ("cuda:80", "bias", 72),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("target", "name", "d"), SPILLED)
def test_defaults_that_once_spilled_do_not(target, name, d):
    lanes = {"d": d, "f": d}
    found = program(CASES[name].form(1))
    schedule = choose_schedule(found, lanes, 2, parse_target(target))
    binary = compile_source(emit(found, schedule, lanes), target, "bfloat16", lanes)
    assert fits(binary.resources, LIMITS[target])


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "cuda:100", "hip:gfx942"])
@pytest.mark.parametrize("part", ["queries", "keys"])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_backward_kernels_do_not_spill(target, part, d):
    lanes = {"d": d, "f": d}
    row, along = ("q", "kv") if part == "queries" else ("kv", "q")
    found = program_of(getattr(backward_of(CASES["causal"].form(2)), part), row, along)
    schedule = choose_schedule(found, lanes, 2, parse_target(target))
    binary = compile_source(emit(found, schedule, lanes), target, "bfloat16", lanes)
    assert fits(binary.resources, LIMITS[target])


# Schedules and what is made once


def test_blocks_with_lists_hold_whole_positions():
    form = SoftmaxAttention(QK, parse_expr("(q - kv) // 8 % 2 == 0"), group=7)
    chosen = choose_schedule(program(form), {"d": 64, "f": 64}, 4, Device(), {"q": 16})
    assert chosen.skipping == "lists"
    assert chosen.block_rows % chosen.pack == 0
    with pytest.raises(ValueError, match="whole number of positions"):
        Schedule(block_rows=64, pack=7, skipping="lists")


@pytest.mark.parametrize(
    ("text", "skipping"),
    [("q >= kv", "bounds"), ("(q >= kv) & ((q - kv) % 3 == 0)", "bounds"),
     ("(q >= kv) & keep[h, q // 64, kv // 64]", "lists"), ("keep[h, q // 64, kv // 64]", "lists"),
     ("(q >= kv) & ((q // 128 + kv // 128) % 4 == 0)", "lists"),
     ("(q >= kv) & (doc[b, q] == doc[b, kv])", "bounds"), ("doc[b, q] == doc[b, kv]", "none")],
)  # fmt: skip
def test_lists_where_loop_bounds_leave_many_tiles_to_the_mask(text, skipping):
    """A causal table of blocks is skipped by its table; where lists save nothing, none is made."""
    reads = (
        TensorDecl("keep", ("h", "qb", "kb"), dtype="bool"),
        TensorDecl("doc", ("b", "q"), dtype="i32"),
    )
    guard = parse_expr(text)
    form = SoftmaxAttention(QK * 0.1, guard, reads=tuple(r for r in reads if f"{r.name}[" in text))
    found = program(form)
    chosen = choose_schedule(found, {"d": 64, "f": 64}, 2, Device())
    assert chosen.skipping == skipping
    without = {"lists": "bounds" if ">=" in text else "none"}
    assert unlisted(found, chosen) == without.get(skipping, skipping)


def test_products_of_float32_are_as_torch_makes_them():
    found = program(CASES["dense"].form(1))
    x = {n: torch.empty(1, 2, 64, 64) for n in "QKV"}
    assert source_of(found, x).schedule.precision == "ieee"
    torch.set_float32_matmul_precision("high")
    try:
        assert source_of(found, x).schedule.precision == "tf32"
        half = {n: t.half() for n, t in x.items()}
        assert source_of(found, half).schedule.precision == "ieee"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_source_is_emitted_once_for_all_lengths(monkeypatch):
    emitted = []
    monkeypatch.setattr(prepare, "emit", lambda *a, **k: emitted.append(a) or emit(*a, **k))
    found = program(SoftmaxAttention(QK * 0.77, Q >= KV))
    sources = [
        source_of(found, {m: torch.empty(1, 2, n, 64) for m in "QKV"}) for n in (70, 71, 128, 4096)
    ]
    assert len(emitted) == 1
    assert all(s is sources[0] for s in sources)


@pytest.mark.parametrize(("name", "most"), [("causal", 1), ("window", 1), ("bias", 3)])
def test_triton_compiles_one_binary_for_all_lengths(name, most):
    """The keys under which Triton keeps binaries, as its own binder makes them."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    made = source(name)
    kernel = build.kernel_of(made)
    backend = make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    found = set()
    for n in (2, 17, 512, 640, 1000, 1001, 4097):
        x = {m: torch.empty(2, 4, n, 64, dtype=torch.bfloat16) for m in "QKV"}
        if name == "bias":
            x["bias"] = torch.empty(2, 1, n, n, dtype=torch.bfloat16)
        outputs = {"AV": torch.empty_like(x["Q"]), "LSE": torch.empty(2, 4, n)}
        ranks = {t.name: t.ranks for t in made.program.cascade.inputs}
        ranks |= {o.name: o.ranks for o in made.outputs}
        call = Call({**x, **outputs}, ranks, extents_of(made, x))
        found.add(str(bind(**arguments(made, call))[1]))
    assert len(found) <= most


def test_products_of_8_bit_floats_are_handed_on_to_float32():
    """Tensor cores add them with 22 bits: those of stored operands, and no others."""
    found = program(CASES["dense"].form(1))
    x = {n: torch.empty(1, 2, 64, 64, dtype=torch.float8_e5m2) for n in "QKV"}
    lines = [s for s in source_of(found, x).text.splitlines() if "tl.dot(" in s]
    assert ["max_num_imprecise_acc" in s for s in lines] == [True, False]
    half = source_of(found, {**x, "Q": x["Q"].half()})
    assert "max_num_imprecise_acc" not in half.text


# Lists


@pytest.mark.parametrize("text", ["keep[h, q // 64, kv // 128]",
                                  "(q >= kv) & keep[h, q // 64, kv // 128] & (q - kv < 200)"])  # fmt: skip
@pytest.mark.parametrize("rows", ["q", "kv"])
@pytest.mark.parametrize("heads", [1, 3])
def test_lists_made_on_the_device_are_those_of_the_host(text, rows, heads):
    table = torch.rand(heads, 5, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    schedule = Schedule(block_rows=64, block_along=32, skipping="lists")
    if rows == "kv":
        schedule = schedule.with_(block_rows=64, block_along=64)
    guard = parse_expr(text)
    assert table_guard(guard, schedule, rows) is not None
    sizes = [2, 3, 300, 290]
    tiles, columns = torch.ops.attn_rewrite.tile_lists(
        table, [table], str(guard), to_text(schedule), sizes, rows
    )
    host = make_lists(
        guard, schedule, q_len=300, kv_len=290, heads=3, batch=2, rows=rows,
        tables={"keep": table.expand(3, -1, -1).numpy()},
    )  # fmt: skip
    assert list(tiles.shape) == list(host.tiles.shape)
    for mine, wanted in zip(tiles.flatten(0, 2), host.tiles.reshape(-1, 3), strict=True):
        for i in range(2):
            got = columns[mine[i] : mine[i + 1]].tolist()
            assert got == host.columns[wanted[i] : wanted[i + 1]].tolist()


def test_tables_finer_than_a_tile_are_read_on_the_host():
    guard = parse_expr("keep[h, q // 16, kv // 16]")
    assert table_guard(guard, Schedule(block_rows=64, skipping="lists"), "q") is None
    assert table_guard(parse_expr("keep[q, kv]"), Schedule(skipping="lists"), "q") is None


def test_lists_that_are_kept_are_not_handed_out():
    like = torch.empty(1)
    call = (
        like,
        [],
        "(q - kv) // 64 % 2 == 0",
        to_text(Schedule(skipping="lists")),
        [1, 1, 300, 300],
        "q",
    )
    first = torch.ops.attn_rewrite.tile_lists(*call)
    wanted = [t.clone() for t in first]
    for t in first:
        t.fill_(-7)
    again = torch.ops.attn_rewrite.tile_lists(*call)
    assert all(torch.equal(a, b) for a, b in zip(again, wanted, strict=True))


# Devices and gradients


def test_operands_on_two_devices_are_a_sentence():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = [torch.empty(1, device="cuda"), torch.empty(1)]
    with pytest.raises(LowerError, match="are on cuda:0 and on cpu"):
        check_device(x)


def test_what_has_no_gradient_says_so():
    cascade = softmax_cascade(CASES["dense"].form(1), "edge")
    x = {n: torch.zeros(1, 2, 8, 16, requires_grad=True) for n in "QKV"}
    with pytest.raises(LowerError, match="decode has no gradient, and Q requires one"):
        decode(cascade, x)
    starts = torch.tensor([0, 8], dtype=torch.int32)
    flat = {n: t[0] for n, t in x.items()}
    with pytest.raises(LowerError, match="attend_varlen has no gradient"):
        attend_varlen(cascade, flat, Sequences(starts, starts, 8, 8))


def test_operators_for_serving_have_fake_kernels():
    from torch._subclasses.fake_tensor import FakeTensorMode

    text = str(softmax_cascade(CASES["cached"].form(2), "edge"))
    with FakeTensorMode():
        half = torch.float16
        q, k, v = (torch.empty(n, 30, w, dtype=half) for n, w in ((4, 16), (2, 16), (2, 24)))
        starts = torch.empty(3, dtype=torch.int32)
        av, lse = torch.ops.attn_rewrite.triton_varlen([q, k, v], starts, starts, 20, 20, text)
        assert (av.shape, lse.shape, av.dtype) == ((4, 30, 24), (4, 30), half)
        q = torch.empty(3, 4, 2, 16, dtype=torch.float8_e5m2)
        k, v = (torch.empty(9, 2, 32, w, dtype=torch.float8_e5m2) for w in (16, 24))
        table, lengths = torch.empty(3, 5, dtype=torch.int32), torch.empty(3, dtype=torch.int32)
        av, lse = torch.ops.attn_rewrite.triton_paged([q, k, v], table, lengths, text)
        assert (av.shape, lse.shape, av.dtype) == ((3, 4, 2, 24), (3, 4, 2), torch.bfloat16)


# The cache of tuned schedules


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"schedule": 5}', '{"schedule": "[]"}',
                                     '{"schedule": "{\\"block_rows\\": 17}"}', "\udcff"])  # fmt: skip
def test_a_broken_file_is_tuned_again(content):
    path = autotune._path("key")
    path.parent.mkdir(parents=True)
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    assert autotune.remembered("key") is None
    default = Schedule(block_rows=64, block_along=64)
    best = autotune.tuned("key", default, {"d": 64, "f": 64}, 2, lambda s: float(s.block_along))
    autotune.remembered.cache_clear()
    assert autotune.remembered("key") == best != default


def test_writers_at_the_same_time_leave_one_whole_file():
    schedules = [Schedule(warps=w, stages=s) for w in (4, 8) for s in (2, 3, 4)]

    def write(schedule):
        for _ in range(20):
            autotune.remember("key", schedule, 1.0)
            json.loads(autotune._path("key").read_text("utf-8"))

    writers = [threading.Thread(target=write, args=(s,)) for s in schedules]
    for w in writers:
        w.start()
    for w in writers:
        w.join()
    autotune.remembered.cache_clear()
    assert autotune.remembered("key") in schedules
    assert [p.name for p in autotune._path("key").parent.iterdir()] == ["key.json"]


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("ATTN_REWRITE_CACHE", str(blocked))
    with pytest.raises(ToolError, match="ATTN_REWRITE_CACHE"):
        autotune.remember("key", Schedule(), 1.0)
    with pytest.raises(ToolError, match="ATTN_REWRITE_CACHE"):
        build.kernel_of(source())


# Training under a compiler

TRACED = """
import sys, torch
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
import attn_rewrite.ops
from attn_rewrite.backends.triton import ops
from attn_rewrite.cascade.attention import softmax_cascade
from tests.interpreted.dense import CASES

class Driver:  # what Triton asks to find out what a kernel writes to
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

class Model(torch.nn.Module):
    def forward(self, *inputs):
        text = str(softmax_cascade(CASES[name].form(2), "case"))
        out = torch.ops.attn_rewrite.triton_cascade(list(inputs), None, text, "", 0.0)[0]
        return (out.float().sum(),)

driver.set_active(Driver())
ops.check_device = lambda tensors: None  # autograd has no device of its own for fake CUDA tensors
for name in ("bias", "dilated ahead"):
    with FakeTensorMode():
        x = [torch.empty(2, h, 512, 64, requires_grad=True) for h in (4, 2, 2)]
        if name == "bias":
            x.append(torch.empty(2, 1, 512, 512, requires_grad=True))
        graph, _ = aot_export_module(Model(), x, trace_joint=True, output_loss_index=0)
    targets = [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]
    print(*(sum(t in k for k in targets) for t in ("kernel_wrapper", "tile_lists", "cascade")))
"""


def test_compilers_see_the_kernels_of_a_training_step():
    """Forward, queries, keys (and the bias) as kernels; a list of tiles for each of them."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TRACED], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == ["4 0 0", "3 3 0"], done.stdout + done.stderr[-3000:]
