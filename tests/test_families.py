"""Six families, from a checkpoint folder to PyTorch and ONNX Runtime, by the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import attn_rewrite as ar
from attn_rewrite.checkpoint import load_model
from attn_rewrite.cli.app import run

WIDTHS = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}


def bert() -> torch.nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(vocab_size=99, max_position_embeddings=128, **WIDTHS))


def gpt2() -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(vocab_size=99, **sizes))


def llama() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(vocab_size=99, num_key_value_heads=2, **WIDTHS))


def t5() -> torch.nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(vocab_size=99, decoder_start_token_id=0, **sizes))


def vit() -> torch.nn.Module:
    from transformers import ViTConfig, ViTModel

    return ViTModel(ViTConfig(image_size=32, patch_size=4, **WIDTHS))


def dit() -> torch.nn.Module:
    from diffusers import DiTTransformer2DModel

    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "sample_size": 16}
    other = {"in_channels": 4, "patch_size": 2, "num_embeds_ada_norm": 10, "norm_num_groups": 1}
    return DiTTransformer2DModel(**sizes, **other)


# Attentions of each, counted by hand: layers x attentions a layer has.
FAMILIES: dict[str, tuple[Callable[[], torch.nn.Module], int]] = {
    "bert": (bert, 2),
    "gpt2": (gpt2, 2),
    "llama": (llama, 2),
    "t5": (t5, 2 + 2 * 2),
    "vit": (vit, 2),
    "dit": (dit, 2),
}


LONG = {"t5", "dit"}
PARAMS = [pytest.param(n, marks=[pytest.mark.slow] * (n in LONG)) for n in FAMILIES]


@pytest.fixture(scope="module", params=PARAMS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("family") / request.param
    FAMILIES[request.param][0]().eval().save_pretrained(folder)
    return folder


def test_inspect(family: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(family), "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert len(document["sites"]) == FAMILIES[family.name][1]
    assert all(site["rewritable"] for site in document["sites"])
    assert document["refusals"] == []


@pytest.mark.parametrize(
    "policy", [pytest.param("exact", marks=pytest.mark.slow), "window(size=16)"]
)
def test_optimize_and_export(
    family: Path, policy: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["--policy", policy, "--export", "onnx", "-o", str(out), "--length", "48"]
    assert run(["optimize", str(family), *words, "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    approximated = policy != "exact"
    for site in report["sites"]:
        # T5's cross-attention has no positions to compare: the window leaves it, and says so.
        refused = approximated and site["facts"]["kind"] == "cross"
        wanted = "refused" if refused else "unbudgeted" if approximated else "rewritten"
        assert site["status"] == wanted, site
        assert bool(site["refusals"]) == refused
    loaded = load_model(family, length=48)
    original = first(loaded.model(**loaded.kwargs))
    rewritten = first(ar.load(out)(**loaded.kwargs))
    near = torch.allclose(original, rewritten, rtol=1e-4, atol=1e-5)
    assert near is not approximated, "exact must agree, and a window must be felt"
    in_onnx = first_of_onnx(out / "model.onnx", loaded.kwargs)
    torch.testing.assert_close(in_onnx, rewritten, rtol=1e-4, atol=1e-5)


def first(output: object) -> torch.Tensor:
    """The first tensor of a model's output: states, logits or a sample."""
    return next(t for t in torch.utils._pytree.tree_leaves(output) if isinstance(t, torch.Tensor))


def first_of_onnx(path: Path, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    wanted = {value.name for value in session.get_inputs()}
    feed: dict[str, np.ndarray] = {
        name: value.numpy() for name, value in inputs.items() if name in wanted
    }
    assert set(feed) == wanted
    return torch.from_numpy(session.run(None, feed)[0])
