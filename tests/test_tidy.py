"""Operators that would change nothing are not emitted, and those that would are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx

from attn_rewrite.backends.torch.tidy import expanded, filled, is_same_size, squeezed
from attn_rewrite.graph import GraphBuilder, aten, op_name

SHAPE = (3, 4)


def graph_of(shape: tuple[int, ...] = SHAPE) -> tuple[GraphBuilder, fx.Node, fx.Node]:
    """A builder, and two inputs: numbers of ``shape``, and a mask of it."""
    graph = fx.Graph()
    x, mask = graph.placeholder("x"), graph.placeholder("mask")
    x.meta["val"], mask.meta["val"] = torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)
    return GraphBuilder(graph).at(graph.output(x)), x, mask


def run(value: fx.Node, *inputs: Tensor) -> Tensor:
    """``value`` computed, and nothing that it does not need."""
    graph = value.graph
    next(n for n in graph.nodes if n.op == "output").args = (value,)
    graph.eliminate_dead_code()
    result: Tensor = fx.Interpreter(fx.GraphModule({}, graph)).run(*inputs)
    return result


def operators(graph: fx.Graph) -> list[str]:
    return [op_name(n) for n in graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize("shape", [(3, 4), (-1, 4), (3, -1)])
def test_an_expand_to_the_same_shape_is_none(shape: tuple[int, ...]) -> None:
    build, x, _ = graph_of()
    assert expanded(build, x, shape) is x


@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 3, 4)])
def test_an_expand_to_another_shape_stays(shape: tuple[int, ...]) -> None:
    build, x, mask = graph_of()
    given = torch.randn(SHAPE)
    made = run(expanded(build, x, shape), given, torch.zeros(SHAPE).bool())
    assert torch.equal(made, given.expand(shape))


def test_numbers_and_symbols_are_not_taken_for_each_other() -> None:
    assert is_same_size(4, 4)
    assert not is_same_size(4, 5)
    assert not is_same_size(1, True)


def test_what_was_filled_in_the_same_places_is_filled_once() -> None:
    build, x, mask = graph_of()
    made = filled(build, filled(build, x, mask, 1.0), mask, -2.0)
    given, dropped = torch.randn(SHAPE), torch.rand(SHAPE) < 0.5
    assert torch.equal(run(made, given, dropped), given.masked_fill(dropped, -2.0))
    assert operators(made.graph) == ["masked_fill"]


def test_what_was_filled_in_other_places_stays() -> None:
    build, x, mask = graph_of()
    other = build.call(aten.logical_not.default, mask)
    made = filled(build, filled(build, x, other, 1.0), mask, -2.0)
    given, dropped = torch.randn(SHAPE), torch.rand(SHAPE) < 0.5
    wanted = given.masked_fill(~dropped, 1.0).masked_fill(dropped, -2.0)
    assert torch.equal(run(made, given, dropped), wanted)


@given(st.data())
def test_dimensions_that_were_put_in_are_taken_out(data: st.DataObject) -> None:
    """Any dimensions of extent one, whether an unsqueeze made them or they were there."""
    build, value, _ = graph_of(data.draw(st.sampled_from([SHAPE, (1, 3, 1, 4)])))
    given = torch.randn(value.meta["val"].shape)
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, value.meta["val"].ndim))
        value = build.call(aten.unsqueeze.default, value, at)
    shape = value.meta["val"].shape
    ones = [d for d, n in enumerate(shape) if n == 1]
    dims = data.draw(st.lists(st.sampled_from(ones), unique=True)) if ones else []
    wanted = given.view(shape).squeeze(dims)
    made = squeezed(build, value, dims)
    assert torch.equal(run(made, given, torch.zeros(given.shape).bool()), wanted)


def test_a_dimension_that_was_just_put_in_leaves_nothing() -> None:
    build, x, _ = graph_of()
    wide = build.call(aten.unsqueeze.default, build.call(aten.unsqueeze.default, x, 0), 2)
    assert squeezed(build, wide, [0, 2]) is x
