"""Encoders with decoders as ONNX: without a cache, and as a first call and its later steps."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import attn_rewrite as ar
from attn_rewrite import export_onnx
from attn_rewrite.backends.onnx.artifact import OnnxArtifact
from attn_rewrite.cli.app import run
from attn_rewrite.decoding import capture_step
from attn_rewrite.errors import PolicyError

NEW = 6
PARTS = ("key", "value")
Given = dict[str, torch.Tensor]
SIZES = {
    "vocab_size": 99, "d_model": 32, "encoder_layers": 1, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def translations_read_once() -> Iterator[None]:
    """torch reads its 500 translations anew at every export, a third of the time of a small one."""
    import onnxscript._framework_apis.torch_2_5 as apis

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(apis, "get_torchlib_ops", functools.cache(apis.get_torchlib_ops))
        yield


def t5() -> torch.nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    config = T5Config(vocab_size=99, num_decoder_layers=2, decoder_start_token_id=0, **sizes)
    return T5ForConditionalGeneration(config)


def bart() -> torch.nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration

    return BartForConditionalGeneration(BartConfig(max_position_embeddings=64, **SIZES))


def marian() -> torch.nn.Module:
    from transformers import MarianConfig, MarianMTModel

    places = {"max_position_embeddings": 64, "pad_token_id": 0, "decoder_start_token_id": 0}
    return MarianMTModel(MarianConfig(**places, **SIZES))


def whisper() -> torch.nn.Module:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    places = {"max_source_positions": 20, "max_target_positions": 64, "num_mel_bins": 8}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return WhisperForConditionalGeneration(WhisperConfig(**places, **tokens, **SIZES))


MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "t5": t5, "bart": bart, "marian": marian, "whisper": whisper
}  # fmt: skip


def source(model: torch.nn.Module, batch: int, length: int) -> Given:
    """What the encoder reads, with padding where it is text."""
    random = torch.Generator().manual_seed(length)
    if model.main_input_name == "input_features":
        return {"input_features": torch.randn(batch, 8, 40, generator=random)}
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, length // 2 :] = 0
    ids = torch.randint(3, 99, (batch, length), generator=random)
    return {"input_ids": ids, "attention_mask": mask}


def begun(batch: int, length: int) -> Given:
    random = torch.Generator().manual_seed(length + 50)
    return {"decoder_input_ids": torch.randint(3, 99, (batch, length), generator=random)}


@functools.cache
def made(name: str, policy: str = "exact") -> tuple[torch.nn.Module, Any]:
    """A model and its rewriting by name, made once."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    # Random weights alone repeat one token; larger ones make the next token depend on the past.
    factor = 1.5 if name == "t5" else 4  # T5 does not scale its scores
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor if parameter.dim() > 1 else 1)
    example = source(model, 2, 13) | begun(2, 10)
    chosen = ar.Policy.parse(policy)
    if policy != "exact":
        where = ar.Where(layer="*decoder*", kind="self")
        chosen = ar.Policy(rules=[ar.Rule(where=where, apply=[policy])])
    return model, ar.optimize(model, chosen, (), example, verify=False)


def by_hand(model: torch.nn.Module, given: Given, tokens: torch.Tensor) -> np.ndarray:
    """The most likely tokens after ``tokens``: the whole model anew for every one, no cache."""
    for _ in range(NEW):
        with torch.no_grad():
            logits = model(**given, decoder_input_ids=tokens).logits
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
    return tokens[:, -NEW:].numpy()


def by_files(first: OnnxArtifact, step: OnnxArtifact, given: Given, tokens: Any) -> np.ndarray:
    """The same by two files: the first call, then what the last call returned."""
    feed = {n: t.numpy() for n, t in given.items()} | {"decoder_input_ids": tokens.numpy()}
    wanted, found, session = {s.name for s in step.inputs}, [], step.session()
    names = [s.name for s in step.outputs]
    out = first.run(feed)
    for _ in range(NEW):
        found.append(out["logits"][:, -1].argmax(-1))
        feed["decoder_input_ids"] = found[-1][:, None]
        feed |= {f"past_key_values.{n[8:]}": a for n, a in out.items() if n.startswith("present.")}
        out = dict(zip(names, session.run(names, {n: feed[n] for n in wanted}), strict=True))
    return np.stack(found, 1)


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("bart", "onnxruntime"),
        pytest.param("t5", "portable", marks=pytest.mark.slow),
        pytest.param("whisper", "portable", marks=pytest.mark.slow),
        pytest.param("marian", "onnxruntime", marks=pytest.mark.slow),
        pytest.param("t5", "onnxruntime", marks=pytest.mark.slow),
    ],
)
def test_greedy_generation_equals_pytorch(name: str, target: str, tmp_path: Path) -> None:
    model, done = made(name)
    first = export_onnx(done, tmp_path / "first.onnx", target=target)
    step = export_onnx(done, tmp_path / "step.onnx", target=target, cache="float")
    parts = [f"{i}.{o}.{p}" for i in range(2) for o in ("decoder", "encoder") for p in PARTS]
    assert {s.name for s in first.outputs if "." in s.name} == {f"present.{n}" for n in parts}
    assert {s.name for s in step.inputs if "." in s.name} == {f"past_key_values.{n}" for n in parts}
    own = [n for n in parts if "encoder" not in n]
    assert {s.name for s in step.outputs} == {"logits", *(f"present.{n}" for n in own)}
    assert not any(s.name.startswith(("input", "encoder")) for s in step.inputs)
    extents = [n for s in (*first.inputs, *first.outputs) for n in s.shape]
    assert not any(isinstance(n, str) and n.isdecimal() for n in extents)
    shapes = {s.name: s.shape for s in step.inputs}
    assert shapes["past_key_values.1.decoder.value"] == ("batch", 4, "past_sequence", 8)
    assert shapes["decoder_input_ids"] == ("batch", "decoder_sequence")
    rewritten = {s.name for s in done.report.sites if "decoder" in s.name}
    assert {s.name for s in step.sites} == rewritten
    if name != "t5" and target == "onnxruntime":  # T5 adds a bias to its scores
        forms = {s.name: s.form for s in step.sites}
        assert {f for n, f in forms.items() if "self_attn" in n} == {"GroupQueryAttention"}
    seen: set[int] = set()
    for batch, length, prompt in ((2, 13, 1), (1, 5, 3), (3, 20, 4)):
        given, tokens = source(model, batch, length), begun(batch, prompt)["decoder_input_ids"]
        wanted = by_hand(model, given, tokens)
        seen |= set(wanted.flat)
        np.testing.assert_array_equal(by_files(first, step, given, tokens), wanted)
    assert len(seen) > 4, "the model repeats itself: the test would see nothing"


