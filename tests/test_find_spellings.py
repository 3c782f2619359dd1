"""Equivalent spellings of attention reach one cascade; decoys do not become sites."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attn_rewrite.passes.canonicalize import canonicalize
from attn_rewrite.passes.find import find
from attn_rewrite.site import Findings
from tests.spellings import CAUSAL, PLAIN

SHAPE = (2, 4, 6, 8)
AUTO = torch.export.Dim.AUTO
DYNAMIC = {"args": tuple({0: AUTO, 2: AUTO} for _ in range(3))}


class Module(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def capture(
    module: nn.Module, args: tuple[torch.Tensor, ...], dynamic_shapes=None
) -> torch.fx.GraphModule:
    return torch.export.export(
        module.eval(), args, dynamic_shapes=dynamic_shapes, strict=False
    ).module()


def findings(function, args=None, dynamic_shapes=None) -> Findings:
    args = tuple(torch.randn(SHAPE) for _ in range(3)) if args is None else args
    module = function if isinstance(function, nn.Module) else Module(function)
    return find(canonicalize(capture(module, args, dynamic_shapes)))


PLAIN_SCORE = f"QK[b, h, q, kv] * {1 / math.sqrt(SHAPE[-1])!r}"


def score_and_guard(found: Findings) -> tuple[str, str]:
    assert [str(r) for r in found.refusals] == []
    (site,) = found.sites
    score = site.cascade.producer("S")
    return str(score.expr), str(score.guard)


def close_score(text: str) -> None:
    """The score is the product times 1/sqrt(d), whatever constant folding did to the last digit."""
    head, _, number = text.partition(" * ")
    assert head == "QK[b, h, q, kv]"
    assert float(number) == pytest.approx(1 / math.sqrt(SHAPE[-1]), rel=1e-12)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", PLAIN)
def test_plain_spelling(name: str, dynamic: bool) -> None:
    found = findings(PLAIN[name], dynamic_shapes=DYNAMIC if dynamic else None)
    score, guard = score_and_guard(found)
    close_score(score)
    assert guard == "true"
    (site,) = found.sites
    assert (site.hq, site.hkv, site.d_qk, site.d_v, site.causal) == (4, 4, 8, 8, False)
    assert site.family == "softmax"


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_spelling(name: str) -> None:
    found = findings(CAUSAL[name], dynamic_shapes=DYNAMIC)
    score, guard = score_and_guard(found)
    close_score(score)
    assert guard == "kv <= q"
    assert found.sites[0].causal


@pytest.mark.parametrize("name", [*PLAIN, *CAUSAL])
def test_spellings_compute_the_same(name: str) -> None:
    """The list itself is right: every spelling agrees with the float64 formula."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(SHAPE, dtype=torch.float64) for _ in range(3))
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(SHAPE[-1])
    if name in CAUSAL:
        n = torch.arange(SHAPE[2])
        scores = scores.masked_fill(n[:, None] < n[None, :], -math.inf)
    expected = torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), v)
    function = {**PLAIN, **CAUSAL}[name]
    if name == "sdpa_float_mask":
        q, k, v = q.float(), k.float(), v.float()
    result = function(q.clone(), k.clone(), v.clone()).double()
    assert (result - expected).abs().max() < (
        1e-5 if "float" in name or "upcast" in name else 1e-12
    )


def test_square_sizes_do_not_confuse_axes() -> None:
    """Every axis has the same length: only identity tells them apart."""
    args = tuple(torch.randn(4, 4, 4, 4) for _ in range(3))
    for name in (
        "divide_scores",
        "einsum_other_order",
        "keys_first_scores",
        "packed_heads",
        "length_first",
    ):
        assert len(findings(PLAIN[name], args).sites) == 1, name


def test_softmax_over_queries_is_not_softmax_attention() -> None:
    found = findings(lambda q, k, v: (q @ k.mT).softmax(dim=-2) @ v)
    assert not found.sites
    assert [r.code for r in found.refusals] == ["axis-mismatch"]


def test_permuted_keys_are_not_a_transpose() -> None:
    """K given as [b, s, h, d] and permuted (0, 2, 3, 1): the same shape when square, another
    meaning."""
    args = tuple(torch.randn(4, 4, 4, 4) for _ in range(3))
    found = findings(lambda q, k, v: (q @ k.permute(0, 2, 3, 1)).softmax(-1) @ v, args)
    (site,) = found.sites
    dims = [[f.role for f in d] for d in site.inputs["K"].dims]
    assert dims == [["b"], ["kv"], ["h"], ["d"]]


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(8, 4)
        self.experts = nn.Parameter(torch.randn(4, 8, 8))

    def forward(self, x):
        weights = self.gate(x).softmax(-1)
        outputs = torch.einsum("bsd,edf->bsef", x, self.experts)
        return torch.einsum("bse,bsef->bsf", weights, outputs)


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        return self.head(x).softmax(-1)


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.randn(3))

    def forward(self, x):
        parts = torch.stack([x, x * 2, x.tanh()], -1)
        return parts @ self.logits.softmax(0)


def gumbel(x):
    noise = -torch.log(-torch.log(torch.rand_like(x) + 1e-9) + 1e-9)
    return ((x + noise) / 0.5).softmax(-1) @ torch.eye(x.shape[-1])


