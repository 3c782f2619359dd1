"""Compiled kernels on a GPU against dense float64 attention: every class of kernel, and opcheck."""

from __future__ import annotations

import pytest
import torch

import attn_rewrite.ops  # noqa: F401
from attn_rewrite.backends.triton.decode import Pages, decode
from attn_rewrite.backends.triton.lower import lower
from attn_rewrite.backends.triton.varlen import Sequences, attend_varlen
from attn_rewrite.cascade.attention import softmax_cascade
from attn_rewrite.cascade.expr import KV, Extent, Q
from attn_rewrite.graph import EagerBuilder
from tests.interpreted.dense import CASES, Case, bound, inputs_for, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA or AMD GPU"),
]
SIZES = {"b": 2, "h": 4, "group": 2, "q": 301, "kv": 301, "d": 64, "f": 64}
CACHED = Case(Q + Extent("kv") - Extent("q") >= KV, CASES["cached"].mask)


def on_gpu(x):
    return {n: t.cuda() for n, t in x.items()}


def check(found, case, x, index=0):
    wanted = reference(case, x, torch.float64)[index]
    plain = reference(case, x, x["Q"].dtype)[index]
    finite = wanted.isfinite()
    error = (found.double().cpu() - wanted)[finite].abs().max().item()
    assert error <= bound(wanted, plain, x["Q"].dtype)


def made(case, group=2, dropout=0.0):
    """A function of the inputs, in order: what compilers see of an attention."""
    kernel = lower(softmax_cascade(case.form(group), "case"), dropout=dropout)
    return lambda *inputs: kernel.emit(EagerBuilder(), list(inputs))


