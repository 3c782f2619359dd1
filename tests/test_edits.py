"""Edits of the score against attention written by hand, and what an edit may not do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from attn_rewrite import optimize
from attn_rewrite.cascade.expr import KV, Const, Expr, Q, call
from attn_rewrite.passes import TRANSFORMS
from attn_rewrite.passes.transform import ScoreEdit, SparsePattern, collect
from attn_rewrite.policy import Policy, Rule
from tests.sites import make_site


class Attend(nn.Module):
    """Attention with a mask that is added, chosen or given to the fused call."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.shape[2]
        keep = torch.ones(length, length, dtype=torch.bool).tril()
        if self.spelling == "fused":
            return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if self.spelling == "added":
            lowest = torch.finfo(q.dtype).min
            scores = scores + torch.zeros(length, length).masked_fill(~keep, lowest)
        else:
            scores = torch.where(keep, scores, -torch.inf)
        return scores.softmax(-1) @ v


def by_hand(q: Tensor, k: Tensor, v: Tensor, edit: Any) -> Tensor:
    """Causal attention, one query at a time, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    rows = []
    for i in range(q.shape[2]):
        x = torch.einsum("bhd,bhkd->bhk", q[:, :, i], k[:, :, : i + 1]) / q.shape[-1] ** 0.5
        rows.append(torch.einsum("bhk,bhkf->bhf", edit(x, i).softmax(-1), v[:, :, : i + 1]))
    return torch.stack(rows, dim=2)


def drawn(heads: int = 4, length: int = 19) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return tuple(3 * torch.randn(2, heads, length, 8) for _ in range(3))


@pytest.mark.parametrize("spelling", ["fused", "added", "chosen"])
def test_softcap_bends_the_product_and_not_the_mask(spelling: str) -> None:
    q, k, v = drawn()
    done = optimize(Attend(spelling), "softcap(cap=1.5)", (q, k, v))
    wanted = by_hand(q, k, v, lambda x, i: 1.5 * torch.tanh(x / 1.5))
    assert (done(q, k, v) - wanted).abs().max() < 1e-5
    assert (by_hand(q, k, v, lambda x, i: x) - wanted).abs().max() > 0.1


@pytest.mark.parametrize(
    ("heads", "slopes"),
    [
        (1, [2**-8]),
        (4, [2**-2, 2**-4, 2**-6, 2**-8]),
        (6, [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]),
        (12, [2**-1, 2**-2, 2**-3, 2**-4, 2**-5, 2**-6, 2**-7, 2**-8,
              2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]),
    ],
)  # fmt: skip
def test_alibi_known_slopes(heads: int, slopes: list[float]) -> None:
    q, k, v = drawn(heads)
    done = optimize(Attend("fused"), "alibi", (q, k, v))
    slope = torch.tensor(slopes, dtype=torch.float64)[:, None]
    wanted = by_hand(q, k, v, lambda x, i: x - slope * (i - torch.arange(i + 1)))
    assert (done(q, k, v) - wanted).abs().max() < 1e-5


def test_alibi_needs_positions() -> None:
    (alibi,) = Policy.parse("alibi").rules[0].apply
    refusal = alibi.admits(make_site(kind="cross"))
    assert refusal is not None
    assert refusal.code == "alibi-cross"


@dataclass(frozen=True)
class Nowhere(ScoreEdit):
    """The logarithm of a negative number."""

    name: ClassVar[str] = "nowhere"

    def score(self, s: Expr, site: Any) -> Expr:
        return call("log", Const(-1.0)) + s


def test_an_edit_without_a_value_goes_back_to_exact() -> None:
    q, k, v = drawn()
    (edit,) = Policy.parse("nowhere", {**TRANSFORMS, "nowhere": Nowhere}).rules[0].apply
    done = optimize(Attend("chosen"), Policy([Rule(apply=[edit])]), (q, k, v))
    (site,) = done.report.sites
    assert site.status == "reverted"
    assert any("not finite" in note for note in done.report.notes)
    assert (done(q, k, v) - by_hand(q, k, v, lambda x, i: x)).abs().max() < 1e-5


@pytest.mark.parametrize("value", [True, None, 3, torch.ones(2, 2)])
def test_what_a_transform_gives_must_be_an_expression(value: Any) -> None:
    @dataclass(frozen=True)
    class Zebra(SparsePattern):
        name: ClassVar[str] = "zebra"

        def mask(self, site: Any) -> Any:
            return value

    @dataclass(frozen=True)
    class Shift(ScoreEdit):
        name: ClassVar[str] = "shift"

        def score(self, s: Expr, site: Any) -> Any:
            return value

    site = make_site()
    with pytest.raises(TypeError, match=r"zebra\.mask returned .*expected an expression"):
        Zebra().apply(site.cascade, site)
    with pytest.raises(TypeError, match=r"shift\.score returned .*expected an expression"):
        Shift().apply(site.cascade, site)
    with pytest.raises(TypeError, match=r"shift\.score returned"):
        Shift().admits(site)


@pytest.mark.parametrize("entries", [("edit.softcap:Softcapedit.alibi:Alibi",), ("edit.softcap",)])
def test_a_missing_comma_in_a_list_of_transforms_is_named(entries: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="comma missing"):
        collect("attn_rewrite.passes", entries)


def test_python_operators_of_expressions() -> None:
    assert str(abs(Q - KV)) == str(call("abs", Q - KV))
    assert str(7 // KV) == str(call("floordiv", 7, KV))
    assert str(7 % KV) == str(call("mod", 7, KV))
    assert str(2**KV) == str(call("pow", 2, KV))
