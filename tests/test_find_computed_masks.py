"""Masks that are computed rather than compared: one form for each meaning, and no false causality."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_rewrite.cascade.expr import KV, Const, Q, call, where
from attn_rewrite.cascade.simplify import simplify
from attn_rewrite.passes.find.bands import bands_of, written
from attn_rewrite.passes.find.masks import normal, pieces_of, removing
from tests.test_find_masks import _agrees, _positions
from tests.test_find_spellings import DYNAMIC, SHAPE, findings

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT / math.sqrt(q.shape[-1])


def _kept(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return _scores(q, k).masked_fill(keep == 0, -math.inf).softmax(-1) @ v


def _added(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return (_scores(q, k) + bias).softmax(-1) @ v


def _ones(q: Tensor) -> Tensor:
    return torch.ones(q.shape[2], q.shape[2])


def _infinite(q: Tensor) -> Tensor:
    return torch.full((q.shape[2], q.shape[2]), -math.inf)


# Causal, and seen so at any length: name -> (attention, guard)
CAUSAL: dict[str, tuple[Attention, str]] = {}
WINDOW = "(kv <= q) & (q <= kv + 3)"


def causal(guard: str = "kv <= q") -> Callable[[Attention], Attention]:
    def add(function: Attention) -> Attention:
        CAUSAL[function.__name__] = (function, guard)
        return function

    return add


@causal(WINDOW)
def minimum_of_two_masks(q, k, v):
    return _added(q, k, v, torch.minimum(_infinite(q).triu(1), _infinite(q).tril(-4)))


@causal(WINDOW)
def maximum_of_what_is_dropped(q, k, v):
    drop = torch.maximum(_ones(q).triu(1), _ones(q).tril(-4))
    return _kept(q, k, v, ~drop.bool())


@causal(WINDOW)
def product_of_triangles(q, k, v):
    return _kept(q, k, v, _ones(q).tril() * _ones(q).triu(-3))


@causal(WINDOW)
def difference_of_triangles(q, k, v):
    return _kept(q, k, v, _ones(q).tril() - _ones(q).tril(-4))


@causal("(kv <= q) & ((q <= kv + 2) | (kv <= 1))")
def product_with_sinks(q, k, v):
    i, j = _positions(q)
    near = ((i - j < 3).int() + (j < 2).int()).clamp(max=1)
    return _kept(q, k, v, _ones(q).tril() * near)


@causal()
def sign_of_the_distance(q, k, v):
    i, j = _positions(q)
    return _kept(q, k, v, torch.sign(i - j) >= 0)


@causal()
def step_of_the_distance(q, k, v):
    i, j = _positions(q)
    return _kept(q, k, v, torch.heaviside((i - j).float(), torch.ones(())))


@causal()
def running_sum_of_the_diagonal(q, k, v):
    return _kept(q, k, v, torch.eye(q.shape[2]).cumsum(0))


@causal()
def logarithm_of_a_running_sum(q, k, v):
    return _added(q, k, v, torch.eye(q.shape[2]).cumsum(0).log())


@causal()
def logarithm_to_base_two(q, k, v):
    return _added(q, k, v, _ones(q).tril().log2())


@causal()
def outer_product_with_ones(q, k, v):
    n = torch.arange(q.shape[2])
    rows = torch.outer(n, torch.ones_like(n))
    return _kept(q, k, v, rows >= rows.T)


@causal(WINDOW)
def all_of_a_stack(q, k, v):
    i, j = _positions(q)
    return _kept(q, k, v, torch.stack([j <= i, i - j < 4]).all(0))


@causal(WINDOW)
def product_of_a_stack(q, k, v):
    i, j = _positions(q)
    return _kept(q, k, v, torch.stack([j <= i, i - j < 4]).prod(0).bool())


@causal()
def half_a_position(q, k, v):
    i, j = _positions(q)
    return _kept(q, k, v, i - j + 0.5 > 0)


@causal()
def bounded_below(q, k, v):
    return _added(q, k, v, _infinite(q).triu(1).clamp(min=torch.finfo(torch.float32).min))


@pytest.mark.parametrize("name", CAUSAL)
def test_computed_masks_are_comparisons(name: str) -> None:
    """At every length the raised cascade computes what the module does."""
    function, guard = CAUSAL[name]
    assert _agrees(function, with_mask=False).endswith(f" where {guard}")
    assert findings(function, dynamic_shapes=DYNAMIC).sites[0].causal


def one_less_a_triangle(q, k, v):
    return (_scores(q, k) - 1e9 * (1 - _ones(q).tril())).softmax(-1) @ v


def truth_times_a_number(q, k, v):
    return _added(q, k, v, ~_ones(q).bool().tril() * -1e9)


def growing_with_the_distance(q, k, v):
    i, j = _positions(q)
    return (_scores(q, k) - 1e9 * F.relu((j - i).float())).softmax(-1) @ v


@pytest.mark.parametrize(
    "function", [one_less_a_triangle, truth_times_a_number, growing_with_the_distance]
)
def test_finite_masks_are_causal_and_stay_in_the_score(function: Attention) -> None:
    _agrees(function, with_mask=False)
    assert findings(function, dynamic_shapes=DYNAMIC).sites[0].causal


# Not causal, however much they look like it


def maximum_of_masks_keeps_either(q, k, v):
    return _added(q, k, v, torch.maximum(_infinite(q).triu(1), _infinite(q).tril(-1)))


def masked_inside_of_a_bounded_function(q, k, v):
    i, j = _positions(q)
    masked = _scores(q, k).masked_fill(j > i, -math.inf)
    return (5.0 * torch.tanh(masked / 5.0)).softmax(-1) @ v


def penalty_of_one(q, k, v):
    return (_scores(q, k) - _ones(q).triu(1)).softmax(-1) @ v


def bounded_at_minus_one(q, k, v):
    return _added(q, k, v, _infinite(q).triu(1).clamp(min=-1.0))


def scores_times_a_triangle(q, k, v):
    return (_scores(q, k) * _ones(q).tril()).softmax(-1) @ v


def positions_two_apart(q, k, v):
    i, j = torch.arange(0, 2 * q.shape[2], 2), torch.arange(q.shape[2])
    return _kept(q, k, v, j <= i[:, None])


def any_of_a_stack(q, k, v):
    i, j = _positions(q)
    return _kept(q, k, v, torch.stack([j <= i, (j < 2).expand(len(i), -1)]).any(0))


def running_sum_along_the_keys(q, k, v):
    return _kept(q, k, v, torch.eye(q.shape[2]).cumsum(1))


def rolled_triangle(q, k, v):
    return _kept(q, k, v, _ones(q).tril().roll(1, 1))


def flipped_triangle(q, k, v):
    return _kept(q, k, v, _ones(q).tril().flip(0))


def blocks_of_two(q, k, v):
    i, j = _positions(q)
    return _kept(q, k, v, (i >> 1) >= (j >> 1))


def symmetric_by_distance(q, k, v):
    i, j = _positions(q)
    return _kept(q, k, v, torch.sign((i - j).abs() - 2) <= 0)


NOT_CAUSAL = (
    maximum_of_masks_keeps_either, masked_inside_of_a_bounded_function, penalty_of_one,
    bounded_at_minus_one, scores_times_a_triangle, positions_two_apart, any_of_a_stack,
    running_sum_along_the_keys, rolled_triangle, flipped_triangle, blocks_of_two,
    symmetric_by_distance,
)  # fmt: skip


@pytest.mark.parametrize("function", NOT_CAUSAL, ids=lambda f: f.__name__)
def test_masks_that_show_the_future_are_not_causal(function: Attention) -> None:
    """A change of some key changes an earlier query, and no Site claims otherwise."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(SHAPE) for _ in range(3))
    seen = []
    for place in range(1, SHAPE[2]):
        later = v.clone()
        later[:, :, place] += 3
        seen.append((function(q, k, later) - function(q, k, v))[:, :, :place].abs().max())
    assert max(seen) > 1e-4
    for shapes in (None, DYNAMIC):
        for site in findings(function, (q, k, v), shapes).sites:
            assert not site.causal