def run(case, x, dropout=0.0):
    return made(case, x["Q"].shape[1] // x["K"].shape[1], dropout)(*x.values())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_attention(name, dtype):
    x = inputs_for(CASES[name], SIZES, dtype, 1)
    check(run(CASES[name], on_gpu(x)), CASES[name], x)


@pytest.mark.parametrize("d", [16, 40, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("name", ["dense", "causal"])
def test_head_dimensions(name, d):
    x = inputs_for(CASES[name], SIZES | {"d": d, "f": d}, torch.bfloat16, 2)
    check(run(CASES[name], on_gpu(x)), CASES[name], x)


@pytest.mark.parametrize("q", [1, 2, 127, 128, 129, 1000])
@pytest.mark.parametrize("kv", [1, 63, 64, 65, 1000])
def test_lengths(q, kv):
    x = inputs_for(CASES["cached"], SIZES | {"q": q, "kv": kv}, torch.float16, 3)
    check(run(CASES["cached"], on_gpu(x)), CASES["cached"], x)


@pytest.mark.parametrize(
    "name", ["dense", "causal", "window", "late", "bias", "soft cap", "sink logit"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients(name, dtype):
    case = CASES[name]
    x = inputs_for(case, SIZES, dtype, 4)
    pull = torch.randn(2, 4, 301, 64)
    results = []
    for kind, device in ((dtype, "cuda"), (torch.float64, "cpu"), (dtype, "cpu")):
        mine = {n: t.to(device, kind if t.is_floating_point() else t.dtype) for n, t in x.items()}
        asked = [t.requires_grad_() for t in mine.values() if t.is_floating_point()]
        out = run(case, mine) if device == "cuda" else reference(case, mine, kind)[0]
        results.append(torch.autograd.grad(out, asked, pull.to(device, out.dtype)))
    for got, want, low in zip(*results, strict=True):
        assert (got.double().cpu() - want).abs().max() <= 2 * bound(want, low, dtype)


@pytest.mark.parametrize("splits", [None, 1, 7])
def test_decoding(splits):
    x = inputs_for(CACHED, SIZES | {"q": 1, "kv": 4097}, torch.bfloat16, 5)
    found = decode(softmax_cascade(CACHED.form(2), "case"), on_gpu(x), splits=splits)
    check(found["AV"], CACHED, x)


@pytest.mark.parametrize("length", [1, 64, 1000])
def test_decoding_from_pages(length):
    page = 64
    x = inputs_for(CACHED, SIZES | {"b": 1, "q": 1, "kv": length}, torch.bfloat16, 6)
    table = torch.randperm(32)[:16].to(torch.int32)[None]
    cache = {n: torch.zeros(32, 2, page, 64, dtype=torch.bfloat16) for n in "KV"}
    for n, t in cache.items():
        padded = torch.nn.functional.pad(x[n][0], (0, 0, 0, 16 * page - length))
        t[table[0].long()] = padded.view(2, 16, page, 64).transpose(0, 1)
    pages = Pages(table.cuda(), torch.tensor([length], dtype=torch.int32, device="cuda"))
    found = decode(softmax_cascade(CACHED.form(2), "case"), on_gpu({**x, **cache}), pages=pages)
    check(found["AV"], CACHED, x)


def test_sequences_end_to_end():
    lens = [100, 1, 257]
    starts = torch.tensor([0, *torch.tensor(lens).cumsum(0)], dtype=torch.int32)
    x = inputs_for(CACHED, SIZES | {"b": 1, "q": sum(lens), "kv": sum(lens)}, torch.bfloat16, 7)
    found = attend_varlen(
        softmax_cascade(CACHED.form(2), "case"), on_gpu({n: t[0] for n, t in x.items()}),
        Sequences(starts.cuda(), starts.cuda(), max(lens), max(lens)),
    )  # fmt: skip
    for i in range(len(lens)):
        part = slice(int(starts[i]), int(starts[i + 1]))
        check(found["AV"][None, :, part], CACHED, {n: t[:, :, part] for n, t in x.items()})


@pytest.mark.parametrize("name", ["causal", "per head", "bias"])
def test_opcheck(name):
    x = on_gpu(inputs_for(CASES[name], SIZES, torch.float32, 8))
    inputs = [t.requires_grad_() if t.is_floating_point() else t for t in x.values()]
    text = str(softmax_cascade(CASES[name].form(2), "case"))
    torch.library.opcheck(
        torch.ops.attn_rewrite.triton_cascade.default, (inputs, None, text, "", 0.0)
    )


@pytest.mark.parametrize("name", ["causal", "per head"])
def test_torch_compile_gives_the_same(name):
    x = list(on_gpu(inputs_for(CASES[name], SIZES, torch.bfloat16, 9)).values())
    attend = made(CASES[name])
    found = torch.compile(attend, fullgraph=True)(*x)
    assert torch.equal(found, attend(*x))


class Attends(torch.nn.Module):
    """A case as a module: what export takes."""

    def __init__(self, name):
        super().__init__()
        self.name = name

    def forward(self, x):
        return run(CASES[self.name], x)


@pytest.mark.parametrize("name", ["causal", "bias"])
def test_an_exported_program_gives_the_same(name):
    x = on_gpu(inputs_for(CASES[name], SIZES, torch.bfloat16, 16))
    program = torch.export.export(Attends(name), (x,))
    assert any("attn_rewrite" in str(n.target) for n in program.graph.nodes)
    assert torch.equal(program.module()(x), run(CASES[name], x))


@pytest.mark.parametrize("name", ["causal", "bias"])
def test_aot_inductor_gives_the_same(name, tmp_path):
    """A package that holds the kernels and runs without Python's graph."""
    x = on_gpu(inputs_for(CASES[name], SIZES, torch.bfloat16, 17))
    program = torch.export.export(Attends(name), (x,))
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "attention.pt2")
    )
    found = torch._inductor.aoti_load_package(package)(x)
    assert torch.equal(found, run(CASES[name], x))


def test_no_compilation_for_another_length(monkeypatch):
    """One source, and one binary of it, whatever the length."""
    from attn_rewrite.backends.triton import launch

    used = set()
    kernel_of = launch.kernel_of
    monkeypatch.setattr(launch, "kernel_of", lambda s: used.add(kernel_of(s)) or kernel_of(s))
    counts = []
    for length in (512, 513, 640, 1000, 4096):
        sizes = SIZES | {"q": length, "kv": length}
        run(CASES["causal"], on_gpu(inputs_for(CASES["causal"], sizes, torch.bfloat16, 1)))
        (kernel,) = used
        # Other types and tiles of the same source may have run before this test.
        counts.append(sum(len(cache[0]) for cache in kernel.device_caches.values()))
    assert counts[0] > 0
    assert set(counts) == {counts[0]}


@pytest.mark.parametrize("name", ["clipped-softmax", "softmax-over-queries", "attention-weights"])
def test_cascades_of_more_than_one_pass(name):
    from attn_rewrite.cascade import NAMED, interpret

    cascade = NAMED[name]
    make = torch.Generator().manual_seed(11)
    sizes = {"p": 150, "m": 170, "e": 40, "f": 64}
    x = {t.name: torch.randn([sizes[r] for r in t.ranks], generator=make) for t in cascade.inputs}
    x |= {n: t.abs() + 1.0 for n, t in x.items() if not t.ndim}
    there = [t.cuda() for t in x.values()]
    found = torch.ops.attn_rewrite.triton_cascade(there, None, str(cascade), "", 0.0)
    for got, (output, wanted) in zip(found, interpret(cascade, x).items(), strict=False):
        assert (got.double().cpu() - wanted).abs().max() <= 1e-5 * wanted.abs().max(), output


@pytest.mark.parametrize("sizes", [(192, 128), (72, 72), (24, 56), (160, 256)])
def test_keys_and_values_of_different_width(sizes):
    d, f = sizes
    x = inputs_for(CASES["window"], SIZES | {"d": d, "f": f}, torch.bfloat16, 12)
    check(run(CASES["window"], on_gpu(x)), CASES["window"], x)


def test_tf32_where_torch_is_set_to_it():
    x = inputs_for(CASES["causal"], SIZES, torch.float32, 13)
    exact = run(CASES["causal"], on_gpu(x))
    torch.set_float32_matmul_precision("high")
    try:
        loose = run(CASES["causal"], on_gpu(x))
    finally:
        torch.set_float32_matmul_precision("highest")
    check(exact, CASES["causal"], x)
    assert (exact - loose).abs().max() <= 2**-8 * exact.abs().max()


@pytest.mark.parametrize("name", ["causal", "bias"])
def test_torch_compile_trains(name):
    x = on_gpu(inputs_for(CASES[name], SIZES, torch.float32, 14))
    pull = torch.randn(2, 4, 301, 64, device="cuda")
    results = []
    attend = made(CASES[name])
    for call in (attend, torch.compile(attend, fullgraph=True)):
        mine = [t.clone().requires_grad_() for t in x.values()]
        results.append(torch.autograd.grad(call(*mine), mine, pull))
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_operands_on_another_device_than_the_current_one():
    x = inputs_for(CASES["causal"], SIZES, torch.bfloat16, 15)
    found = run(CASES["causal"], {n: t.to("cuda:1") for n, t in x.items()})
    assert found.device == torch.device("cuda:1")
    check(found, CASES["causal"], x)


def test_dropout_drops_its_share_and_keeps_the_mean():
    x = on_gpu(inputs_for(CASES["dense"], SIZES, torch.float32, 10))
    x["V"] = torch.ones_like(x["V"])
    out = run(CASES["dense"], x, dropout=0.25)
    assert abs(out.mean().item() - 1.0) < 0.02
    assert out.std() > 0.001


@pytest.mark.parametrize("name", ["causal", "bias"])
def test_tuned_kernels_compute_the_same(name, tmp_path, monkeypatch):
    from attn_rewrite.backends.triton import autotune
    from attn_rewrite.backends.triton.tune import tune, tune_backward

    monkeypatch.setenv("ATTN_REWRITE_CACHE", str(tmp_path))
    autotune.remembered.cache_clear()
    x = inputs_for(CASES[name], SIZES, torch.float32, 16)
    pull = torch.randn(2, 4, 301, 64, device="cuda")

    def gradients():
        mine = {n: t.clone().requires_grad_() for n, t in on_gpu(x).items()}
        return torch.autograd.grad(run(CASES[name], mine), list(mine.values()), pull)

    plain = gradients()
    cascade = softmax_cascade(CASES[name].form(2), "case")
    tune(cascade, on_gpu(x))
    wanted = [n for n in x if n not in "QKV"]
    assert set(tune_backward(cascade, on_gpu(x), wanted)) >= {"queries", "keys"}
    check(run(CASES[name], on_gpu(x)), CASES[name], x)
    for a, b in zip(gradients(), plain, strict=True):
        assert torch.allclose(a, b, atol=1e-4, rtol=1e-3)


def test_tuned_decoding_computes_the_same(tmp_path, monkeypatch):
    from attn_rewrite.backends.triton import autotune
    from attn_rewrite.backends.triton.tune import tune_decode

    monkeypatch.setenv("ATTN_REWRITE_CACHE", str(tmp_path))
    autotune.remembered.cache_clear()
    x = inputs_for(CACHED, SIZES | {"q": 1, "kv": 4097}, torch.bfloat16, 18)
    cascade = softmax_cascade(CACHED.form(2), "case")
    best = tune_decode(cascade, on_gpu(x))
    assert set(best) == {"part", "join"}
    assert tune_decode(cascade, on_gpu(x)) == best
    check(decode(cascade, on_gpu(x))["AV"], CACHED, x)


def test_the_loader_of_a_bundle_launches_on_this_gpu(tmp_path):
    """A binary compiled ahead of time for this processor, with nothing but its files."""
    import json

    from attn_rewrite.backends.triton.aot import TARGETS, compile_source, parse_target
    from attn_rewrite.backends.triton.choose import choose_schedule
    from attn_rewrite.backends.triton.emit import emit
    from attn_rewrite.backends.triton.launch import Call, arguments, extents_of
    from attn_rewrite.backends.triton.loader import Bundle
    from attn_rewrite.backends.triton.prepare import stages

    major, minor = torch.cuda.get_device_capability()
    target = f"cuda:{major}{minor}"
    if torch.version.hip or target not in TARGETS:
        pytest.skip(f"no bundle is made for {target}")
    case, lanes = CASES["causal"], {"d": 64, "f": 64}
    (stage,) = stages(str(softmax_cascade(case.form(2), "case")))
    schedule = choose_schedule(stage.program, lanes, 2, parse_target(target))
    source = emit(stage.program, schedule, lanes)
    binary = compile_source(source, target, "bfloat16", lanes)
    (tmp_path / "k.cubin").write_bytes(binary.files["cubin"])
    (tmp_path / "k.json").write_text(json.dumps({"kernel": "k", **binary.metadata}))
    (tmp_path / "kernels.json").write_text(json.dumps({"target": target, "sites": {"a": ["k"]}}))
    x = inputs_for(case, SIZES, torch.bfloat16, 17)
    there = on_gpu({n: t.contiguous() for n, t in x.items()})
    outputs = {
        "AV": torch.empty_like(there["Q"]), "LSE": torch.empty(2, 4, 301, device="cuda"),
    }  # fmt: skip
    ranks = {t.name: t.ranks for t in source.program.cascade.inputs}
    ranks |= {o.name: o.ranks for o in source.outputs}
    sizes = extents_of(source, there)
    given = arguments(source, Call({**there, **outputs}, ranks, sizes))
    (kernel,) = Bundle(tmp_path).of_site("a")
    names = [a["name"] for a in kernel.meta["arguments"]]
    values = {n: v.data_ptr() if isinstance(v, torch.Tensor) else v for n, v in given.items()}
    kernel(
        kernel.grid(b=2, h=4, q=301), torch.cuda.current_stream().cuda_stream,
        **{n: values[n] for n in names},
    )  # fmt: skip
    torch.cuda.synchronize()
    check(outputs["AV"], case, x)
