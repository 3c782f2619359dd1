"""Capture: what is dynamic and why, all ways to call a model, and no trace left on it."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim

from attn_rewrite.axes import BATCH, SEQUENCE, InputTensor, guess_axes, named_tensors
from attn_rewrite.capture import Captured, capture_model
from attn_rewrite.errors import CaptureError

EPS = torch.finfo(torch.float32).eps
HERE = Path(__file__).name


def close(value: Tensor, reference: Tensor, original: Tensor) -> None:
    """Within the implementation bound of the dtype ``original`` was computed in."""
    error = (original.double() - reference.double()).abs().max()
    eps = torch.finfo(original.dtype).eps
    allowed = max(2 * float(error), 4 * eps * float(reference.abs().max()))
    assert float((value.double() - reference.double()).abs().max()) <= allowed


class Block(nn.Module):
    """Self-attention with an additive mask [B, 1, 1, S], written out."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, length, width = hidden.shape
        q, k, v = self.qkv(hidden).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / (width // self.heads) ** 0.5
        if mask is not None:
            scores = scores + mask
        out = scores.softmax(-1) @ v
        return out.transpose(1, 2).reshape(batch, length, width)


def dims(captured: Captured) -> set[tuple[str, int]]:
    return {(d.name, d.dim) for d in captured.dynamic}


# Dynamic dimensions


@pytest.fixture(scope="module")
def block() -> Captured:
    torch.manual_seed(0)
    return capture_model(
        Block().eval(), (torch.randn(2, 6, 16),), {"mask": torch.zeros(2, 1, 1, 6)}
    )


def test_batch_and_sequence_are_dynamic(block: Captured) -> None:
    assert dims(block) == {("hidden", 0), ("hidden", 1), ("mask", 0), ("mask", 3)}
    assert block.notes == (
        "hidden: batch and sequence are dynamic",
        "mask: batch and sequence are dynamic; the other sizes are static (1x1)",
    )
    assert block.seconds > 0


@given(batch=st.integers(1, 5), length=st.integers(1, 33))
@settings(max_examples=20, deadline=None)
def test_graph_computes_at_every_size(block: Captured, batch: int, length: int) -> None:
    hidden = torch.randn(batch, length, 16)
    mask = torch.randn(batch, 1, 1, length)
    weight, bias = (p.detach() for p in block.graph.parameters())
    with torch.no_grad():
        value = block.graph(hidden, mask=mask)
    references = []
    for dtype in (torch.float64, torch.float32):
        q, k, v = (hidden.to(dtype) @ weight.to(dtype).T + bias.to(dtype)).split(16, -1)
        q, k, v = (t.reshape(batch, length, 2, 8).transpose(1, 2) for t in (q, k, v))
        p = (q @ k.transpose(-1, -2) / 8**0.5 + mask.to(dtype)).softmax(-1)
        references.append((p @ v).transpose(1, 2).reshape(batch, length, 16))
    close(value, *references)


def test_a_batch_of_one_is_widened_and_said(block: Captured) -> None:
    hidden = torch.randn(1, 6, 16)
    captured = capture_model(Block().eval(), (hidden,))
    assert ("hidden", 0) in dims(captured)
    assert any("repeated to 2" in note for note in captured.notes)
    assert captured.args[0] is hidden, "the example inputs stay as given"
    assert captured.graph(torch.randn(1, 3, 16)).shape == (1, 3, 16)
    assert captured.graph(torch.randn(4, 3, 16)).shape == (4, 3, 16)


class ComparesLength(nn.Module):
    def forward(self, x: Tensor, m: Tensor) -> Tensor:
        if x.shape[1] == 6:
            x = x + 1
        return x * m


def test_a_comparison_makes_a_dimension_static_and_names_the_line() -> None:
    captured = capture_model(ComparesLength().eval(), (torch.ones(4, 6), torch.ones(4, 6)))
    assert dims(captured) == {("x", 0), ("m", 0)}
    (note,) = (n for n in captured.notes if n.startswith("x:"))
    assert "dimension 1 is static 6" in note
    assert f"{HERE}:" in note
    assert "in forward: `if x.shape[1] == 6:`" in note
    with pytest.raises(AssertionError):
        captured.graph(torch.ones(4, 7), torch.ones(4, 7))


def test_a_path_taken_by_inequality_is_guarded() -> None:
    """Length 5 takes the other branch: the graph must not be used at 6."""
    captured = capture_model(ComparesLength().eval(), (torch.ones(4, 5), torch.ones(4, 5)))
    assert ("x", 1) in dims(captured)
    assert torch.equal(captured.graph(torch.ones(2, 7), torch.ones(2, 7)), torch.ones(2, 7))
    with pytest.raises(AssertionError):
        captured.graph(torch.ones(2, 6), torch.ones(2, 6))


class NeedsAnInteger(nn.Module):
    """Uses its length as a Python number that must not be symbolic."""

    def forward(self, x: Tensor) -> Tensor:
        return x * len(set([x.shape[1]] * 3))


def test_fallback_to_batch_only_says_why() -> None:
    captured = capture_model(NeedsAnInteger().eval(), (torch.ones(3, 5, 4),))
    assert dims(captured) == {("x", 0)}
    first = captured.notes[0]
    assert first.startswith("batch and sequence dynamic: not possible, because TypeError")
    assert f"{HERE}:" in first
    assert "\n" not in first


class NeedsIntegers(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * len({x.shape[0], 0}) * len({x.shape[1], 0})


def test_fallback_to_static() -> None:
    captured = capture_model(NeedsIntegers().eval(), (torch.ones(3, 5, 4),))
    assert captured.dynamic == ()
    assert sum("not possible" in note for note in captured.notes) == 3
    assert captured.notes[-1] == "x: static 3x5x4"
    assert torch.equal(captured.graph(torch.ones(3, 5, 4)), torch.full((3, 5, 4), 4.0))


def test_learned_positions_bound_the_length() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(20, 4)
            self.register_buffer("ids", torch.arange(20)[None])

        def forward(self, x: Tensor) -> Tensor:
            return x + self.table(self.ids[:, : x.shape[1]])

    captured = capture_model(Positions().eval(), (torch.ones(2, 5, 4),))
    assert "sequence (up to 20)" in captured.notes[-1]
    with pytest.raises(AssertionError):
        captured.graph(torch.ones(2, 21, 4))


def test_dynamic_shapes_of_the_caller_are_honoured() -> None:
    length = Dim("length", max=64)
    shapes = {"hidden": {1: length}, "mask": None}
    captured = capture_model(
        Block().eval(), (torch.randn(2, 6, 16),), {"mask": None}, dynamic_shapes=shapes
    )
    assert dims(captured) == {("hidden", 1)}
    assert captured.dynamic[0].upper == 64
    assert captured.notes == ("hidden: dimension 1 (up to 64) is dynamic",)


def test_dynamic_shapes_that_cannot_be_honoured_are_an_error_not_a_fallback() -> None:
    shapes = {"x": {1: Dim("length")}, "m": {1: Dim("length")}}
    inputs = (torch.ones(4, 6), torch.ones(4, 6))
    with pytest.raises(CaptureError, match="specialized it to be a constant"):
        capture_model(ComparesLength().eval(), inputs, dynamic_shapes=shapes)


# The guess


def tensors(**shapes: tuple[int, ...]) -> list[InputTensor]:
    whole = ("ids", "positions")
    return [
        InputTensor(n, torch.zeros(s, dtype=torch.long if n in whole else torch.float32))
        for n, s in shapes.items()
    ]


B, S = BATCH, SEQUENCE


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ({"ids": (2, 7)}, {"ids": {0: B, 1: S}}),
        ({"hidden": (2, 7, 16)}, {"hidden": {0: B, 1: S}}),
        ({"image": (2, 3, 8, 8)}, {"image": {0: B}}),
        ({"image": (2, 3, 8, 8), "t": (2,)}, {"image": {0: B}, "t": {0: B}}),
        ({"hidden": (2, 7, 16), "w": (5,)}, {"hidden": {0: B, 1: S}, "w": {}}),
        ({"hidden": (2, 7, 16), "p": (7,)}, {"hidden": {0: B, 1: S}, "p": {0: S}}),
        (
            {"hidden": (2, 7, 16), "mask": (7, 7)},
            {"hidden": {0: B, 1: S}, "mask": {0: S, 1: S}},
        ),
        ({"ids": (2, 7), "mask": (2, 7)}, {"ids": {0: B, 1: S}, "mask": {0: B, 1: S}}),
        (
            {"hidden": (2, 7, 16), "attention_mask": (2, 1, 7, 7)},
            {"hidden": {0: B, 1: S}, "attention_mask": {0: B, 2: S, 3: S}},
        ),
        (
            {"q": (2, 4, 7, 16), "k": (2, 4, 9, 16), "mask": (2, 1, 7, 9)},
            {"q": {0: B, 2: S}, "k": {0: B, 2: S}, "mask": {0: B, 2: S, 3: S}},
        ),
        (
            {"query": (2, 7, 4, 16), "mask": (2, 1, 7, 7)},
            {"query": {0: B, 1: S}, "mask": {0: B, 2: S, 3: S}},
        ),
        ({"q": (2, 4, 7, 16)}, {"q": {0: B}}),
        ({"past.keys": (2, 4, 9, 16)}, {"past.keys": {0: B, 2: S}}),
        ({"clip": (2, 4, 3, 8, 8)}, {"clip": {0: B}}),
        ({"step": ()}, {"step": {}}),
    ],
    ids=lambda v: ",".join(v),
)
def test_guess(shapes: dict[str, tuple[int, ...]], expected: dict[str, dict[int, str]]) -> None:
    assert guess_axes(tensors(**shapes)) == expected


