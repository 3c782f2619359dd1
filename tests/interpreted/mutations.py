"""Faults put into generated kernels, each of which the comparison with dense attention must see.

A mutation is a change of the emitted text.  `SCENARIOS` are comparisons of the other files of this
folder and a few of their size; each holds for the text as it is emitted, and fails for every mutation
listed with it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from attn_rewrite.backends.triton import launch
from attn_rewrite.backends.triton.decode import Pages, decode
from attn_rewrite.backends.triton.schedule import Schedule
from attn_rewrite.backends.triton.varlen import Sequences, attend_varlen
from attn_rewrite.cascade.attention import softmax_cascade
from tests.interpreted import gradients, kernels, serving
from tests.interpreted.dense import CASES, bound, inputs_for, reference

SIZES = {"b": 1, "h": 4, "group": 2, "q": 33, "kv": 47, "d": 24, "f": 24}
SQUARE = SIZES | {"b": 2, "kv": 33}


def forward(name: str, spread: float = 1.0, skipping: str | None = None, pack: int = 1) -> None:
    case = CASES[name]
    sizes = SQUARE if name in ("documents", "lengths") else SIZES
    schedule = kernels.SMALL.with_(skipping=skipping or case.skipping, pack=pack)
    kernels.check(case, inputs_for(case, sizes, torch.float32, 31, spread), schedule)


def backward(name: str) -> None:
    """Gradients over several tiles of queries and of keys."""
    case = CASES[name]
    x = inputs_for(case, SQUARE | {"q": 70, "kv": 70, "b": 1, "d": 16}, torch.float32, 32)
    pull = torch.randn(1, 4, 70, 24, generator=torch.Generator().manual_seed(1))
    mine, exact, plain = (
        gradients.leaves(x, d) for d in (torch.float32, torch.float64, torch.float32)
    )
    found = gradients.gradients(gradients.output(case, mine), mine, pull)
    wanted = gradients.gradients(reference(case, exact, torch.float64)[0], exact, pull)
    rounded = gradients.gradients(reference(case, plain, torch.float32)[0], plain, pull)
    for got, want, low in zip(found, wanted, rounded, strict=True):
        assert (got.double() - want).abs().max() <= 2 * bound(want, low, torch.float32)


def paged() -> None:
    make, page = torch.Generator().manual_seed(33), 32
    table = torch.randperm(8, generator=make)[:6].view(2, 3).to(torch.int32)
    x = inputs_for(serving.ONE, SIZES | {"b": 2, "q": 3}, torch.float32, 33)
    cache = {n: torch.randn(8, 2, page, 24, generator=make) for n in "KV"}
    lengths = [90, 20]
    found = decode(
        softmax_cascade(serving.ONE.form(2), "case"), {**x, **cache},
        pages=Pages(table, torch.tensor(lengths, dtype=torch.int32)), splits=3, schedule=serving.SMALL,
    )  # fmt: skip
    for e, length in enumerate(lengths):
        k, v = (torch.cat(list(cache[n][table[e].long()]), 1)[None, :, :length] for n in "KV")
        mine = {n: t[e : e + 1] for n, t in found.items()}
        serving.close(mine, serving.ONE, {"Q": x["Q"][e : e + 1], "K": k, "V": v})


def sequences() -> None:
    lens = [20, 0, 33]
    starts = torch.tensor([0, *torch.tensor(lens).cumsum(0)], dtype=torch.int32)
    x = inputs_for(serving.ONE, SIZES | {"b": 1, "q": 53, "kv": 53}, torch.float32, 34)
    found = attend_varlen(
        softmax_cascade(serving.ONE.form(2), "case"), {n: t[0] for n, t in x.items()},
        Sequences(starts, starts, 33, 33), serving.SMALL,
    )  # fmt: skip
    for i in (0, 2):
        part = slice(int(starts[i]), int(starts[i + 1]))
        mine = {n: t[None, :, part] for n, t in found.items()}
        serving.close(mine, serving.ONE, {n: t[:, :, part] for n, t in x.items()})


def split() -> None:
    x = inputs_for(CASES["cached"], SIZES | {"q": 3}, torch.float32, 35)
    found = decode(
        softmax_cascade(CASES["cached"].form(2), "case"), x, splits=3,
        schedule=Schedule(block_rows=16, block_along=16, skipping="bounds", pack=2),
    )  # fmt: skip
    serving.close(found, CASES["cached"], x)


SCENARIOS: dict[str, Callable[[], None]] = {
    **{n: (lambda n=n: forward(n)) for n in
       ("dense", "causal", "window", "sinks", "late", "bias", "alibi", "soft cap", "factor",
        "sink logit", "per head", "documents", "lengths", "neighbourhood", "dilated")},
    "large": lambda: forward("late", 1e4),
    "packed": lambda: forward("cached", pack=2),
    "backward causal": lambda: backward("causal"),
    "backward window": lambda: backward("window"),
    "backward bias": lambda: backward("bias"),
    "dropout": gradients.test_dropout_is_philox_of_the_coordinates_forward_and_backward,
    "split": split,
    "paged": paged,
    "sequences": sequences,
}  # fmt: skip

# (scenario, fault, pattern, replacement); the pattern must be there.
MUTATIONS = [
    ("causal", "accumulator not rescaled", r"PSNV = RSNV \* CGM\[:, None\]", "PSNV = RSNV"),
    ("causal", "denominator not rescaled", r"PSD = RSD \* CGM", "PSD = RSD"),
    ("large", "maximum not carried on", r"RGM_next = tl.maximum\(RGM, LGM\)", "RGM_next = LGM"),
    ("causal", "guard dropped", r"S = tl.where\(keep, S, float\('-inf'\)\)", "S = S"),
    ("window", "lower end of the guard", r" < 20\)", " <= 20)"),
    ("dense", "keys beyond the end", r"S = tl.where\(kv_ok.*, S, float\('-inf'\)\)", "S = S"),
    ("causal", "last key left out", r"tl.maximum\(q_high \+ 1, 0\)", "tl.maximum(q_high, 0)"),
    ("window", "loop begins late", r"tl.maximum\(q_low - 19, ", "tl.maximum(q_low - 3, "),
    ("window", "partial tiles as full", r"tl.maximum\(q_high - 19, ", "tl.maximum(q_low - 19, "),
    ("causal", "diagonal tiles as full", r"tl.maximum\(q_low \+ 1, 0\)", "tl.maximum(q_high + 1, 0)"),
    ("sinks", "sinks left out", r"last = sink_end", "last = 0"),
    ("sinks", "sinks twice", r"after = .*", "after = 0"),
    ("neighbourhood", "border not clipped", r"tl.maximum\(q\b", "tl.maximum(q + 1"),
    ("dense", "head of the group", r"\(h // 2\)", "(h % 2)"),
    ("packed", "heads of a pack", r"h = h_shared \* 2 \+", "h = h_shared +"),
    ("packed", "rows of a pack", r"q = packed // 2", "q = packed % (n_q + packed * 0)"),
    ("dense", "no ln 2", r"RGM \* 0\.69\d+", "RGM"),
    ("dense", "no log2 e", r"QK \* 0\.36\d+", "QK * 0.25"),
    ("dense", "a lane too few", r"d_ok = d < N_D", "d_ok = d < N_D - 1"),
    ("late", "empty rows divided", r"return tl.where\(b == 0.0, .*", "return a / b"),
    ("late", "empty reference", r"REFGM = tl.where\(.*", "REFGM = RGM_next"),
    ("bias", "row of the bias", r"q\.to\(tl.int64\)\[:, None\] \* bias_q", "(q // 2).to(tl.int64)[:, None] * bias_q"),
    ("bias", "bias not in base two", r"bias\.to\(tl\.float32\) \* 1\.44\d+", "bias.to(tl.float32)"),
    ("alibi", "slope of another head", r"h\.to\(tl.int64\) \* slope_h", "(h // 2).to(tl.int64) * slope_h"),
    ("soft cap", "odd function", r"tl.where\(x < 0.0, -t, t\)", "t"),
    ("factor", "diagonal of the factor", r"\(q\[:, None\] - kv\[None, :\] \+ n_kv\)\.to", "(q[:, None] - kv[None, :] + n_kv - 1).to"),
    ("sink logit", "sink not in the sum", r"(    SD = RLS) \+ .*", r"\1"),
    ("documents", "documents of the rows", r"doc_at \+ q\.", "doc_at + (q // 2)."),
    ("lengths", "length of an entry", r"b\.to\(tl.int64\) \* lens_b", "(b * 0).to(tl.int64) * lens_b"),
    ("dilated", "remainder", r"(floor_mod\(.*), 3\)", r"\1, 2)"),
    ("per head", "last tile of a list", r"last = list_full", "last = list_full - 1"),
    ("per head", "listed tiles as full", r"if part != 1:", "if part == 7:"),
    ("per head", "list of another block", r"row_block \* 3\b", "row_block // 2 * 3"),
    ("per head", "list of another head", r"h\.to\(tl.int64\) \* tiles_h", "(h * 0).to(tl.int64) * tiles_h"),
    ("split", "merge without its factor", r"RSNV_next = RSNV \* tl.exp2.*?\[:, None\] \+", "RSNV_next = RSNV +"),
    ("split", "part without its factor", r"(SD\.to\(tl.float32\)) \* tl.exp2.*", r"\1"),
    ("split", "part begins elsewhere", r"kv_first = split \* chunk", "kv_first = split * 0"),
    ("split", "parts overlap", r"tl.minimum\(kv_first \+ chunk, ", "tl.minimum(kv_first + chunk + 16, "),
    ("split", "state of another part", r"tl.cast\(split, tl.int64\) \* GM_split", "tl.cast(split // 2, tl.int64) * GM_split"),
    ("paged", "page of another place", r"kv // PAGE", "kv // PAGE // 2"),
    ("paged", "table of another entry", r"b\.to\(tl.int64\) \* pages_b", "(b * 0).to(tl.int64) * pages_b"),
    ("paged", "place in a page", r"slot = kv % PAGE", "slot = kv % 16"),
    ("paged", "length of another entry", r"lengths_ptr \+ b", "lengths_ptr"),
    ("sequences", "keys of another sequence", r"kv_start\.to\(tl.int64\) \* K_kv", "q_start.to(tl.int64) * 0"),
    ("sequences", "length of all so far", r"(tl.load\(kv_starts_ptr \+ b \+ 1\)) - kv_start", r"\1"),
    ("backward causal", "no delta", r"DA = DP - DELTA.*", "DA = DP"),
    ("backward causal", "no scale", r"DQK = DS \* 0.25", "DQK = DS"),
    ("backward causal", "log-sum-exp to the base e", r"LSE\.to\(tl\.float32\) \* 1\.44\d+", "LSE.to(tl.float32)"),
    ("backward causal", "head of the group", r"\(h // 2\)", "(h % 2)"),
    ("backward causal", "queries begin late", r"begin = tl.maximum\(kv_low, 0\)", "begin = tl.maximum(kv_low + BLOCK_Q, 0)"),
    ("backward window", "queries end early", r"kv_high \+ 19", "kv_low"),
    ("backward causal", "keys end early", r"tl.maximum\(q_high \+ 1, 0\)", "tl.maximum(q_low, 0)"),
    ("backward causal", "diagonal tiles as full", r"tl.maximum\(kv_high, begin\)", "tl.maximum(kv_low, begin)"),
    ("backward bias", "bias of another row", r"q\.to\(tl.int64\)(\[[^]]*\]) \* bias_q", r"(q // 2).to(tl.int64)\1 * bias_q"),
    ("dropout", "counter", r"tl.philox\(tl.load\(seed_ptr\), (.*?) \+ kv", r"tl.philox(tl.load(seed_ptr), \1 + 1 + kv"),
    ("dropout", "counter of the head", r" \+ h,", " + h // 2,"),
    ("dropout", "share not made up for", r"1\.0 / \(1\.0 - dropout\)", "1.0"),
]  # fmt: skip


# Those that run with every `make test`; the others are slow.
ALWAYS = {
    "accumulator not rescaled", "guard dropped", "last key left out", "loop begins late",
    "head of the group", "no ln 2", "empty rows divided", "bias not in base two",
    "list of another head", "merge without its factor", "page of another place",
    "keys of another sequence", "no delta", "counter",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_scenarios_hold(name: str) -> None:
    SCENARIOS[name]()


@pytest.mark.parametrize(
    ("name", "fault", "pattern", "new"),
    [
        pytest.param(*m, id=f"{m[0]}: {m[1]}", marks=() if m[1] in ALWAYS else pytest.mark.slow)
        for m in MUTATIONS
    ],
)
def test_a_fault_is_seen(name: str, fault: str, pattern: str, new: str, monkeypatch) -> None:
    changed = []

    def mutated(source):
        head, text, code = source.text.split('"""', 2)  # the cascade in the docstring stays
        other = re.sub(pattern, new, code)
        changed.append(other != code)
        return launch_kernel(replace(source, text=f'{head}"""{text}"""{other}'))

    launch_kernel = launch.kernel_of
    monkeypatch.setattr(launch, "kernel_of", mutated)
    with pytest.raises(AssertionError):
        SCENARIOS[name]()
    assert any(changed), f"no kernel of {name} has {pattern}"
