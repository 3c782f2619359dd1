"""The bound of an export where scores are large: what rounding explains passes, a fault does not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import attn_rewrite as ar
from attn_rewrite import export_onnx
from attn_rewrite.backends.onnx.artifact import against_program
from attn_rewrite.backends.onnx.oracle import as_arrays, example_inputs, expected
from attn_rewrite.errors import VerifyError

HEADS, D, WIDTH, N = 4, 16, 64, 24


class Large(nn.Module):
    """Causal attention with a bias by distance, its scores without a scale and in the hundreds."""

    def __init__(self, times: float) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)
        self.distance = nn.Parameter(torch.randn(HEADS, 2 * N))
        with torch.no_grad():
            for layer in (self.q, self.k, self.v, self.out):
                layer.weight.mul_(times)
        self.scale, self.ahead, self.biased, self.turned = 1.0, 1, True, False

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, HEADS, D).transpose(1, 2) for f in (self.q, self.k, self.v))
        at = torch.arange(n)
        score = self.scale * self.product(q, k)
        if self.biased:
            score = score + self.distance[:, at[:, None] - at + N]
        score = score.masked_fill(at - at[:, None] >= self.ahead, -torch.inf)
        y = self.product(score.softmax(-1), v.mT).transpose(1, 2).reshape(b, n, WIDTH)
        return self.out(y)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """``a @ b.mT``, or the same products added up another way."""
        if not self.turned:
            return a @ b.mT
        return sum(a[..., i, None] * b[..., None, :, i] for i in reversed(range(a.shape[-1])))


class Stack(nn.Module):
    """Three of them, each on the last one's normalised sum: what one rounds the next magnifies."""

    def __init__(self, times: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Large(times) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(nn.functional.layer_norm(x, (WIDTH,)))
        return x


def x(seed: int = 1) -> Tensor:
    return torch.randn(2, N, WIDTH, generator=torch.Generator().manual_seed(seed))


def compared(model: Stack, **changes: object) -> dict[str, float]:
    """What the model with one changed layer gives in float32, compared as if a file had given it."""
    program = torch.export.export(model, (x(),))
    for name, value in changes.items():
        assert getattr(model.layers[1], name) != value
        setattr(model.layers[1], name, value)
    with torch.no_grad():
        got = {"output": model(x()).numpy()}
    return against_program("m.onnx", program, None, {"x": x().numpy()}, got)


def test_another_order_of_adding_up_passes() -> None:
    """Also where it is further off than twice the model's own run, as some of these are."""
    beyond = 0
    for times in (1.0, 4.0, 8.0, 16.0):
        model = Stack(times)
        program = torch.export.export(model, (x(),))
        for layer in model.layers:
            layer.turned = True
        for seed in range(24):
            inputs = {"x": x(seed).numpy()}
            with torch.no_grad():
                got = {"output": model(x(seed)).numpy()}
            error = against_program("m.onnx", program, None, inputs, got)["output"]
            beyond += error > expected(program, inputs).bounds["output"]
    assert beyond > 0


@pytest.mark.parametrize("times", [1.0, 4.0, 8.0])
@pytest.mark.parametrize(
    "change",
    [{"scale": 1.001}, {"scale": 1 - 1e-3}, {"ahead": 2}, {"ahead": 0}, {"biased": False}],
)
def test_a_fault_does_not(times: float, change: dict[str, object]) -> None:
    with pytest.raises(VerifyError, match="the export is wrong"):
        compared(Stack(times), **change)


def t5(seed: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model that sums scores without a scale, with weights four times those it starts with."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    config = T5Config(vocab_size=128, decoder_start_token_id=0, dropout_rate=0.0, **sizes)
    model = T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)
    ids, later = torch.randint(0, 128, (2, 24)), torch.randint(0, 128, (2, 12))
    return model, {"input_ids": ids, "decoder_input_ids": later, "use_cache": False}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory):
    """One of the models whose own run is less far off than ONNX Runtime's."""
    model, inputs = t5(0)
    done = ar.optimize(model, "exact", (), inputs, verify=False)
    return done, export_onnx(done, tmp_path_factory.mktemp("t5") / "m.onnx")


def arrays(done: ar.OptimizedModule) -> dict[str, np.ndarray]:
    return as_arrays(example_inputs(done.program)[0])


@pytest.mark.slow
def test_t5_with_large_scores_leaves(exported) -> None:
    done, artifact = exported
    assert artifact.errors.keys() >= {"logits", "encoder_last_hidden_state"}
    assert artifact.verify(arrays(done)).keys() == artifact.errors.keys()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("encoder.block.0.layer.0.SelfAttention.q.weight", lambda w: w * 1.001),
        ("decoder.block.0.layer.0.SelfAttention.v.weight", lambda w: w * 1.001),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", torch.zeros_like),
    ],
)
def test_a_file_of_other_weights_does_not(
    key: str, change: Callable[[Tensor], Tensor], exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same fault from the other side: the file is right, and the program has changed."""
    done, artifact = exported
    inputs = arrays(done)
    got, held = artifact.run(inputs), done.program.state_dict
    monkeypatch.setitem(held, key, nn.Parameter(change(held[key].detach())))
    with pytest.raises(VerifyError, match="the export is wrong"):
        against_program("m.onnx", done.program, None, inputs, got)