def test_names_are_paths_to_arguments() -> None:
    def forward(x: Any, *rest: Any, past: Any = None, **more: Any) -> None: ...

    one, two, three, four = (torch.zeros(n) for n in (1, 2, 3, 4))
    found = named_tensors(forward, (one, two), {"past": {"k": [three]}, "extra": four})
    assert [i.name for i in found] == ["x", "rest[0]", "past['k'][0]", "extra"]
    assert [i.tensor.numel() for i in found] == [1, 2, 3, 4]


# All ways to call and to return


@dataclasses.dataclass
class Out:
    hidden: Tensor
    parts: tuple[Tensor, Tensor]
    nothing: Tensor | None = None


class Named(NamedTuple):
    a: Tensor
    b: Tensor


class Returns(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        made: dict[str, Any] = {
            "tuple": (x + 1, [x]),
            "dict": {"a": x + 1, "b": (x,)},
            "dataclass": Out(x + 1, (x, x * 2)),
            "named": Named(x + 1, x),
        }
        return made[self.kind]


@pytest.mark.parametrize("kind", ["tuple", "dict", "dataclass", "named"])
def test_outputs_keep_their_class(kind: str) -> None:
    model = Returns(kind).eval()
    captured = capture_model(model, (torch.ones(2, 3),))
    x = torch.randn(4, 3)
    value, expected = captured.graph(x), model(x)
    assert type(value) is type(expected)
    leaves = torch.utils._pytree.tree_leaves
    assert all(map(torch.equal, leaves(value), leaves(expected)))


def test_dataclass_inputs() -> None:
    @dataclasses.dataclass
    class In:
        x: Tensor
        y: Tensor

    class Model(nn.Module):
        def forward(self, pair: In) -> Tensor:
            return pair.x * pair.y

    captured = capture_model(Model().eval(), (In(torch.ones(2, 3), torch.ones(2, 3)),))
    value = captured.graph(In(torch.full((5, 3), 2.0), torch.full((5, 3), 3.0)))
    assert torch.equal(value, torch.full((5, 3), 6.0))
    assert [n.partition(":")[0] for n in captured.notes] == ["pair.x", "pair.y"]


def test_keyword_arguments_in_any_order() -> None:
    class Model(nn.Module):
        def forward(self, a: Tensor, *, b: Tensor, c: float = 1.0) -> Tensor:
            return a - b * c

    kwargs = {"c": 2.0, "b": torch.ones(2, 5, 4), "a": torch.zeros(2, 5, 4)}
    captured = capture_model(Model().eval(), (), kwargs)
    assert {d.name for d in captured.dynamic} == {"a", "b"}
    value = captured.graph(c=2.0, b=torch.ones(3, 2, 4), a=torch.zeros(3, 2, 4))
    assert torch.equal(value, torch.full((3, 2, 4), -2.0))


@pytest.mark.parametrize("batch", [1, 2])
def test_one_tensor_passed_three_times_is_three_inputs(batch: int) -> None:
    """The module asks ``query is key``; the answer must not be baked in."""
    x = torch.randn(batch, 5, 16)
    model = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    captured = capture_model(model, (x, x, x), {"need_weights": False})
    assert any(n.startswith("key: an input of its own") for n in captured.notes)
    y, memory = torch.randn(3, 4, 16), torch.randn(3, 9, 16)
    with torch.no_grad():
        value = captured.graph(y, memory, memory, need_weights=False)[0]
        expected = model(y, memory, memory, need_weights=False)[0]
        reference = copy.deepcopy(model).double()(
            *(t.double() for t in (y, memory, memory)), need_weights=False
        )[0]
    close(value, reference, expected)


@pytest.mark.parametrize("batch", [1, 2])
def test_strided_inputs(batch: int) -> None:
    base = torch.randn(7, batch, 16)
    strided = base.transpose(0, 1)
    assert batch == 1 or not strided.is_contiguous()
    model = Block().eval()
    captured = capture_model(model, (strided,))
    for x in (torch.randn(5, 3, 16).transpose(0, 1), torch.randn(3, 5, 16)):
        with torch.no_grad():
            reference = copy.deepcopy(model).double()(x.double())
            close(captured.graph(x), reference, model(x))


@pytest.mark.parametrize("part", ["cut", "stepped", "expanded"])
def test_an_example_that_is_part_of_something_larger_fixes_no_strides(part: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 16), Block()).eval()
    whole = torch.randint(0, 20, (2, 16))
    cut = {"cut": whole[:, :8], "stepped": whole[:, ::2], "expanded": whole[:1, :8].expand(2, 8)}
    captured = capture_model(model, (cut[part],))
    for ids in (*cut.values(), whole, whole[:, 3:12]):
        with torch.no_grad():
            value, reference = captured.graph(ids), copy.deepcopy(model).double()(ids)
            assert torch.equal(value, captured.graph(ids.contiguous()))
            close(value, reference, model(ids))