# Fixed sizes: elements are computed, whatever the spelling


def indices_of_a_triangle(q, k, v):
    n = q.shape[2]
    keep = torch.zeros(n, n, dtype=torch.bool)
    rows, columns = torch.tril_indices(n, n)
    keep[rows, columns] = True
    return _kept(q, k, v, keep)


def flipped_twice(q, k, v):
    return _kept(q, k, v, _ones(q).triu().flip(0, 1))


def evenly_spaced(q, k, v):
    n = torch.linspace(0, q.shape[2] - 1, q.shape[2])
    return _kept(q, k, v, n[:, None] >= n)


def ranks_by_sorting(q, k, v):
    i, j = _positions(q)
    return _kept(q, k, v, torch.argsort(i[:, 0])[:, None] >= j)


def row_by_row(q, k, v):
    n = torch.arange(q.shape[2])
    return _kept(q, k, v, torch.stack([n <= i for i in range(q.shape[2])]))


def infinity_by_division(q, k, v):
    bias = (_ones(q).triu(1) / 0 * -1).nan_to_num(0.0, neginf=-math.inf)
    return _added(q, k, v, bias)


@pytest.mark.parametrize(
    "function",
    [
        indices_of_a_triangle,
        flipped_twice,
        evenly_spaced,
        ranks_by_sorting,
        row_by_row,
        infinity_by_division,
    ],
    ids=lambda f: f.__name__,
)
def test_masks_of_fixed_sizes(function: Attention) -> None:
    found = findings(function)
    (site,) = found.sites
    assert (str(site.cascade.producer("S").guard), site.causal) == ("kv <= q", True)