@pytest.mark.slow
def test_a_window_on_what_the_decoder_wrote(tmp_path: Path) -> None:
    """The later steps of a decoder with a window are those of the rewritten model."""
    model, done = made("t5", "window(size=4, sinks=1)")
    step = export_onnx(done, tmp_path / "step.onnx", cache="float")
    first = export_onnx(done, tmp_path / "first.onnx")
    forms = {s.name: s.form for s in step.sites}
    assert {f for n, f in forms.items() if "SelfAttention" in n} == {"tiles"}
    given, tokens = source(model, 2, 13), begun(2, 8)["decoder_input_ids"]
    wanted = by_hand(done, given, tokens)
    assert (by_hand(model, given, tokens) != wanted).any()
    np.testing.assert_array_equal(by_files(first, step, given, tokens), wanted)


@pytest.mark.slow
def test_codes_hold_what_the_decoder_wrote(tmp_path: Path) -> None:
    _, done = made("bart")
    step = export_onnx(done, tmp_path / "step.onnx", cache="int8")
    kinds = {s.name: s.dtype for s in (*step.inputs, *step.outputs)}
    assert {t for n, t in kinds.items() if ".decoder." in n} == {"int8"}
    assert {t for n, t in kinds.items() if ".encoder." in n} == {"float32"}
    assert 1e-4 < step.approximation["logits"] < 0.1
    assert step.errors["logits"] < 1e-5


class _Reads(torch.nn.Module):
    """A step that adds the encoder's states to its logits."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner, self.config, self.main_input_name = inner, inner.config, "input_ids"

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        decoder_input_ids: Any = None,
        encoder_outputs: Any = None,
        past_key_values: Any = None,
        use_cache: Any = None,
    ) -> Any:
        out = self.inner(
            input_ids=input_ids, attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids, encoder_outputs=encoder_outputs,
            past_key_values=past_key_values, use_cache=use_cache,
        )  # fmt: skip
        out.logits = out.logits + out.encoder_last_hidden_state.mean()
        return out


def test_steps_that_cannot_be_are_refused() -> None:
    torch.manual_seed(0)
    model = MODELS["bart"]().eval()
    text, tokens = source(model, 2, 13), begun(2, 10)
    with pytest.raises(PolicyError, match="reads the encoder's states, not only its keys"):
        capture_step(_Reads(model), (), text | tokens)
    with pytest.raises(PolicyError, match="has no decoder_input_ids of"):
        capture_step(model, (), text)
    with pytest.raises(PolicyError, match="has 3 decoder_input_ids, expected at least 4"):
        capture_step(model, (), text | begun(2, 3))
    given = {"inputs_embeds": torch.randn(2, 13, 32), "attention_mask": text["attention_mask"]}
    with pytest.raises(PolicyError, match="nothing is known of what inputs_embeds is at a later"):
        capture_step(model, (), given | tokens)
    done = ar.optimize(model, "kv_int8", (), text | tokens, verify=False)
    with pytest.raises(PolicyError, match="only decoders alone are packed"):
        done.with_packed_cache()


def test_a_step_does_what_was_planned_of_the_attentions_it_has() -> None:
    """A rule for the encoder alone matches nothing of a step, which has no encoder."""
    torch.manual_seed(0)
    model = MODELS["bart"]().eval()
    rules = [ar.Rule(where=ar.Where(layer="*.encoder.layers*"), apply=["window(size=4)"])]
    example = source(model, 2, 13) | begun(2, 10)
    done = ar.optimize(model, ar.Policy(rules=rules), (), example, verify=False)
    planned = {s.site for s in done.plan.steps}
    assert any(".encoder.layers" in name for name in planned)
    step = done.with_cache()
    assert {s.site for s in step.plan.steps} == {n for n in planned if ".decoder." in n}
    assert {s.name for s in step.report.sites} == {n for n in planned if ".decoder." in n}


@pytest.mark.slow
def test_the_command_exports_and_verifies(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, _ = made("t5")
    model.save_pretrained(tmp_path / "model")
    words = ["--policy", "exact", "--export", "onnx", "--cache", "float", "--length", "16"]
    out = str(tmp_path / "out")
    assert run(["optimize", str(tmp_path / "model"), *words, "-o", out, "--json"]) == 0
    (export,) = json.loads(capfd.readouterr().out)["exports"]
    assert export["cache"] == "float"
    assert run(["verify", out, "--json"]) == 0
    errors = json.loads(capfd.readouterr().out)["errors"]["model.onnx"]
    assert errors["present.1.decoder.value"] < 1e-4
    assert not any(".encoder." in name for name in errors)
