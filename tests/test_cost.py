"""Targets, and the cost of cascades on them: known counts written out by hand, and laws."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import attn_rewrite.target as target_module
from attn_rewrite import knobs
from attn_rewrite.cascade.attention import SoftmaxAttention, softmax_cascade
from attn_rewrite.cascade.cost import complete_extents, site_cost
from attn_rewrite.cascade.expr import KV, Q
from attn_rewrite.cascade.named import NAMED
from attn_rewrite.errors import PolicyError
from attn_rewrite.passes.cascade import Fusion, fuse_reductions
from attn_rewrite.simulate.designs import DESIGNS
from attn_rewrite.simulate.fusemax import evaluate
from attn_rewrite.simulate.workload import MODELS, at_length
from attn_rewrite.target import TARGETS, Target, dtype_name, for_device, target, this_cpu

H100 = TARGETS["h100"]
# A machine on which nothing fits on the chip, and one on which everything does.
TINY = Target("tiny", "cpu", (("f32", 1e9),), 1e9, 1, 1, "made up")
ROOMY = replace(TINY, name="roomy", on_chip=10**12)
SHAPE = {"q": 96, "kv": 160, "e": 16, "f": 24}


def cost(name: str, on: Target = TINY, shape: dict[str, int] | None = None, **options):
    return site_cost(NAMED[name], shape or SHAPE, on, dtype="float32", **options)


# --- known counts ---------------------------------------------------------------------------------


def test_three_passes_as_written():
    q, kv, e, f = SHAPE.values()
    found = cost("attention-3pass")
    assert found.passes == 3
    assert found.live == ("QK", "SN")
    assert found.live_bytes == 2 * kv * 4
    assert found.matrix_flops == 2 * q * kv * (e + f)
    # max, exp with its subtraction, sum, divide: one operation each per score
    assert found.flops - found.matrix_flops == 4 * q * kv
    # QK, GM, SN, SD, A, AV: what each reads and writes on its own
    scores, row = q * kv, q
    elements = (
        (q * e + kv * e + scores)
        + (scores + row)
        + (scores + row + scores)
        + (scores + row)
        + (scores + row + scores)
        + (scores + kv * f + q * f)
    )
    assert found.unfused_bytes == 4 * elements


def test_one_pass_fused_moves_inputs_and_output_once():
    q, kv, e, f = SHAPE.values()
    found = cost("attention-1pass")
    assert (found.passes, found.live, found.live_bytes, found.kept) == (1, (), 0, "nothing")
    assert found.dram_bytes == 4 * (q * e + kv * e + kv * f + q * f)


def test_deferral_saves_the_divisions():
    q, kv, _, f = SHAPE.values()
    plain, deferred = cost("attention-3pass"), cost("attention-3pass-deferred")
    assert (plain.passes, deferred.passes) == (3, 2)
    assert plain.flops - deferred.flops == q * kv - q * f


def test_corrections_of_the_one_pass_form():
    q, kv, _, f = SHAPE.values()
    tiles = math.ceil(kv / 32)
    shape = {**SHAPE, "m0": 32}
    one = cost("attention-1pass", shape=shape)
    deferred = cost("attention-3pass-deferred")
    # max, exp, two adds and one multiply per tile and row, one multiply and add per output value
    assert one.flops - deferred.flops == tiles * q * (4 + 2 * f)


def test_spilling_writes_once_and_reads_once_per_later_pass():
    q, kv, e, f = SHAPE.values()
    # A processor so slow that recomputing never pays.
    slow = replace(TINY, flops=(("f32", 1.0),), bandwidth=1e12)
    found = site_cost(NAMED["attention-3pass"], SHAPE, slow, dtype="f32")
    boundary = q * e + kv * e + kv * f + q * f
    # QK: written in pass 1 and read in 2; SN: written in 2 and read in 3
    assert found.kept == "spilled"
    assert found.dram_bytes == 4 * (boundary + 4 * q * kv)


def test_recomputing_reads_the_keys_again_and_multiplies_again():
    q, kv, e, f = SHAPE.values()
    starved = replace(TINY, flops=(("f32", 1e15),), bandwidth=1.0)
    found = site_cost(NAMED["attention-3pass"], SHAPE, starved, dtype="f32")
    assert found.kept == "recomputed"
    # Q and K serve QK in all three passes; V is read in the last one only
    assert found.dram_bytes == 4 * (q * e + 3 * kv * e + kv * f + q * f)
    # QK twice more (products), SN once more (an exponential counts six)
    weighted = q * kv * (1 + 6 + 1 + 1 + 6)
    assert found.arithmetic_s == pytest.approx((2 * q * kv * (3 * e + f) + weighted) / 1e15)


def test_a_large_cache_keeps_the_rows():
    found = site_cost(NAMED["attention-3pass"], SHAPE, ROOMY, dtype="f32")
    assert found.kept == "on chip"
    one = site_cost(NAMED["attention-1pass"], SHAPE, ROOMY, dtype="f32")
    assert found.dram_bytes == one.dram_bytes


def test_fewer_passes_are_not_always_cheaper():
    """The model decides, not the pass count: corrections cost, and rows may fit on the chip."""
    shape = {"q": 64, "kv": 64, "e": 64, "f": 64, "m0": 8}
    one = site_cost(NAMED["attention-1pass"], shape, ROOMY, dtype="f32")
    two = site_cost(NAMED["attention-3pass-deferred"], shape, ROOMY, dtype="f32")
    assert one.passes < two.passes
    assert one.time_s > two.time_s
    # And FuseMax's own step: the one-pass cascade on FLAT's arrays, 0.91 of FLAT's speed.
    w = at_length(MODELS["bert"], 65536)
    speedup = evaluate(w, DESIGNS["flat"]).latency_s / evaluate(w, DESIGNS["cascade"]).latency_s
    assert 0.85 < speedup < 0.91


def test_views_of_a_partition_are_free():
    named = {n: cost(n) for n in ("attention-2pass", "attention-2pass-deferred")}
    assert all(c.live == ("SLN",) for c in named.values())
    assert named["attention-2pass"].passes == 2


def test_quantised_products_run_at_the_integer_ceiling():
    shape = {"q": 512, "kv": 512, "e": 4096, "f": 8}
    plain = site_cost(NAMED["attention-3pass"], shape, ROOMY, dtype="f32")
    fast = replace(ROOMY, flops=(("f32", 1e9), ("i8", 4e9)))
    quantised = site_cost(NAMED["quantised-qkv"], shape, fast, dtype="f32")
    unaided = site_cost(NAMED["quantised-qkv"], shape, ROOMY, dtype="f32")
    products = 2 * 512 * 512 * 4096 / 1e9
    assert unaided.arithmetic_s - quantised.arithmetic_s == pytest.approx(0.75 * products)
    assert quantised.dram_bytes < plain.dram_bytes


def test_units_of_their_own_overlap_with_products():
    shared = site_cost(NAMED["attention-3pass"], SHAPE, ROOMY, dtype="f32")
    beside = site_cost(
        NAMED["attention-3pass"], SHAPE, replace(ROOMY, vector_flops=1e9), dtype="f32"
    )
    q, kv, e, f = SHAPE.values()
    products, elementwise = 2 * q * kv * (e + f) / 1e9, q * kv * 9 / 1e9
    assert shared.arithmetic_s == pytest.approx(products + elementwise)
    assert beside.arithmetic_s == pytest.approx(max(products, elementwise))


# --- sites ----------------------------------------------------------------------------------------

SITE = {"b": 2, "h": 8, "q": 100, "kv": 300, "d": 32, "f": 48}


def test_a_site_with_shared_key_heads():
    b, h, q, kv, d, f = SITE.values()
    found = site_cost(softmax_cascade(SoftmaxAttention(group=4)), SITE, ROOMY, dtype="f32")
    assert found.matrix_flops == 2 * b * h * q * kv * (d + f)
    elements = b * h * q * (d + f) + b * (h // 4) * kv * (d + f)
    assert found.dram_bytes == 4 * elements
    assert found.live_bytes == 2 * kv * 4


def test_tiles_that_are_skipped_cost_nothing():
    cascade = softmax_cascade(SoftmaxAttention(guard=Q - KV >= 0))
    full, half, none = (
        site_cost(cascade, SITE, ROOMY, dtype="f32", tile_fraction=t) for t in (1.0, 0.5, 0.0)
    )
    assert half.flops == full.flops / 2
    assert none.flops == 0
    # Inputs and output move whatever is skipped; scores do not.
    assert half.dram_bytes == full.dram_bytes == none.dram_bytes
    pairs = full.unfused_bytes - none.unfused_bytes
    assert full.unfused_bytes - half.unfused_bytes == pairs / 2
    assert half.live_bytes == full.live_bytes


def test_half_precision_moves_half_the_bytes():
    cascade = softmax_cascade(SoftmaxAttention())
    wide = site_cost(cascade, SITE, H100, dtype="float32")
    narrow = site_cost(cascade, SITE, H100, dtype="torch.bfloat16")
    assert narrow.dram_bytes == wide.dram_bytes / 2
    assert narrow.unfused_bytes == wide.unfused_bytes / 2
    assert narrow.dtype == "bf16"


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.integers(1, 200),
    st.floats(0, 1),
    st.sampled_from(sorted(TARGETS)),
)
def test_laws_of_every_cost(q, kv, d, fraction, on):
    shape = {**SITE, "q": q, "kv": kv, "d": d}
    cascade = softmax_cascade(SoftmaxAttention())
    found = site_cost(cascade, shape, TARGETS[on], dtype="bf16", tile_fraction=fraction)
    whole = site_cost(cascade, shape, TARGETS[on], dtype="bf16")
    assert found.flops == pytest.approx(fraction * whole.flops)
    assert found.time_s == max(found.arithmetic_s, found.memory_s) > 0
    assert found.time_s <= whole.time_s * (1 + 1e-9)
    # Fusing never moves more than running every Einsum alone.
    assert whole.dram_bytes <= whole.unfused_bytes
    assert json.loads(json.dumps(found.to_json()))["bound"] in ("arithmetic", "memory")
    twice = site_cost(cascade, {**shape, "b": 4}, TARGETS[on], dtype="bf16")
    assert twice.flops == pytest.approx(2 * whole.flops)


@pytest.mark.parametrize(
    "name", ["attention-1pass", "linear-attention", "linear-attention-causal", "differential"]
)
def test_named_cascades_have_a_cost(name):
    found = cost(name, H100)
    assert found.time_s > 0
    assert found.unfused_s >= found.time_s * (1 - 1e-9)


def test_extents_are_completed():
    cascade = NAMED["attention-1pass"]
    found = complete_extents(cascade, {"q": 7, "kv": 300, "e": 4, "f": 4})
    assert (found["p"], found["m"], found["m0"], found["m1"]) == (7, 300, 128, 3)
    found = complete_extents(cascade, {"p": 7, "m": 300, "e": 4, "f": 4, "m1": 4, "b": 9})
    assert (found["m0"], found["m1"]) == (75, 4)
    assert "b" not in found
    grouped = complete_extents(softmax_cascade(SoftmaxAttention(group=3)), {**SITE, "h": 12})
    assert grouped["hkv"] == 4


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"kv": 0}, {}, "rank m is 0"),
        ({"q": -3}, {}, "rank p is -3"),
        ({"e": None}, {}, "rank e is missing"),
        ({}, {"tile_fraction": 1.5}, "1.5 is not a share of tiles"),
        ({}, {"tile_fraction": math.nan}, "nan is not a share of tiles"),
        ({}, {"dtype": "bfloat16"}, "tiny does not multiply bf16"),
        ({}, {"dtype": "complex64"}, "dtype complex64 has no arithmetic ceiling"),
    ],
)
def test_what_cannot_be_priced_is_refused(change, options, message):
    shape = {k: v for k, v in {**SHAPE, **change}.items() if v is not None}
    with pytest.raises(PolicyError, match=message):
        site_cost(NAMED["attention-3pass"], shape, TINY, **{"dtype": "f32", **options})


def test_an_unknown_rank_is_refused():
    with pytest.raises(ValueError, match="no rank 'keys'"):
        cost("attention-3pass", rank="keys")


# --- targets --------------------------------------------------------------------------------------


def test_data_sheets_are_dense_and_say_their_source():
    assert set(TARGETS) == {"a100", "h100", "h200", "b200"}
    for known in TARGETS.values():
        assert "NVIDIA" in known.source
        assert known.device == "cuda"
        # Dense ratios: half the width, twice the rate; sparsity would double bf16 over tf32 twice.
        assert known.peak("bf16") == pytest.approx(2 * known.peak("tf32"), rel=0.03)
        if "f8" in dict(known.flops):
            assert known.peak("f8") == pytest.approx(2 * known.peak("bf16"), rel=0.01)
    assert H100.peak("bfloat16") == 989.4e12
    assert (H100.bandwidth, TARGETS["h200"].bandwidth) == (3.35e12, 4.8e12)
    assert TARGETS["h200"].flops == H100.flops


def test_targets_round_trip_through_json():
    for known in TARGETS.values():
        assert Target.from_json(json.loads(json.dumps(known.to_json()))) == known


@pytest.mark.parametrize(
    "values", [{}, {"flops": []}, {"flops": {"f32": 1}}, {**TINY.to_json(), "bandwidth": 0}]
)
def test_a_broken_target_is_refused(values):
    with pytest.raises(PolicyError, match="not a target"):
        Target.from_json(values)


def test_names_of_targets_and_devices():
    assert target("H100") is H100
    with pytest.raises(PolicyError, match="no target is called 'v100'; choose from cpu, a100"):
        target("v100")
    with pytest.raises(PolicyError, match="device mps has no target"):
        for_device("mps")
    with pytest.raises(PolicyError, match="a100 does not multiply f8"):
        TARGETS["a100"].peak("float8_e4m3fn")
    assert dtype_name("torch.float16") == "f16"


@pytest.fixture
def counted(monkeypatch):
    """Count measurements, each a made-up CPU: timing itself is tested once."""
    calls: list[str] = []

    def measure(key: str) -> Target:
        calls.append(key)
        return Target("cpu", "cpu", (("f32", 1e11), ("bf16", 2e11)), 3e10, 2**25, 2, key)

    monkeypatch.setattr(target_module, "_measure", measure)
    return calls


def test_the_cpu_is_measured_once(counted, tmp_path):
    first = this_cpu(cache_dir=tmp_path)
    assert this_cpu(cache_dir=tmp_path) == first == for_device("cpu", cache_dir=tmp_path)
    assert len(counted) == 1
    (file,) = tmp_path.iterdir()
    assert file.name == "targets.json"


def test_the_cache_can_be_relocated(counted, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv(knobs.CACHE, raising=False)
    this_cpu()
    assert (tmp_path / "xdg/attn-rewrite/targets.json").is_file()
    monkeypatch.setenv(knobs.CACHE, str(tmp_path / "mine"))
    this_cpu()
    assert (tmp_path / "mine/targets.json").is_file()


@pytest.mark.parametrize("text", ["", "[1, 2]", '{"x": 3}', "\x00", '{"x": {"flops": {}}}'])
def test_a_broken_cache_is_measured_anew(counted, tmp_path, text):
    (tmp_path / "targets.json").write_text(text)
    this_cpu(cache_dir=tmp_path)
    this_cpu(cache_dir=tmp_path)
    assert len(counted) == 1


def test_other_entries_of_the_cache_stay(counted, tmp_path):
    path = tmp_path / "targets.json"
    path.write_text(json.dumps({"another": TINY.to_json()}))
    this_cpu(cache_dir=tmp_path)
    kept = json.loads(path.read_text())
    assert set(kept) == {"another", *counted}


def test_a_cache_that_cannot_be_written_is_told(counted, tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with knobs.override(debug=1):
        found = this_cpu(cache_dir=blocked)
    assert found.peak("f32") == 1e11
    assert "cannot be kept" in capsys.readouterr().err


def test_this_machine_really_is_measured(tmp_path):
    found = this_cpu(cache_dir=tmp_path)
    assert set(dict(found.flops)) >= {"f32", "bf16", "i8"}
    # Between an old laptop core and a rack of servers.
    assert 1e8 < found.peak("f32") < 1e15
    assert 1e8 < found.bandwidth < 1e13
    assert found.on_chip >= 2**15
    assert "measured on this machine" in found.source


def test_a_rank_that_walks_another_has_its_extent() -> None:
    """Stick-breaking folds the later keys under a rank of their own, and its derived form too."""
    plain = NAMED["stick-breaking"]
    fused = fuse_reductions(plain, "m")
    assert isinstance(fused, Fusion)
    sizes = {"p": 64, "m": 512, "e": 16, "f": 16}
    for cascade, passes in ((plain, 2), (fused.cascade, 1)):
        cost = site_cost(cascade, sizes, TARGETS["a100"], dtype="f16", rank="m", query_rank="p")
        assert cost.passes == passes
    assert complete_extents(plain, sizes)["j"] == 512
    assert complete_extents(fused.cascade, sizes)["j0"] == 128