def test_a_stored_window_is_a_window() -> None:
    """A buffer longer than the sequence, cut to it (GPT-Neo's local layers)."""

    class Local(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            ones = torch.ones(32, 32, dtype=torch.bool).tril()
            self.register_buffer("bias", ones ^ ones.tril(-4))

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return _kept(q, k, v, self.bias[: q.shape[2], : k.shape[2]])

    for shapes in (None, DYNAMIC["args"]):
        (site,) = findings(Local(), tuple(torch.randn(SHAPE) for _ in range(3)), shapes).sites
        assert str(site.cascade.producer("S").guard) == WINDOW
        assert site.causal


# The rules themselves


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.ones(4, 4).tril(), "where(kv <= q, 1.0, 0.0)"),
        (torch.ones(5, 3).triu(-1).bool(), "q <= kv + 1"),
        (torch.ones(5, 5).tril().triu(-1).bool(), "(kv <= q) & (q <= kv + 1)"),
        (torch.zeros(3, 3), "0.0"),
        (torch.eye(3).roll(1, 0), "where((kv <= q + 1) & (q <= kv) | (kv <= q - 2), 0.0, 1.0)"),
        (torch.tensor([[1.0, 0.0], [0.0, 0.0]]), None),
        (torch.arange(9.0).reshape(3, 3), None),
        (torch.full((3, 3), math.nan), None),
        (torch.ones(1, 5), None),
        (torch.ones(2, 3, 3), None),
    ],
)
def test_bands_of_a_tensor(value: Tensor, text: str | None) -> None:
    pieces = bands_of(value)
    found = None if pieces is None else written(pieces, Q, KV)
    assert (None if found is None else str(simplify(found))) == text


def test_pieces_hold_at_every_distance() -> None:
    """Random arithmetic on bands: the pieces agree with evaluation at each distance."""
    generator = torch.Generator().manual_seed(0)

    def draw(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    def band() -> object:
        return where(call("le", KV, Q + (draw(7) - 3)), float(draw(3)), float(draw(3)))

    for _ in range(60):
        op = ("add", "sub", "mul", "max", "min")[draw(5)]
        expr = call(op, band(), call("clip", band(), 0.5, 1.5))
        pieces = pieces_of(expr)
        assert pieces is not None
        for d in range(-9, 10):
            mapping = {"q": max(d, 0), "kv": max(-d, 0)}
            own = [p.value for p in pieces
                   if (p.low is None or p.low <= d) and (p.high is None or d <= p.high)]  # fmt: skip
            assert own == [_at(expr, mapping)]


def _at(expr, mapping: dict[str, int]) -> object:
    from attn_rewrite.cascade.expr import Rank, substitute

    result = simplify(substitute(expr, {Rank(r): Const(n) for r, n in mapping.items()}))
    return result.value


def test_what_has_another_form_stays() -> None:
    """Chunks and prefixes depend on more than the distance."""
    for mask in (
        call("le", KV // 4, Q // 4),
        call("or", call("le", KV, Q), call("le", KV, 2)),
        call("and", call("le", KV, Q), call("or", call("le", Q, KV + 2), call("le", KV, 1))),
        call("le", KV * 2, Q),
    ):
        assert normal(mask) == mask


def test_only_what_lowers_the_score_removes() -> None:
    score, mask = Q * 0 + 1.5, where(call("le", KV, Q), 0.0, -math.inf)
    assert [str(t) for t in removing(score + mask)] == ["kv <= q"]
    assert removing(score - mask) == ()
    assert removing(call("max", score, mask)) == ()
    assert removing(call("tanh", score + mask)) == ()
