"""Decoders with their cache as ONNX: greedy generation in ONNX Runtime gives PyTorch's tokens."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import attn_rewrite as ar
from attn_rewrite import export_onnx
from attn_rewrite.backends.onnx.artifact import OnnxArtifact
from attn_rewrite.backends.onnx.codes import Codes
from attn_rewrite.cli.app import run
from attn_rewrite.errors import AttnRewriteError, LowerError, PolicyError, VerifyError
from attn_rewrite.passes.sparse.window import Window
from attn_rewrite.site import Refusal

WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "vocab_size": 99}
NEW = 6


def llama() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **WIDTHS))


def gpt2() -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(vocab_size=99, **sizes))


def qwen3() -> torch.nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16}
    return Qwen3ForCausalLM(Qwen3Config(**heads, **WIDTHS))


MODELS: dict[str, Callable[[], torch.nn.Module]] = {"llama": llama, "gpt2": gpt2, "qwen3": qwen3}


def prompt(batch: int, length: int, *, padded: bool = False) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(length)
    mask = torch.ones(batch, length, dtype=torch.long)
    if padded:
        mask[0, : length // 2] = 0
    return {
        "input_ids": torch.randint(3, 99, (batch, length), generator=random),
        "attention_mask": mask,
    }


def made(name: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    # Random weights alone repeat one token; larger ones make the next token depend on the past.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    return model, prompt(2, 12)


def generated(artifact: OnnxArtifact, given: dict[str, torch.Tensor], steps: int) -> np.ndarray:
    """Greedy tokens by the file alone: an empty cache, then what the last call returned."""
    session = artifact.session()
    feed = {n: t.numpy() for n, t in given.items()}
    batch = feed["input_ids"].shape[0]
    for spec in artifact.inputs:
        if spec.name.startswith("past_key_values."):
            shape = [batch, spec.shape[1], 0, spec.shape[3]]
            feed[spec.name] = np.zeros(shape, spec.dtype)
    names, tokens = [s.name for s in artifact.outputs], []
    wanted = {s.name for s in artifact.inputs}
    for _ in range(steps):
        held = feed["attention_mask"].cumsum(-1) - 1
        feed["position_ids"] = held.clip(0)[:, -feed["input_ids"].shape[1] :]
        out = dict(zip(names, session.run(names, {n: feed[n] for n in wanted}), strict=True))
        tokens.append(out["logits"][:, -1].argmax(-1))
        feed["input_ids"] = tokens[-1][:, None]
        feed["attention_mask"] = np.pad(feed["attention_mask"], ((0, 0), (0, 1)), constant_values=1)
        feed |= {f"past_key_values.{n[8:]}": a for n, a in out.items() if n.startswith("present.")}
    return np.stack(tokens, 1)


def greedy(
    model: Any, given: dict[str, torch.Tensor], steps: int, codes: Codes | None = None
) -> np.ndarray:
    """The tokens that transformers generates, with ``codes`` from a cache that is rounded to them."""
    options = {"do_sample": False, "max_new_tokens": steps, "min_new_tokens": steps}
    if codes is not None:
        options["past_key_values"] = rounded_cache(codes)
    with torch.no_grad():
        ids = model.generate(**given, **options, use_cache=True, pad_token_id=0)
    return ids[:, given["input_ids"].shape[1] :].numpy()


def rounded_cache(codes: Codes) -> Any:
    """A cache of transformers that holds, of every number, what its code of 8 bits stands for."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    scales = {n: torch.from_numpy(a) for n, a in codes.scales.items()}

    class Rounded(DynamicLayer):
        def __init__(self, index: int) -> None:
            super().__init__()
            self.scales = [scales[f"past_key_values.{index}.{part}"] for part in ("key", "value")]

        def update(self, keys: torch.Tensor, values: torch.Tensor, *rest: Any, **more: Any) -> Any:
            pair = zip((keys, values), self.scales, strict=True)
            held = ((x / s).round().clamp(-128, 127) * s for x, s in pair)
            return super().update(*held, *rest, **more)

    cache = DynamicCache()
    cache.layers = [Rounded(i) for i in range(len(scales) // 2)]
    return cache


@pytest.fixture(scope="module")
def decoders() -> Callable[[str], tuple[torch.nn.Module, Any]]:
    """A model and its rewritten step by name, made once."""

    @functools.cache
    def make(name: str) -> tuple[torch.nn.Module, Any]:
        model, example = made(name)
        return model, ar.optimize(model, "exact", (), example, verify=False)

    return make


FORMS = {"portable": "half", "onnxruntime": "GroupQueryAttention"}
PAIRS = [
    ("llama", "onnxruntime"),
    pytest.param("llama", "portable", marks=pytest.mark.slow),
    pytest.param("gpt2", "onnxruntime", marks=pytest.mark.slow),
    pytest.param("qwen3", "onnxruntime", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "target"), PAIRS)
def test_greedy_generation_equals_pytorch(
    decoders: Callable[[str], tuple[torch.nn.Module, Any]], name: str, target: str, tmp_path: Path
) -> None:
    model, done = decoders(name)
    artifact = export_onnx(done, tmp_path / "m.onnx", target=target, cache="float")
    assert [s.form for s in artifact.sites] == [FORMS[target]] * 2
    assert {s.name for s in artifact.sites} == {s.name for s in done.report.sites}
    names = [s.name for s in artifact.inputs]
    # Learned positions: where a text begins under padding is the caller's to say.
    positions = ["position_ids"] if name == "gpt2" else []
    assert [n for n in names if "." not in n] == ["input_ids", "attention_mask", *positions]
    assert {n.removeprefix("past_key_values.") for n in names if "." in n} == {
        f"{i}.{part}" for i in range(2) for part in ("key", "value")
    }
    shapes = {s.name: s.shape for s in artifact.inputs}
    assert shapes["attention_mask"] == ("batch", "total_sequence")
    assert shapes["past_key_values.1.value"][::2] == ("batch", "past_sequence")
    seen: set[int] = set()
    for given in (prompt(1, 7), prompt(3, 20), prompt(2, 9, padded=True)):
        wanted = greedy(model, given, NEW)
        seen |= set(wanted.flat)
        np.testing.assert_array_equal(generated(artifact, given, NEW), wanted)
    assert len(seen) > 4, "the model repeats itself: the test would see nothing"
    if target == "onnxruntime":
        check_operators(artifact.path, getattr(model.config, "num_key_value_heads", 4))


def check_operators(path: Path, heads: int, **options: int | bytes) -> None:
    """One GroupQueryAttention a layer, over keys that are not repeated, and tiles beside it."""
    calls = [n for f in onnx.load(path).functions for n in f.node if n.op_type == "If"]
    assert len(calls) == 2
    for call in calls:
        branches = {a.name: {n.op_type: n for n in a.g.node} for a in call.attribute}
        assert "Scan" in branches["else_branch"]
        operator = branches["then_branch"]["GroupQueryAttention"]
        found = {a.name: a.i if a.type == a.INT else a.s for a in operator.attribute}
        wanted = {"num_heads": 4, "kv_num_heads": heads, **options}
        assert wanted.items() <= found.items()


@pytest.mark.slow
@pytest.mark.parametrize("target", ["portable", "onnxruntime"])
def test_a_cache_of_codes(
    decoders: Callable[[str], tuple[torch.nn.Module, Any]], target: str, tmp_path: Path
) -> None:
    model, done = decoders("llama")
    artifact = export_onnx(done, tmp_path / "m.onnx", target=target, cache="int8")
    dtypes = {s.name: s.dtype for s in (*artifact.inputs, *artifact.outputs)}
    cached = {n for n in dtypes if n.startswith(("past_key_values.", "present."))}
    assert {dtypes[n] for n in cached} == {"int8"}
    assert len(cached) == 8
    # The codes are an approximation, the file's own error is not: it is that of float32.
    assert 1e-4 < artifact.approximation["logits"] < 0.05
    assert artifact.errors["logits"] < 1e-5
    assert max(artifact.errors[n] for n in cached if n.startswith("present.")) < 0.51
    if target == "onnxruntime":
        check_operators(artifact.path, 2, kv_cache_bit_width=8, k_quant_type=b"PER_CHANNEL")
    codes = artifact.codes
    assert codes is not None
    assert Codes.from_text(codes.to_text()).scales.keys() == codes.scales.keys()
    for given in (prompt(1, 7), prompt(3, 20), prompt(2, 9, padded=True)):
        wanted = greedy(model, given, NEW, codes)
        np.testing.assert_array_equal(generated(artifact, given, NEW), wanted)


@pytest.mark.parametrize("name", MODELS)
def test_positions_are_asked_for_where_they_are_learned(name: str) -> None:
    from attn_rewrite.decoding import step_inputs

    torch.manual_seed(0)
    step = step_inputs(MODELS[name]().eval(), (), prompt(2, 8, padded=True))
    if name != "gpt2":
        assert "position_ids" not in step
        return
    assert step["position_ids"].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert step["input_ids"].shape == (2, 4)
    assert step["attention_mask"].shape == (2, 8)


def test_what_a_cache_returns_is_found_behind_an_empty_append() -> None:
    """A cache that is rebuilt where it is returned, as the exporter of torch writes it."""
    from attn_rewrite.backends.onnx.oracle import expected

    class Appends(torch.nn.Module):
        def forward(self, past: torch.Tensor, new: torch.Tensor) -> dict[str, torch.Tensor]:
            held = torch.cat([past, new], -2)
            return {"total": held.sum((1, 2)), "held": torch.cat([past.new_zeros(0), held], -2)}

    past, new = torch.randn(2, 1, 3, 4), torch.randn(2, 1, 2, 4)
    program = torch.export.export(Appends(), (past, new))
    given = {"held": np.ones((2, 1, 5, 4), np.float32)}
    found = expected(program, {"past": past, "new": new}, given)
    np.testing.assert_array_equal(found.outputs["total"], np.full((2, 4), 5.0))
    np.testing.assert_allclose(found.appended["held"], torch.cat([past, new], -2).numpy())


def test_codes_that_are_not_the_nearest_are_found() -> None:
    codes = Codes({"past_key_values.0.key": np.full((1, 2, 1, 4), 0.1, np.float32)})
    exact = {"present.0.key": np.linspace(-9, 9, 24).reshape(1, 2, 3, 4)}
    slack = {"present.0.key": 1e-6}
    right = np.clip(np.round(exact["present.0.key"] / np.float32(0.1)), -128, 127)
    assert codes.check({"present.0.key": right}, exact, slack)["present.0.key"] <= 0.5 + 1e-4
    with pytest.raises(VerifyError, match="steps off"):
        codes.check({"present.0.key": right + 1}, exact, slack)


@pytest.mark.slow
def test_a_window_over_a_cache_reads_only_its_keys(tmp_path: Path) -> None:
    model, example = made("llama")
    done = ar.optimize(model, "window(size=4, sinks=1)", (), example)
    artifact = export_onnx(done, tmp_path / "m.onnx", target="onnxruntime", cache="float")
    assert {s.form for s in artifact.sites} == {"tiles"}
    assert {s.name for s in artifact.sites} == {s.name for s in done.report.sites}
    given = prompt(2, 20)
    assert (generated(artifact, given, 3) != greedy(model, given, 3)).any()
    # One call over the whole text, without a past, is what the optimized module computes.
    past = {s.name: s for s in artifact.inputs if s.name.startswith("past")}
    feed = {n: t.numpy() for n, t in given.items()}
    feed |= {n: np.zeros([2, s.shape[1], 0, s.shape[3]], s.dtype) for n, s in past.items()}
    with torch.no_grad():
        wanted = done(**given).logits.numpy()
    np.testing.assert_allclose(artifact.run(feed)["logits"], wanted, rtol=1e-4, atol=1e-5)


def test_a_cache_that_cannot_be_is_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(num_attention_heads=4, max_position_embeddings=32, **WIDTHS)
    done = ar.optimize(BertModel(config).eval(), "exact", (), prompt(2, 12))
    place = tmp_path / "m.onnx"
    for options, error, words in (
        ({"cache": "float"}, PolicyError, "decoder-only"),
        ({"cache": "int4"}, PolicyError, "unknown cache 'int4'"),
    ):
        with pytest.raises(error, match=words):
            export_onnx(done, place, **options)
    with pytest.raises(PolicyError, match="needs what optimize returned"):
        export_onnx(done.program, place, cache="float")
    ar.save(done, tmp_path / "saved")
    with pytest.raises(AttnRewriteError, match="source module"):
        export_onnx(ar.load(tmp_path / "saved"), place, cache="float")
    assert not place.exists()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "cache"), [("llama", "int8"), ("gpt2", "float")])
