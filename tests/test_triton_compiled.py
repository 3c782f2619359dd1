"""What compilers and launches see of the operators, in a process that has no GPU and runs nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import attn_rewrite.ops  # noqa: F401
from attn_rewrite.backends.triton import autotune, build, launch, ops, prepare, tune
from attn_rewrite.backends.triton import decode as decode_module
from attn_rewrite.backends.triton import varlen as varlen_module
from attn_rewrite.backends.triton.choose import choose_schedule
from attn_rewrite.backends.triton.decode import Pages, decode, split_form
from attn_rewrite.backends.triton.emit import emit
from attn_rewrite.backends.triton.gradient import backward_of
from attn_rewrite.backends.triton.lists import make_lists
from attn_rewrite.backends.triton.prepare import program_of, stages
from attn_rewrite.backends.triton.schedule import Device, Schedule, to_text
from attn_rewrite.backends.triton.varlen import Sequences, attend_varlen
from attn_rewrite.cascade.attention import softmax_cascade
from attn_rewrite.cascade.text import parse_expr
from attn_rewrite.errors import LowerError, ToolError
from tests.interpreted.dense import CASES
from tests.test_triton_edges import assert_wide_addresses

ROOT = Path(__file__).parents[1]
LANES = {"d": 64, "f": 64}
LENGTHS = (17, 512, 640, 1000, 1001, 4097)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTN_REWRITE_CACHE", str(tmp_path / "cache"))
    autotune.remembered.cache_clear()
    build._kernel.cache_clear()


@pytest.fixture
def binaries(monkeypatch):
    """The keys under which Triton would keep binaries, by kernel; nothing is compiled or run."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    found: dict[str, set[str]] = {}
    backend = make_backend(GPUTarget("cuda", 90, 32))
    kernel_of = launch.kernel_of

    def recorded(source):
        kernel = kernel_of(source)
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)

        class Recorder:
            def __getitem__(self, grid):
                return lambda **arguments: found.setdefault(source.name, set()).add(
                    source.key + str(bind(**arguments)[1])
                )

        return Recorder()

    monkeypatch.setattr(launch, "kernel_of", recorded)
    monkeypatch.setattr(torch.library, "wrap_triton", lambda kernel: kernel)
    monkeypatch.setattr(ops, "check_device", lambda tensors: None)
    return found