@pytest.mark.parametrize(
    "decoy",
    [Router(), Classifier(), Mixture(), Module(gumbel)],
    ids=["router", "classifier", "mixture", "gumbel"],
)
def test_decoys(decoy: nn.Module) -> None:
    found = findings(decoy, (torch.randn(2, 5, 8),))
    assert not found.sites
    assert len(found.refusals) == 1
    refusal = found.refusals[0]
    assert refusal.code in ("no-score-product", "not-a-value-product", "probabilities-escape")
    assert refusal.reason
    assert refusal.node
    assert refusal.source


def test_returned_probabilities_are_refused_unless_dead() -> None:
    def returned(q, k, v):
        p = (q @ k.mT).softmax(-1)
        return p @ v, p

    def unused(q, k, v):
        p = (q @ k.mT).softmax(-1)
        p.mean(1)
        return p @ v

    found = findings(returned)
    assert [r.code for r in found.refusals] == ["probabilities-escape"]
    assert "test_find_spellings.py" in found.refusals[0].source
    assert len(findings(unused).sites) == 1


def test_probabilities_used_twice_are_refused() -> None:
    found = findings(lambda q, k, v: (p := (q @ k.mT).softmax(-1)) @ v + p.mT @ v)
    assert [r.code for r in found.refusals] == ["probabilities-escape"]


@pytest.mark.parametrize(
    "spelling", ["repeat_interleave", "expand", "five", "enable_gqa", "shared"]
)
def test_grouped_queries(spelling: str) -> None:
    def attend(q, k, v):
        if spelling == "repeat_interleave":
            k, v = (x.repeat_interleave(3, dim=1) for x in (k, v))
        elif spelling == "expand":
            k, v = (x[:, :, None].expand(2, 2, 3, 6, 8).reshape(2, 6, 6, 8) for x in (k, v))
        elif spelling == "five":
            grouped = q.view(2, 2, 3, 6, 8)
            return ((grouped @ k[:, :, None].mT).softmax(-1) @ v[:, :, None]).flatten(1, 2)
        elif spelling == "enable_gqa":
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        else:
            return torch.einsum(
                "bhqk,bkd->bhqd", torch.einsum("bhqd,bkd->bhqk", q, k[:, 0]).softmax(-1), v[:, 0]
            )
        return (q @ k.mT).softmax(-1) @ v

    found = findings(
        attend, (torch.randn(2, 6, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8))
    )
    (site,) = found.sites
    assert (site.hq, site.hkv) == ((6, 1) if spelling == "shared" else (6, 2))
    expected = "K[b, h // 6, kv, d]" if spelling == "shared" else "K[b, h // 3, kv, d]"
    assert expected in str(site.cascade.producer("QK").expr)


def _by_index(x):
    return x[:, torch.arange(6) // 3]


def _by_index_select(x):
    return x.index_select(1, torch.arange(2).repeat_interleave(3))


def _by_list(x):
    return x[:, [0, 0, 0, 1, 1, 1]]


def _by_slices(x):
    return torch.cat([x[:, h : h + 1] for h in range(2) for _ in range(3)], 1)


def _by_expanded_slices(x):
    return torch.cat([x[:, h : h + 1].expand(-1, 3, -1, -1) for h in range(2)], 1)


def _by_selections(x):
    return torch.stack([x[:, h // 3] for h in range(6)], 1)


def _by_view(x):
    return x[:, :, None].expand(-1, -1, 3, -1, -1).reshape(x.shape[0], 6, x.shape[2], 8)


def _by_other_list(x):
    return x[:, [0, 0, 1, 1, 1, 1]]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    ("repeat", "groups"),
    [
        (_by_index, 2),
        (_by_index_select, 2),
        (_by_list, 2),
        (_by_slices, 2),
        (_by_expanded_slices, 2),
        (_by_selections, 2),
        (_by_view, 2),
        (_by_other_list, 6),
    ],
    ids=lambda f: getattr(f, "__name__", None),
)
def test_key_heads_put_together(repeat, groups: int, dynamic: bool) -> None:
    """Six heads of two, each three times in a row; not where one comes twice, one four times."""
    args = tuple(torch.randn(2, h, 6, 8) for h in (6, 2, 2))
    found = findings(
        lambda q, k, v: (q @ repeat(k).mT).softmax(-1) @ repeat(v),
        args,
        DYNAMIC if dynamic else None,
    )
    (site,) = found.sites
    assert (site.hq, site.hkv) == (6, groups)
    wanted = "K[b, h // 3, kv, d]" if groups == 2 else "K[b, h, kv, d]"
    assert wanted in str(site.cascade.producer("QK").expr)


def test_probabilities_masked_again_with_a_tensor() -> None:
    """A zero that comes as a tensor is a factor of the probabilities; any other number is none."""

    def attend(q, k, v, fill):
        scores = q @ k.mT
        keep = torch.ones(6, 6, dtype=torch.bool).tril()
        maps = scores.masked_fill(~keep, -math.inf).softmax(-1)
        return maps.masked_fill(~keep, torch.scalar_tensor(fill)) @ v

    (site,) = findings(lambda q, k, v: attend(q, k, v, 0.0)).sites
    assert site.rewritable
    assert site.causal
    refused = findings(lambda q, k, v: attend(q, k, v, 0.5))
    assert refused.sites == ()
    assert [r.code for r in refused.refusals] == ["not-a-value-product"]