class Regions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = x + 1
        with torch.autocast("cpu", torch.bfloat16):
            y = self.linear(x)
        with torch.autocast("cpu", enabled=False):
            return self.linear(y.float())


def test_autocast_and_no_grad_regions() -> None:
    torch.manual_seed(0)
    model = Regions().eval()
    captured = capture_model(model, (torch.randn(2, 3, 8),))
    x = torch.randn(4, 5, 8)
    value, expected = captured.graph(x), model(x)
    assert torch.equal(value, expected), "the casts of the region must be in the graph"
    with torch.no_grad():
        weight, bias = model.linear.weight, model.linear.bias
        full = ((x + 1) @ weight.T + bias) @ weight.T + bias
    assert (value - full).abs().max() > 16 * EPS * full.abs().max(), "bfloat16 must be felt"
    assert captured.graph(x).requires_grad


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_capture_inside_grad_contexts(context: Any) -> None:
    model = Block().eval()
    with context():
        captured = capture_model(model, (torch.randn(2, 3, 16),))
        x = torch.randn(2, 4, 16)
        assert torch.equal(captured.graph(x), model(x))


def test_other_dtypes() -> None:
    model = Block().to(torch.bfloat16).eval()
    captured = capture_model(model, (torch.randn(2, 3, 16, dtype=torch.bfloat16),))
    assert captured.graph(torch.randn(2, 5, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_train_mode_is_kept_and_said() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train()
    captured = capture_model(model, (torch.ones(2, 4),))
    assert "captured in train mode: dropout and batch statistics are active" in captured.notes
    assert (captured.graph(torch.ones(64, 4)) == 0).any()
    assert model.training
    quiet = capture_model(copy.deepcopy(model).eval(), (torch.ones(2, 4),))
    assert not any("train mode" in note for note in quiet.notes)


def test_caches_of_transformers_models() -> None:
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**sizes, intermediate_size=16, vocab_size=20)
    llama = transformers.LlamaForCausalLM(config).eval()
    ids = torch.arange(8).reshape(2, 4)
    captured = capture_model(llama, (ids,))
    with torch.no_grad():
        cache = captured.graph(ids).past_key_values
    assert type(cache) is transformers.DynamicCache
    step = capture_model(
        llama, (), {"input_ids": ids[:, :1], "past_key_values": copy.deepcopy(cache)}
    )
    assert {(d.dim, d.role) for d in step.dynamic if "past" in d.name} == {(0, B), (2, S)}


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_layers_of_torch_take_any_floating_mask(stack: str) -> None:
    """They look whether the mask is the causal one; the graph must be right if it is not."""
    torch.manual_seed(0)
    kind = nn.TransformerEncoderLayer if stack == "encoder" else nn.TransformerDecoderLayer
    layers = nn.TransformerEncoder if stack == "encoder" else nn.TransformerDecoder
    options = {"dim_feedforward": 16, "batch_first": True, "dropout": 0.0}
    model = layers(kind(8, 2, **options), 2).eval()
    sequences = tuple(torch.randn(2, 5, 8) for _ in range(1 if stack == "encoder" else 2))
    name = "mask" if stack == "encoder" else "tgt_mask"
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    captured = capture_model(model, sequences, {name: causal})
    for mask in (causal, torch.randn(5, 5), causal.mT.contiguous()):
        with torch.enable_grad():  # off the fast path, as the graph is
            value = captured.graph(*sequences, **{name: mask})
            original = model(*sequences, **{name: mask})
            wide = copy.deepcopy(model).double()
            reference = wide(*(x.double() for x in sequences), **{name: mask.double()})
        close(value, reference, original)
    hint = torch.nn.modules.transformer._detect_is_causal_mask
    assert hint(causal, None, 5) is True  # put back


# Errors


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x.sum()
        if y > 0:
            return x
        return x + 1


def test_error_names_the_line_and_two_remedies(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), pytest.raises(CaptureError) as caught:
        capture_model(Branches().eval(), (torch.ones(4, 6),))
    text = str(caught.value)
    assert "cannot capture Branches: a value computed from the inputs decides" in text
    assert f"{HERE}:" in text
    assert "in forward: `if y > 0:`" in text
    assert "(1)" in text
    assert "(2) torch.compile(model, backend='attn_rewrite')" in text
    assert "\n" not in text
    assert caught.value.exit_code == 3
    out, err = capfd.readouterr()
    assert out == err == ""
    assert not caplog.records


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return self.deeper(x)

    def deeper(self, x: Tensor) -> Tensor:
        return x.view(7, 7)


def test_error_of_the_model_names_the_deepest_line_of_the_model() -> None:
    with pytest.raises(CaptureError, match=r"in deeper: `return x.view\(7, 7\)`"):
        capture_model(Fails().eval(), (torch.ones(2, 3),))


@pytest.mark.parametrize(
    ("model", "args", "says"),
    [
        (lambda x: x, (torch.ones(2),), "expected a torch.nn.Module"),
        (nn.Linear(2, 2), (), "missing a required argument: 'input'"),
        (nn.Linear(2, 2), (torch.ones(2), 1), "too many positional arguments"),
    ],
)
def test_wrong_calls(model: Any, args: tuple[Any, ...], says: str) -> None:
    with pytest.raises(CaptureError, match=says):
        capture_model(model, args)


# No trace


class Remembers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.calls = 0
        self.log: list[Any] = []
        self.cache: dict[str, Any] = {}
        self.register_buffer("unused", torch.ones(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.log.append(x.shape)
        self.cache["last"] = 1
        return torch.dropout(self.linear(x), 0.5, self.training)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Remembers().train()
    model.linear.weight.grad = torch.ones(4, 4)
    seen: list[Any] = []
    handle = model.linear.register_forward_hook(lambda *_: seen.append(1))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    tensors = [*model.parameters(), *model.buffers()]
    if fails:
        monkeypatch.setattr(torch, "dropout", lambda *_: 1 / 0)
    torch.manual_seed(3)
    try:
        capture_model(model, (torch.ones(2, 4),))
    except CaptureError:
        assert fails
    after = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(3)), "the random state moved"
    assert (model.calls, model.log, model.cache) == (0, [], {})
    assert model.training
    assert all(
        a is b for a, b in zip(tensors, [*model.parameters(), *model.buffers()], strict=True)
    )
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert torch.equal(model.linear.weight.grad, torch.ones(4, 4))
    assert list(model.linear._forward_hooks) == [handle.id]
    assert not model._forward_hooks


class Table:
    """Not a module, as the rotary tables of Z-Image are not."""

    def __init__(self) -> None:
        self.values: Tensor | None = None

    def __call__(self, length: int) -> Tensor:
        if self.values is None:
            self.values = torch.arange(8.0)
        return self.values[:length]


@functools.lru_cache
def _positions(length: int) -> Tensor:
    return torch.arange(float(length))


class Keeps(nn.Module):
    """Keeps tensors in a plain object, in a cached method and in a cached function."""

    def __init__(self) -> None:
        super().__init__()
        self.table = Table()

    @functools.lru_cache(maxsize=8)  # noqa: B019
    def _row(self, length: int) -> Tensor:
        return torch.arange(float(length))

    def forward(self, x: Tensor) -> Tensor:
        length = int(x.shape[1])
        return x + self.table(length) + self._row(length) + _positions(length)


@pytest.mark.parametrize("warm", [False, True])
def test_the_model_runs_after_a_capture_although_it_keeps_tensors(warm: bool) -> None:
    _positions.cache_clear()
    model, x = Keeps(), torch.ones(2, 4)
    expected = 1 + 3 * torch.arange(4.0).expand(2, 4)
    if warm:
        model(x)
    graph = capture_model(model, (x,), dynamic_shapes={}).graph
    assert torch.equal(graph(x), expected)
    assert torch.equal(model(x), expected)
    assert type(model.table.values) is Tensor


def test_parameters_and_buffers_are_shared_by_identity() -> None:
    model = Remembers().eval()
    model.tied = model.linear
    captured = capture_model(model, (torch.ones(2, 4),))
    own = {id(p) for p in model.parameters()}
    assert own == {id(p) for p in captured.graph.parameters()}
    buffers = {b.data_ptr() for b in model.buffers()}
    assert {b.data_ptr() for b in captured.graph.buffers()} <= buffers
    with torch.no_grad():
        model.linear.weight.zero_()
        model.linear.bias.fill_(3.0)
    assert torch.equal(captured.graph(torch.ones(2, 4)), torch.full((2, 4), 3.0))


def test_hooks_are_said() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].register_forward_hook(lambda _m, _i, out: out * 2)
    captured = capture_model(model.eval(), (torch.ones(2, 4),))
    assert "forward hooks (on 0) were traced into the graph" in captured.notes
    assert torch.equal(captured.graph(torch.ones(2, 4)), model(torch.ones(2, 4)))