def test_the_command_exports_and_verifies(
    name: str, cache: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, _ = made(name)
    model.save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    words = ["--policy", "exact", "--export", "onnx:onnxruntime", "--cache", cache]
    sizes = ["--length", "16", "-o", str(out), "--json"]
    assert run(["optimize", str(tmp_path / "model"), *words, *sizes]) == 0
    (export,) = json.loads(capfd.readouterr().out)["exports"]
    assert (export["file"], export["cache"]) == ("model.onnx", cache)
    assert bool(export["approximation"]) == (cache == "int8")
    assert run(["verify", str(out), "--json"]) == 0
    errors = json.loads(capfd.readouterr().out)["errors"]
    assert errors["model.onnx"]["logits"] < 1e-4
    assert "present.1.value" in errors["model.onnx"]


def test_a_step_that_cannot_be_as_sparse_is_refused(tmp_path: Path) -> None:
    """No step attends to every key where the first call has a window: it is refused, with why."""
    window = Window(size=6)
    plan = SimpleNamespace(steps=(SimpleNamespace(site="a#0", transforms=(window,)),))
    why = Refusal("window-joint", "the window is lost", site="a#0")
    site = SimpleNamespace(name="a#0", status="refused", refusals=(why,))
    step = SimpleNamespace(report=SimpleNamespace(sites=(site,)))
    done = SimpleNamespace(
        plan=plan, with_cache=lambda: step, at_one_length=None, report=step.report
    )
    with pytest.raises(LowerError, match="in a step with a cache the window is lost"):
        export_onnx(done, tmp_path / "m.onnx", cache="float")
    assert not list(tmp_path.iterdir())