def operands(length: int, q: int | None = None, group: int = 2):
    half = torch.bfloat16
    return [torch.empty(2, 4, q or length, 64, dtype=half),
            *(torch.empty(2, 4 // group, length, 64, dtype=half) for _ in "kv")]  # fmt: skip


@pytest.mark.parametrize("name", ["causal", "window", "dilated ahead"])
def test_training_takes_one_binary_of_each_kernel_for_all_lengths(name, binaries):
    text = str(softmax_cascade(CASES[name].form(2), "case"))
    for length in LENGTHS:
        x = [t.requires_grad_() for t in operands(length)]
        out, _ = torch.ops.attn_rewrite.triton_cascade(x, None, text, "", 0.0)
        out.sum().backward()
    assert {n: len(keys) for n, keys in binaries.items()} == {
        "attention": 1, "backward_queries": 1, "backward_keys": 1,
    }  # fmt: skip


def test_decoding_takes_one_binary_of_each_kernel_for_all_lengths(binaries):
    cascade = softmax_cascade(CASES["cached"].form(2), "case")
    for length in LENGTHS:
        x = dict(zip("QKV", operands(length, 1), strict=True))
        decode(cascade, x)
    assert {n: len(keys) for n, keys in binaries.items()} == {"decode_part": 1, "decode_join": 1}


def test_serving_takes_one_binary_of_each_kernel_for_all_lengths(binaries):
    cascade = softmax_cascade(CASES["cached"].form(2), "case")
    for length in LENGTHS:
        x = dict(zip("QKV", operands(length), strict=True))
        starts = torch.tensor([0, length // 2, length], dtype=torch.int32)
        attend_varlen(
            cascade, {n: t[0] for n, t in x.items()}, Sequences(starts, starts, length, length)
        )
        cache = {n: torch.empty(9, 2, 64, 64, dtype=torch.bfloat16) for n in "KV"}
        table = torch.zeros(2, -(-length // 64), dtype=torch.int32)
        lengths = torch.tensor([length, 1], dtype=torch.int32)
        decode(cascade, {"Q": x["Q"][:, :, :1], **cache}, pages=Pages(table, lengths))
    assert {n: len(keys) for n, keys in binaries.items()} == {
        "varlen": 1, "decode_part": 1, "decode_join": 1,
    }  # fmt: skip


def serving(kind, length, page=64, batch=2):
    """A call of a kernel of serving, and how it is tuned."""
    cascade = softmax_cascade(CASES["cached"].form(2), "case")
    x = dict(zip("QKV", operands(length, None if kind == "varlen" else 1), strict=True))
    x = {n: t[:1].expand(batch, -1, -1, -1) for n, t in x.items()}
    if kind == "varlen":
        starts = torch.tensor([0, length // 2, length], dtype=torch.int32)
        given = ({n: t[0] for n, t in x.items()}, Sequences(starts, starts, length, length))
        return lambda: attend_varlen(cascade, *given), lambda: tune.tune_varlen(cascade, *given)
    pages = None
    if kind == "paged":
        x |= {n: torch.empty(9, 2, page, 64, dtype=torch.bfloat16) for n in "KV"}
        table = torch.zeros(batch, -(-length // page), dtype=torch.int32)
        pages = Pages(table, torch.full((batch,), length, dtype=torch.int32))
    return (
        lambda: decode(cascade, x, pages=pages),
        lambda: tune.tune_decode(cascade, x, pages),
    )


@pytest.fixture
def clock(binaries, monkeypatch):
    """A stand-in for the GPU's clock: ``clock.cost`` of what is launched; ``clock.timed`` of each."""

    class Clock:
        def __init__(self):
            self.used, self.timed = [], []

        @staticmethod
        def cost(schedule, splits):
            return abs(schedule.block_along - 32) + schedule.stages + schedule.warps

        def __call__(self, call):
            found = self.seen(call)
            self.timed.append(tuple(found.values()))
            return sum(self.cost(*one) for one in found.values())

        def seen(self, call):
            """Schedules and grids of the kernels that a call launches, by name."""
            self.used.clear()
            call()
            return dict(self.used)

    clock, launched = Clock(), launch.launch

    def noted(source, call, splits=1, **more):
        clock.used.append((source.name, (source.schedule, splits)))
        return launched(source, call, splits, **more)

    for module in (decode_module, varlen_module):
        monkeypatch.setattr(module, "launch", noted)
    monkeypatch.setattr(tune, "check_device", lambda tensors: None)
    monkeypatch.setattr(tune, "milliseconds", clock)
    monkeypatch.setattr(prepare, "is_tuned_for", lambda device: True)
    return clock


@pytest.mark.parametrize("kind", ["split", "paged", "varlen"])
def test_kernels_of_serving_are_tuned(kind, clock):
    """Timed once for a class of shapes; calls use what was found, in this process and by file."""
    name = "varlen" if kind == "varlen" else "decode_part"
    call, tuner = serving(kind, 1000)
    plain, _ = clock.seen(call)[name]
    found = tuner()
    best = found if kind == "varlen" else found["part"]
    assert (best.block_along, best.stages, best.warps) == (32, 2, 4)
    assert 1 < len(clock.timed) <= 2 * autotune.MOST
    # The best parts are timed once more, with what else may fold them.
    assert len(clock.timed) - len(set(clock.timed)) == (kind != "varlen")
    assert (plain.block_along, plain.stages, plain.warps) != (32, 2, 4)
    count = len(clock.timed)
    autotune.remembered.cache_clear()  # from the disk
    near, again = serving(kind, 1020)
    used, _ = clock.seen(near)[name]
    assert used.with_(**changed(kind, used)) == best.with_(**changed(kind, used))
    assert again() == found
    assert len(clock.timed) == count, "the class of shapes is known"
    serving(kind, 5000)[1]()
    assert len(clock.timed) > 1.5 * count, "another class is not"


def changed(kind, schedule):
    """What a call sets on every schedule it takes."""
    names = ("split", "paged", "varlen", "skipping", "block_rows", "widen", "parts")
    return {n: getattr(schedule, n) for n in names}


@pytest.mark.parametrize("kind", ["split", "paged"])
@pytest.mark.parametrize("wanted", [1, 64, 128])
def test_the_number_of_parts_is_tuned(kind, wanted, clock):
    """Of few numbers, those that fill a GPU; tile sides are tried at the best of them."""
    clock.cost = lambda schedule, splits: abs(splits - wanted) + schedule.stages / 8
    call, tuner = serving(kind, 32768)
    _, default = clock.seen(call)["decode_part"]
    assert default == 64  # 66 parts for 264 programs, each of whole tiles
    best = tuner()["part"]
    assert [parts[1] for parts, _ in clock.timed[:4]] == [64, 32, 128, 256]
    assert best.parts == {1: 33, 64: 0, 128: 132}[wanted]
    for length in (32768, 30000):
        parts, splits = clock.seen(serving(kind, length)[0])["decode_part"]
        assert 0.85 <= splits / (best.parts or 66) <= 1, "parts are whole tiles"
        assert parts.parts == 0, "the source does not depend on it"


def test_many_programs_need_few_parts(clock):
    clock.cost = lambda schedule, splits: splits
    assert serving("split", 4096, batch=300)[1]()["part"].parts <= 1
    assert {parts[1] for parts, _ in clock.timed} == {1, 2}


@pytest.mark.parametrize("kind", ["split", "paged"])
def test_the_kernel_that_joins_the_parts_is_tuned(kind, clock):
    clock.cost = lambda schedule, splits: schedule.warps if schedule.split else 9 - schedule.warps
    call, tuner = serving(kind, 4000)
    assert clock.seen(call)["decode_join"][0] == decode_module.JOIN
    found = tuner()["join"]
    assert (found.warps, found.block_rows) == (8, 16)
    autotune.remembered.cache_clear()
    assert clock.seen(serving(kind, 3000)[0])["decode_join"][0] == found


def test_pages_of_another_size_are_another_class(clock):
    clock.cost = lambda schedule, splits: schedule.warps
    serving("paged", 4096, page=64)[1]()
    count = len(clock.timed)
    serving("paged", 4096, page=64)[1]()
    assert len(clock.timed) == count
    serving("paged", 4096, page=16)[1]()
    assert len(clock.timed) > count


def test_a_schedule_that_no_gpu_holds_is_left_out(clock):
    """Where nothing runs the defaults stay, and nothing is kept."""

    def impossible(schedule, splits):
        raise ToolError("out of resources", stage="triton launch")

    clock.cost = impossible
    found = serving("split", 4096)[1]()
    assert found["join"] == decode_module.JOIN
    assert found["part"].parts == 0
    assert not list(autotune._path("none").parent.glob("*.json"))


# Addresses


def sources():
    """Every class of kernel beside the plain forward one."""
    form = CASES["causal"].form(2)
    back = backward_of(form)
    for part, row, along in (("queries", "q", "kv"), ("keys", "kv", "q")):
        program = program_of(getattr(back, part), row, along)
        yield part, emit(program, choose_schedule(program, LANES, 2, Device()), LANES)
    split = split_form(softmax_cascade(CASES["cached"].form(2), "case"))
    base = Schedule(skipping="bounds")
    yield "split", emit(split.partial, base.with_(split=True), LANES)
    yield "paged", emit(split.partial, base.with_(split=True, paged=True), LANES)
    yield "join", emit(split.joined, Schedule(block_rows=16, block_along=16), {"f": 64})
    (stage,) = stages(str(softmax_cascade(CASES["cached"].form(2), "case")))
    yield "varlen", emit(stage.program, base.with_(varlen=True), LANES)
    yield "packed", emit(stage.program, base.with_(pack=2), LANES)
    (stage,) = stages(str(softmax_cascade(CASES["per head"].form(2), "case")))
    yield "lists", emit(stage.program, Schedule(skipping="lists"), LANES)


def test_every_term_of_an_address_has_64_bits_in_every_class_of_kernel():
    for name, source in sources():
        assert_wide_addresses(name, source)


def test_lists_that_32_bits_cannot_number_are_refused():
    """Places in a list are int32; 2^20 squared in small tiles over many heads are more."""
    guard, schedule = "keep[h, q // 64, kv // 64]", Schedule(skipping="lists")
    table = torch.zeros(1, 1, 1, dtype=torch.bool)
    with pytest.raises(LowerError, match=r"tiles.* 2\^31"):
        torch.ops.attn_rewrite.tile_lists(
            table, [table], guard, to_text(schedule), [1, 64, 1 << 20, 1 << 20], "q"
        )


def test_lists_of_a_long_window_hold_few_tiles():
    """Lists are ragged: their size is that of what runs."""
    guard = parse_expr("(q - kv >= 0) & (q - kv < 128) & ((q - kv) % 2 == 0)")
    schedule = Schedule(block_rows=1024, block_along=1024, skipping="lists")
    found = make_lists(guard, schedule, q_len=1 << 20, kv_len=1 << 20, heads=8, batch=2)
    assert found.kept == 2 * 1024 - 1
    assert found.tiles.shape == (1, 1, 1024, 3)


# Inductor, as far as code: the driver and the processor's properties are stand-ins

INDUCTOR = """
import torch
from contextlib import ExitStack
from types import SimpleNamespace
from unittest import mock
from torch._functorch.aot_autograd import aot_export_module
from torch._inductor.debug import DebugContext
from torch._inductor.fx_passes.post_grad import (
    decompose_auto_functionalized, decompose_triton_kernel_wrapper_functional,
)
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
import attn_rewrite.ops
from attn_rewrite.cascade.attention import softmax_cascade
from tests.interpreted.dense import CASES

class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)
    def get_active_torch_device(self):
        return torch.device("cuda", 0)

text = str(softmax_cascade(CASES["causal"].form(2), "case"))

class Model(torch.nn.Module):
    def forward(self, *x):
        return (torch.ops.attn_rewrite.triton_cascade(list(x), None, text, "", 0.0)[0] * 2.0,)

driver.set_active(Driver())
known = dict(multi_processor_count=132, major=9, warp_size=32,
             max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536)
has, one = (lambda *a, **k: True), SimpleNamespace(minor=0, total_memory=1 << 37, name="", **known)
fake = {
    "torch.cuda.get_device_properties": lambda *a: one, "torch.cuda.current_device": lambda: 0,
    "torch.cuda.get_device_capability": lambda *a: (9, 0),
    "torch._inductor.scheduler.has_triton": has, "torch.utils._triton.has_triton": has,
    "torch._dynamo.device_interface.CudaInterface.raise_if_triton_unavailable": has,
}
with FakeTensorMode(shape_env=ShapeEnv()) as mode, ExitStack() as stack:
    x = [torch.empty(2, h, 512, 64, device="cuda", dtype=torch.bfloat16) for h in (4, 2, 2)]
    module, _ = aot_export_module(Model(), x, trace_joint=False)
    for name, value in fake.items():
        stack.enter_context(mock.patch(name, value))
    properties = DeviceProperties(type="cuda", index=0, cc=90, **known)
    stack.enter_context(mock.patch.object(DeviceProperties, "create", lambda device: properties))
    decompose_triton_kernel_wrapper_functional(module.graph)
    decompose_auto_functionalized(module.graph)
    module.recompile()
    graph = GraphLowering(module, example_inputs=x, shape_env=mode.shape_env)
    with V.set_graph_handler(graph), V.set_fake_mode(mode), V.set_debug_handler(DebugContext()):
        graph.run(*x)
        code = graph.codegen()[0]
print(getattr(code, "value", code))
"""


def test_inductor_writes_code_that_launches_the_kernel():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", INDUCTOR], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    launched = [line for line in done.stdout.splitlines() if "attention_0.run(" in line]
    assert len(launched) == 1
    assert "stream=" in launched[0]
    assert "triton_cascade" not in done.stdout.split("def call", 1)[1]
    assert "RSNV_next" in done.stdout, "the text of the kernel is part of the code"
