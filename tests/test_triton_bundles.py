"""Bundles of compiled kernels whose tiles are left out by lists, loaded as on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("triton")

import attn_rewrite as ar
from attn_rewrite.backends.triton import loader
from attn_rewrite.backends.triton.bundle import export_triton, smaller
from attn_rewrite.backends.triton.schedule import Schedule
from attn_rewrite.chunked import oracle
from attn_rewrite.plan import Plan, Step
from attn_rewrite.policy_text import parse_pipeline
from attn_rewrite.verify import rounding_bound
from tests.command import attn_rewrite

ROOT = Path(__file__).parents[1]
LENGTH = 210  # 2 x 5 x 21 tokens, and no whole number of blocks


class Two(torch.nn.Module):
    """A causal attention, and one over all tokens, with the same operands."""

    def forward(self, q, k, v):
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(q, k, v, is_causal=True, enable_gqa=True), attend(q, k, v, enable_gqa=True)


def operands():
    make = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, h, LENGTH, 16, generator=make) for h in (4, 2, 2))


def make_model():
    return Two().eval(), operands(), {}, None


def plan_of(*pipelines: str) -> Plan:
    """A plan with a table of blocks for each site; a block of queries of one head is left bare."""
    make = np.random.default_rng(0)
    tables = {}
    for number in range(2):
        table = make.random((4, -(-LENGTH // 16), -(-LENGTH // 16))) < 0.4
        table |= np.eye(len(table[0]), dtype=bool)
        tables[f"attention#{number}/t"] = table
    steps = tuple(Step(f"attention#{n}", parse_pipeline(p)) for n, p in enumerate(pipelines))
    return Plan(steps, tables=tables)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTN_REWRITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "compiled"))


def run_bundle(folder: Path, inputs: dict, scratch: Path) -> tuple[dict, list]:
    """Outputs by site, and launches, of the bundle in a process that interprets its sources."""
    save_file({n: t.contiguous() for n, t in inputs.items()}, scratch / "inputs.safetensors")
    command = [sys.executable, "-m", "tests.interpreted.run_bundle", str(folder),
               str(scratch / "inputs.safetensors"), str(scratch / "outputs.safetensors")]  # fmt: skip
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(scratch / "outputs.safetensors"), json.loads(done.stdout)


CASES = {
    "tables, and another order": (
        'blocks(table="t", block=16)',
        'reorder(order="hwf", layout="grid=2x5x21") | blocks(table="t", block=16)',
    ),
    "closed form": ("longlora(size=64)", 'clear(radius=3, layout="grid=10x21")'),
}


@pytest.mark.parametrize(
    "name", [pytest.param("tables, and another order", marks=pytest.mark.slow), "closed form"]
)
def test_a_bundle_runs_with_its_own_lists(name, tmp_path):
    """Compiled for a GPU; the loader's launches, interpreted, give what the model gives."""
    model, x, _, _ = make_model()
    found = ar.optimize(model, "exact", x, plan=plan_of(*CASES[name]))
    assert len(found.sites) == 2
    artifact = export_triton(found, tmp_path / "bundle", target="cuda:90")
    assert not artifact.refusals, artifact.refusals
    assert set(artifact.tables) == {"attention#0", "attention#1"}
    for file in artifact.tables.values():
        assert "0/tiles" in load_file(tmp_path / "bundle" / file)
    outputs, launches = run_bundle(tmp_path / "bundle", dict(zip("QKV", x, strict=True)), tmp_path)
    assert len(launches) == 2
    for number, wanted in enumerate(found(*x)):
        mine = outputs[f"attention#{number}"]
        assert (mine - wanted).abs().max() <= 4e-6 * wanted.abs().max()
        assert (mine - model(*x)[number]).abs().max() > 1e-2, "the lists leave something out"


