"""Generated forward kernels against dense float64 attention, under Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_rewrite.backends.triton.emit import emit
from attn_rewrite.backends.triton.launch import run
from attn_rewrite.backends.triton.lists import blockwise_tables, list_schedule, make_lists
from attn_rewrite.backends.triton.prepare import with_lse
from attn_rewrite.backends.triton.schedule import Schedule
from attn_rewrite.backends.triton.staging import stages_of
from attn_rewrite.cascade import NAMED, interpret, parse
from attn_rewrite.cascade.attention import softmax_cascade
from attn_rewrite.site import Refusal
from tests.interpreted.dense import CASES, Case, bound, inputs_for, reference

SMALL = Schedule(block_rows=16, block_along=16)
SIZES = {"b": 1, "h": 2, "group": 2, "q": 37, "kv": 45, "d": 24, "f": 40}
# Cases that differ from head to head, or from one batch entry to the next.
HEADS = ("per head", "blocks", "alibi", "factor", "sink logit", "lengths", "documents")


def compute(case, x, schedule=SMALL, group=2):
    """AV and LSE of the generated kernel."""
    cascade = with_lse(softmax_cascade(case.form(group), "case"))
    (stage,) = stages_of(cascade)
    tables = {}
    if schedule.skipping == "lists":
        schedule = list_schedule(schedule)
        (guard,) = stage.program.guards()
        known = {n: x[n].numpy() for n in blockwise_tables(guard)}
        b, h, q, _ = x["Q"].shape
        lists = make_lists(
            guard, schedule, q_len=q, kv_len=x["K"].shape[2], heads=h, batch=b, tables=known
        )
        columns = (
            torch.from_numpy(lists.columns) if lists.kept else torch.zeros(1, dtype=torch.int32)
        )
        tables = {"tiles": torch.from_numpy(lists.tiles), "columns": columns}
    lanes = {"d": x["Q"].shape[3], "f": x["V"].shape[3]}
    found = run(emit(stage.program, schedule, lanes), x, tables=tables)
    return found["AV"], found["LSE"]


def check(case, x, schedule=SMALL, group=2):
    dtype = x["Q"].dtype
    av, lse = compute(case, x, schedule, group)
    wanted, wanted_lse = reference(case, x, torch.float64)
    plain, plain_lse = reference(case, x, dtype)
    assert av.dtype == dtype
    assert (av.double() - wanted).abs().max().item() <= bound(wanted, plain, dtype)
    finite = wanted_lse.isfinite()
    assert torch.equal(lse.isfinite(), finite)
    if finite.any():
        error = (lse.double() - wanted_lse)[finite].abs().max().item()
        assert error <= bound(wanted_lse, plain_lse, dtype)


def sizes_of(name: str) -> dict[str, int]:
    """Sizes for a case: one batch entry and key head, or two."""
    return SIZES | ({"b": 2, "h": 4, "q": 45, "kv": 45} if name in HEADS else {})


@pytest.mark.parametrize("name", CASES)
def test_every_attention_with_its_own_skipping(name):
    case = CASES[name]
    check(
        case,
        inputs_for(case, sizes_of(name), torch.float32, 1),
        SMALL.with_(skipping=case.skipping),
    )


@pytest.mark.parametrize("name", ["cached", "sinks", "chunks", "per head"])
def test_skipping_changes_nothing(name):
    case = CASES[name]
    x = inputs_for(case, sizes_of(name), torch.float32, 2)
    dense = compute(case, x)
    skipped = compute(case, x, SMALL.with_(skipping=case.skipping))
    assert torch.allclose(dense[0], skipped[0], atol=2e-6)


@pytest.mark.parametrize("name", ["cached", "sinks", "alibi", "bias"])
@pytest.mark.parametrize("group", [2, 3])
def test_query_heads_of_a_group_share_the_rows(name, group):
    case = CASES[name]
    x = inputs_for(case, SIZES | {"h": 6, "group": group, "q": 5}, torch.float32, 3)
    check(case, x, SMALL.with_(skipping=case.skipping, pack=group), group)


def test_packed_heads_share_lists():
    case = Case(CASES["window"].guard, CASES["window"].mask)
    x = inputs_for(case, SIZES, torch.float32, 3)
    check(case, x, SMALL.with_(skipping="lists", pack=2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["dense", "window", "factor"])
def test_narrow_types(name, dtype):
    case = CASES[name]
    check(case, inputs_for(case, SIZES, dtype, 4), SMALL.with_(skipping=case.skipping))


@pytest.mark.parametrize("spread", [1e-3, 1e4])
@pytest.mark.parametrize("name", ["dense", "causal", "sink logit"])
def test_large_and_small_scores(name, spread):
    case = CASES[name]
    check(
        case, inputs_for(case, SIZES, torch.float32, 5, spread), SMALL.with_(skipping=case.skipping)
    )


def test_rows_without_keys_give_zero_and_minus_infinity():
    case = CASES["late"]
    av, lse = compute(
        case, inputs_for(case, SIZES, torch.float32, 6), SMALL.with_(skipping="bounds")
    )
    assert (av[:, :, :7] == 0).all()
    assert (lse[:, :, :7] == -math.inf).all()
    assert lse[:, :, 7:].isfinite().all()


def test_a_prefix_of_minus_infinity_is_no_nan():
    case = CASES["bias"]
    x = inputs_for(case, SIZES, torch.float32, 7)
    x["bias"][:, :, :, :20] = -math.inf
    check(case, x, SMALL.with_(skipping="bounds"))


def test_tiles_that_one_sum_needs_are_not_skipped_for_another():
    cascade = parse(
        "cascade two-sums\nranks q, kv, d, f\ninputs Q[q, d], K[kv, d], V[kv, f]\noutputs NEAR, ALL\n\n"
        "QK[q, kv] = Q[q, d] * K[kv, d]\nP[q, kv] = sigmoid(QK[q, kv])\n"
        "NEAR[q, f] = P[q, kv] * V[kv, f] where q - kv >= 0\nALL[q, f] = P[q, kv] * V[kv, f]\n"
    )
    make = torch.Generator().manual_seed(0)
    x = {n: torch.randn(40, 16, generator=make) for n in "QKV"}
    (stage,) = stages_of(cascade)
    found = run(emit(stage.program, SMALL.with_(skipping="bounds"), {"d": 16, "f": 16}), x)
    for name, wanted in interpret(cascade, x).items():
        assert (found[name].double() - wanted).abs().max() <= 2e-6 * wanted.abs().max()


def test_eight_bit_operands():
    case = CASES["causal"]
    x = inputs_for(case, SIZES, torch.float32, 8)
    narrow = {n: t.to(torch.float8_e5m2) for n, t in x.items()}
    (stage,) = stages_of(softmax_cascade(case.form(2), "case"))
    schedule = SMALL.with_(skipping="bounds", widen=frozenset({"V"}))
    source = emit(stage.program, schedule, {"d": 24, "f": 40})
    found = run(source, narrow, {"AV": torch.float32})["AV"]
    rounded = {n: t.to(torch.float32) for n, t in narrow.items()}
    wanted, _ = reference(case, rounded, torch.float64)
    # Operands are exact; probabilities are rounded to float16 before they meet the values.
    assert (found.double() - wanted).abs().max() <= 2**-11 * rounded["V"].abs().max()


def test_blocks_of_different_sides_and_stale_lists_are_not_mixed():
    case = CASES["per head"]
    x = inputs_for(case, SIZES, torch.float32, 9)
    check(case, x, Schedule(block_rows=32, block_along=16, skipping="lists"))
    check(case, x, Schedule(block_rows=16, block_along=32, skipping="lists"))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(["dense", "causal", "cached", "window", "sinks", "late", "dilated ahead"]),
    q=st.integers(1, 40), kv=st.integers(1, 50), d=st.integers(1, 40), f=st.integers(1, 40),
    h=st.integers(1, 2), group=st.integers(1, 3), rows=st.sampled_from([16, 32]),
    along=st.sampled_from([16, 32]), packed=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape(name, q, kv, d, f, h, group, rows, along, packed, seed):
    case = CASES[name]
    sizes = {"b": 1, "h": h * group, "group": group, "q": q, "kv": kv, "d": d, "f": f}
    schedule = Schedule(
        block_rows=rows, block_along=along, skipping=case.skipping, pack=group if packed else 1
    )
    check(case, inputs_for(case, sizes, torch.float32, seed), schedule, group)


# Cascades of the library

NAMED_SIZES = {"p": 21, "m": 26, "e": 20, "f": 18, "h": 3, "b": 2, "q": 21, "kv": 26, "g": 2}
REFUSED = {
    "dependent-sums", "dependent-sums-deferred", "dependent-sums-iterative", "sparsemax", "entmax",
    "stick-breaking", "stick-breaking-1pass", "linear-attention-causal", "lse-merge",
    "talking-heads", "talking-heads-before-softmax",
}  # fmt: skip
# quantised-qkv rounds probabilities to float16, as the values are 8 bits wide.
ROUNDED = {"quantised-qkv": 2**-10}


def named_inputs(cascade):
    make = torch.Generator().manual_seed(0)
    found = {}
    for t in cascade.inputs:
        fixed = {r.name: r.size for r in cascade.ranks if r.size}
        shape = [fixed.get(r) or NAMED_SIZES.get(r, 64) for r in t.ranks]
        value = torch.randn(shape, generator=make)
        if t.dtype == "bool":
            value = value < 0.5
        elif t.dtype == "i8":
            value = (value * 20).to(torch.int8)
        elif t.dtype.startswith("i"):
            value = torch.full(shape, 5)
        elif t.sign != "any" or not shape:
            value = value.abs() + 0.5
        found[t.name] = value
    return found


@pytest.mark.parametrize("name", sorted(set(NAMED) - REFUSED))
def test_named_cascades_against_the_oracle(name):
    cascade = NAMED[name]
    x = named_inputs(cascade)
    known = dict(x)
    for stage in stages_of(cascade):
        program = stage.program
        operands = {t.name: known[t.name] for t in program.cascade.inputs}
        lanes = {
            r: n for t in program.cascade.inputs
            for r, n in zip(t.ranks, operands[t.name].shape, strict=True) if r in program.roles.lanes
        }  # fmt: skip
        widen = frozenset(t.name for t in cascade.inputs if t.dtype == "i8")
        source = emit(program, SMALL.with_(widen=widen), lanes)
        wide = dict.fromkeys(program.cascade.outputs, torch.float32)
        known |= run(source, operands, wide)
    for output, wanted in interpret(cascade, x).items():
        error = (known[output].double() - wanted).abs().max()
        assert error <= ROUNDED.get(name, 2e-6) * wanted.abs().max(), output


@pytest.mark.parametrize("outputs", ["AV, CD", "CM, AV", "CD"])
def test_statistics_over_rows_may_be_outputs(outputs):
    """They come from the kernel that makes them, in the order of the cascade."""
    import attn_rewrite.ops  # noqa: F401

    text = str(NAMED["softmax-over-queries"]).replace("output AV", f"outputs {outputs}")
    cascade = parse(text)
    x = named_inputs(cascade)
    x = {t.name: x[t.name] for t in cascade.inputs}
    found = torch.ops.attn_rewrite.triton_cascade(list(x.values()), None, str(cascade), "", 0.0)
    for output, got in zip(cascade.outputs, found, strict=True):
        wanted = interpret(cascade, x)[output]
        assert (got.double() - wanted).abs().max() <= 2e-6 * wanted.abs().max(), output


def test_sums_of_probabilities_over_queries_are_refused_with_a_reason():
    """They fold rows that a fold of keys made: one block of rows does not know them all."""
    import attn_rewrite.ops  # noqa: F401
    from attn_rewrite.errors import LowerError

    text = str(NAMED["attention-weights"]).rstrip() + "\nSEEN[m] = A[m, p]\n"
    x = list(named_inputs(parse(text)).values())
    unused = torch.ops.attn_rewrite.triton_cascade(x, None, text, "", 0.0)
    assert len(unused) == 2
    cascade = parse(text.replace("output AV, A", "output AV, SEEN"))
    with pytest.raises(LowerError, match="folds m, of which a kernel sees one block"):
        torch.ops.attn_rewrite.triton_cascade(x, None, str(cascade), "", 0.0)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_other_cascades_are_refused_with_a_reason(name):
    from attn_rewrite.backends.triton.lower import lower
    from attn_rewrite.errors import LowerError

    try:
        found = lower(NAMED[name])
    except (ValueError, LowerError) as problem:
        found = Refusal("unknown-rank", str(problem))
    assert isinstance(found, Refusal)
    assert found.reason