@pytest.mark.parametrize(
    ("policy", "makes"),
    [
        ("int8", {"QI", "KI", "QS", "KS", "KM64"}),
        pytest.param("int8(pv=true, smooth_v=true)", {"QI", "KI", "VI", "VS", "VS64"}, marks=pytest.mark.slow),
        pytest.param("int4(pv=true, granularity='block', smooth_q=false)", {"QI", "KI", "VI"}, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_bundle_makes_its_own_codes(policy, makes, tmp_path):
    """Source, binary, metadata, resources and loader: operands go in, the attention comes out."""
    model, x, _, _ = make_model()
    found = ar.optimize(model, policy, x)
    artifact = export_triton(found, tmp_path / "bundle", target="cuda:90")
    assert not artifact.refusals
    assert not artifact.notes
    index = json.loads((tmp_path / "bundle" / "kernels.json").read_text())
    metas = {}
    for name in index["codes"]["attention#0"]:
        metas[name] = json.loads((tmp_path / "bundle" / f"{name}.json").read_text())
        assert {p.suffix for p in (tmp_path / "bundle").glob(f"{name}.*")} == {
            ".py", ".json", ".ptx", ".cubin",
        }  # fmt: skip
    assert makes <= set().union(*(m["makes"] for m in metas.values()))
    reports = {k["name"]: k["resources"] for k in index["kernels"]}
    assert all(reports[n]["spilled"] == 0 and reports[n]["registers"] for n in metas)
    outputs, launches = run_bundle(tmp_path / "bundle", dict(zip("QKV", x, strict=True)), tmp_path)
    assert len(launches) == 2 * (1 + len(metas))
    (scheme,) = parse_pipeline(policy)
    inputs = dict(zip("QKV", x, strict=True))
    for number, site in enumerate(found.sites):
        mine = outputs[f"attention#{number}"]
        cascade = scheme.apply(site.cascade, site)
        wanted = oracle(cascade, inputs)
        error = float((mine - wanted).abs().max())
        allowed = 4 * torch.finfo(torch.float32).eps * float(wanted.abs().max())
        # A probability may round the other way in float32 where it is that close to a tie.
        assert error <= rounding_bound(cascade, inputs, wanted, allowed, error)
        assert (mine - model(*x)[number]).abs().max() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cuda:80", "cuda:100", "hip:gfx942"])
def test_quantising_kernels_of_other_targets(target, tmp_path):
    model, x, _, _ = make_model()
    found = ar.optimize(model, "int4(pv=true, granularity='block', smooth_q=false)", x)
    artifact = export_triton(found, tmp_path, target=target)
    assert [len(artifact.codes[s]) for s in artifact.sites] == [5, 5]
    assert all(k["resources"]["spilled"] == 0 for k in artifact.kernels)


def test_what_no_kernel_of_a_bundle_makes_is_said(tmp_path):
    model, x, _, _ = make_model()
    artifact = export_triton(ar.optimize(model, "int8(rotate=true)", x), tmp_path, target="cuda:90")
    assert artifact.codes["attention#0"] == ()
    assert "the caller computes them" in artifact.notes["attention#0"]
    assert "KI" in artifact.notes["attention#0"]


@pytest.mark.slow
def test_the_command_exports_a_plan_of_block_lists(tmp_path):
    model, x, _, _ = make_model()
    plan = plan_of('blocks(table="t", block=16)', "keep")
    found = ar.optimize(model, "exact", x, plan=plan)
    ar.save(found, tmp_path / "saved")
    out = tmp_path / "out"
    done = attn_rewrite(
        "optimize", "tests.test_triton_bundles:make_model", "--plan",
        str(tmp_path / "saved" / "plan.json"), "-o", str(out), "--export", "triton:cuda:90", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err[-2000:]
    (export,) = done.document["exports"]
    folder = out / export["file"]
    assert list(export["tables"]) == ["attention#0"]
    assert (folder / export["tables"]["attention#0"]).is_file()
    outputs, _ = run_bundle(folder, dict(zip("QKV", x, strict=True)), tmp_path)
    wanted = found(*x)[0]
    assert (outputs["attention#0"] - wanted).abs().max() <= 4e-6 * wanted.abs().max()


def test_a_length_that_is_not_fixed_has_no_list_and_says_so(tmp_path):
    model, x, _, _ = make_model()
    length = torch.export.Dim("length", min=2, max=4096)
    policy = "longlora(size=64)"
    found = ar.optimize(model, policy, x, dynamic_shapes=({2: length},) * 3)
    artifact = export_triton(found, tmp_path / "bundle", target="cuda:90")
    index = json.loads((tmp_path / "bundle" / "kernels.json").read_text())
    for site, names in artifact.sites.items():
        meta = json.loads((tmp_path / "bundle" / f"{names[0]}.json").read_text())
        assert meta["tile_lists"] is None
        if meta["schedule"]["skipping"] == "none":
            assert "every tile runs" in index["notes"][site]


def test_smaller_tiles_hold_whole_positions_of_packed_heads():
    default = Schedule(block_rows=128, block_along=64, warps=8, skipping="lists", pack=32)
    found = list(smaller(default))
    assert len(found) > 2
    assert all(s.block_rows % 32 == 0 for s in found)


def test_the_loader_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(
        loader.ctypes,
        "CDLL",
        lambda name: type("Driver", (), {"__getattr__": lambda s, n: lambda *a: 0})(),
    )
    meta = {
        "kernel": "k", "function": "attention", "threads": 32, "shared_bytes": 0, "unit_strides": [],
        "trailing_null_pointers": 2,
        "arguments": [{"name": n, "type": "i32", "multiple_of": 1, "kind": "extent"} for n in ("n_q", "n_kv")],
    }  # fmt: skip
    (tmp_path / "k.json").write_text(json.dumps(meta))
    (tmp_path / "k.cubin").write_bytes(b"code")
    (tmp_path / "kernels.json").write_text(json.dumps({"target": "cuda:90", "sites": {"a": ["k"]}}))
    (kernel,) = loader.Bundle(tmp_path).of_site("a")
    with pytest.raises(ValueError, match="k needs n_kv"):
        kernel((1, 1, 1), n_q=3)
