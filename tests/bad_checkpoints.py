"""Checkpoint folders for tests: a tiny good one, and one broken in every way users meet.

Each builder takes an empty folder and fills it; `BAD` maps a name to its builder and to words that
the one-sentence error must contain.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

HIDDEN = 32


def tiny_bert(folder: Path, **settings: Any) -> Path:
    """A BERT of one layer, 32 wide, 2 heads, with random weights (seed 0)."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        vocab_size=60,
        max_position_embeddings=40,
        **settings,
    )
    BertModel(config).eval().save_pretrained(folder)
    return folder


def sharded_bert(folder: Path) -> Path:
    """The tiny BERT in two shards and an index."""
    tiny_bert(folder)
    single = folder / "model.safetensors"
    weights = load_file(single)
    names = sorted(weights)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, keys in halves.items():
        tensors = {k: weights[k] for k in keys}
        save_file(tensors, folder / shard, metadata={"format": "pt"})
    single.unlink()
    weight_map = {key: shard for shard, keys in halves.items() for key in keys}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON object in place."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def without_config(folder: Path) -> None:
    (tiny_bert(folder) / "config.json").unlink()


def invalid_json(folder: Path) -> None:
    (tiny_bert(folder) / "config.json").write_text('{"model_type": "bert",')


def json_list(folder: Path) -> None:
    (tiny_bert(folder) / "config.json").write_text("[1, 2]")


def binary_config(folder: Path) -> None:
    (tiny_bert(folder) / "config.json").write_bytes(b"\xff\xfe\x00\x01")


def no_weights(folder: Path) -> None:
    (tiny_bert(folder) / "model.safetensors").unlink()


def truncated(folder: Path) -> None:
    path = tiny_bert(folder) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def corrupted_header(folder: Path) -> None:
    path = tiny_bert(folder) / "model.safetensors"
    path.write_bytes(b"\xff" * 64 + path.read_bytes()[64:])


def empty_weights(folder: Path) -> None:
    (tiny_bert(folder) / "model.safetensors").write_bytes(b"")


def truncated_shard(folder: Path) -> None:
    path = sharded_bert(folder) / "b.safetensors"
    path.write_bytes(path.read_bytes()[:50])


def missing_shard(folder: Path) -> None:
    (sharded_bert(folder) / "b.safetensors").unlink()


def _point_index(folder: Path, target: str) -> None:
    index = sharded_bert(folder) / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    weight_map[sorted(weight_map)[0]] = target
    edit_json(index, weight_map=weight_map)


def index_upwards(folder: Path) -> None:
    save_file({"x": torch.zeros(1)}, folder.parent / "outside.safetensors")
    _point_index(folder, "../outside.safetensors")


def index_absolute(folder: Path) -> None:
    outside = folder.parent / "outside.safetensors"
    save_file({"x": torch.zeros(1)}, outside)
    _point_index(folder, str(outside))


def index_of_another(folder: Path) -> None:
    _point_index(folder, "b.safetensors")  # the first name is in a.safetensors


def index_without_map(folder: Path) -> None:
    (sharded_bert(folder) / "model.safetensors.index.json").write_text("{}")


def unknown_type(folder: Path) -> None:
    edit_json(tiny_bert(folder) / "config.json", model_type="berrt")


def unknown_architecture(folder: Path) -> None:
    edit_json(tiny_bert(folder) / "config.json", architectures=["BertModelX"])


def wrong_shape(folder: Path) -> None:
    edit_json(tiny_bert(folder) / "config.json", vocab_size=61)


def missing_weight(folder: Path) -> None:
    path = tiny_bert(folder) / "model.safetensors"
    weights = load_file(path)
    del weights["encoder.layer.0.attention.self.query.weight"]
    save_file(weights, path, metadata={"format": "pt"})


def remote_code(folder: Path) -> None:
    edit_json(tiny_bert(folder) / "config.json", auto_map={"AutoModel": "modeling.Evil"})
    (folder / "modeling.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")


def pickle_only(folder: Path) -> None:
    path = tiny_bert(folder) / "model.safetensors"
    torch.save(load_file(path), folder / "pytorch_model.bin")
    path.unlink()


class Bomb:
    """Pickles to a call that makes a file: unpickling it without restriction is seen."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.marker,)


def pickle_bomb(folder: Path) -> None:
    path = tiny_bert(folder) / "model.safetensors"
    path.unlink()
    torch.save({"x": Bomb(folder / "ran")}, folder / "pytorch_model.bin")


def pipeline_folder(folder: Path) -> None:
    (folder / "model_index.json").write_text("{}")
    (folder / "transformer").mkdir()
    (folder / "transformer" / "config.json").write_text("{}")


def unknown_diffusers_class(folder: Path) -> None:
    (folder / "config.json").write_text('{"_class_name": "NoSuchTransformer"}')


@dataclass(frozen=True)
class Bad:
    """How to build a bad folder, and what its error has to say."""

    build: Callable[[Path], None]
    says: str


BAD = {
    "without_config": Bad(without_config, "no config.json"),
    "invalid_json": Bad(invalid_json, "not valid JSON"),
    "json_list": Bad(json_list, "expected an object"),
    "binary_config": Bad(binary_config, "not valid JSON"),
    "no_weights": Bad(no_weights, "no weights"),
    "truncated": Bad(truncated, "truncated or corrupted"),
    "corrupted_header": Bad(corrupted_header, "truncated or corrupted"),
    "empty_weights": Bad(empty_weights, "truncated or corrupted"),
    "truncated_shard": Bad(truncated_shard, "b.safetensors is truncated"),
    "missing_shard": Bad(missing_shard, "b.safetensors named in"),
    "index_upwards": Bad(index_upwards, "points outside its folder"),
    "index_absolute": Bad(index_absolute, "points outside its folder"),
    "index_of_another": Bad(index_of_another, "different checkpoints"),
    "index_without_map": Bad(index_without_map, "no weight_map"),
    "unknown_type": Bad(unknown_type, "nearest: 'bert'"),
    "unknown_architecture": Bad(unknown_architecture, "BertModelX"),
    "wrong_shape": Bad(wrong_shape, "config.json asks for [61, 32]"),
    "missing_weight": Bad(missing_weight, "lacks 1 weights"),
    "remote_code": Bad(remote_code, "auto_map"),
    "pickle_only": Bad(pickle_only, "pickle"),
    "pickle_bomb": Bad(pickle_bomb, "pickle"),
    "pipeline_folder": Bad(pipeline_folder, "transformer"),
    "unknown_diffusers_class": Bad(unknown_diffusers_class, "NoSuchTransformer"),
}


# Exported programs


class Affine(torch.nn.Module):
    """y = x W + c with a constant, so that an archive has a weight and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.offset = torch.arange(4.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.offset * x.shape[0]


def exported(path: Path) -> Path:
    """A good ``.pt2`` with a dynamic batch."""
    shapes = {"x": {0: torch.export.Dim.AUTO}}
    program = torch.export.export(Affine(), (torch.ones(3, 4),), dynamic_shapes=shapes)
    torch.export.save(program, path)
    return path


def rewrite_archive(path: Path, change: Callable[[str, bytes], bytes | None], **add: bytes) -> None:
    """Change (or drop, by None) the records of an archive, and add records of its root folder."""
    with zipfile.ZipFile(path) as old:
        records = {name: old.read(name) for name in old.namelist()}
    root = next(iter(records)).partition("/")[0]
    with zipfile.ZipFile(path, "w") as new:
        for name, data in records.items():
            kept = change(name, data)
            if kept is not None:
                new.writestr(name, kept)
        for name, data in add.items():
            new.writestr(f"{root}/{name}", data)


def _edited(path: Path, part: str, old: str, new: str) -> None:
    """Replace text in the records whose name ends with ``part``; it must be there."""
    seen = []

    def change(name: str, data: bytes) -> bytes:
        if not name.endswith(part):
            return data
        seen.append(old.encode() in data)
        return data.replace(old.encode(), new.encode())

    rewrite_archive(exported(path), change)
    assert any(seen), f"{old!r} is not in {part}"


def _torch_pickle(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _pickled_tensor(path: Path, config: str, record: str) -> None:
    """Mark the tensors of ``config`` as pickled, and put a bomb where the first one is."""
    bomb = _torch_pickle(Bomb(path.parent / "ran"))
    _edited(path, config, '"use_pickle": false', '"use_pickle": true')
    rewrite_archive(path, lambda name, data: bomb if name.endswith(record) else data)


def pickled_weight(path: Path) -> None:
    _pickled_tensor(path, "model_weights_config.json", "weights/weight_0")


def pickled_constant(path: Path) -> None:
    _pickled_tensor(path, "model_constants_config.json", "constants/tensor_0")


def pickled_samples(path: Path) -> None:
    bomb = _torch_pickle(((Bomb(path.parent / "ran"),), {}))
    rewrite_archive(exported(path), lambda name, data: bomb if "sample_inputs/" in name else data)


def opaque_constant(path: Path) -> None:
    bomb = pickle.dumps(Bomb(path.parent / "ran"))
    rewrite_archive(exported(path), lambda _, data: data, **{"data/constants/opaque_obj_0": bomb})


def legacy_weights(path: Path) -> None:
    bomb = _torch_pickle({"x": Bomb(path.parent / "ran")})
    rewrite_archive(exported(path), lambda _, data: data, **{"data/weights/model.pt": bomb})


def native_code(path: Path) -> None:
    rewrite_archive(
        exported(path), lambda _, data: data, **{"data/aotinductor/model/x.so": b"\x7fELF"}
    )


def code_as_size(path: Path) -> None:
    def change(name: str, data: bytes) -> bytes:
        if not name.endswith("models/model.json"):
            return data
        marker = str(path.parent / "ran")
        text = json.dumps(f"__import__('os').mkdir({marker!r})")
        return _replace_expressions(data, text)

    rewrite_archive(exported(path), change)


def _replace_expressions(data: bytes, text: str) -> bytes:
    def walk(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: json.loads(text) if k == "expr_str" else walk(v) for k, v in value.items()}
        return [walk(v) for v in value] if isinstance(value, list) else value

    return json.dumps(walk(json.loads(data))).encode()


def code_as_guard(path: Path) -> None:
    marker = str(path.parent / "ran")

    def change(name: str, data: bytes) -> bytes:
        if not name.endswith("models/model.json"):
            return data
        value = json.loads(data)
        value["guards_code"] = [f"__import__('os').mkdir({marker!r}) or True"]
        return json.dumps(value).encode()

    rewrite_archive(exported(path), change)


def foreign_call(path: Path) -> None:
    _edited(path, "models/model.json", "torch.ops.aten.linear.default", "torch.os.system")


def importing_tree(path: Path) -> None:
    def change(name: str, data: bytes) -> bytes:
        if not name.endswith("models/model.json"):
            return data
        value = json.loads(data)
        signature = value["graph_module"]["module_call_graph"][0]["signature"]
        context = json.dumps(
            {
                "default_factory_module": "antigravity",
                "default_factory_name": "fly",
                "dict_context": [],
            }
        )
        spec = {"type": "collections.defaultdict", "context": context, "children_spec": []}
        signature["out_spec"] = json.dumps([1, spec])
        return json.dumps(value).encode()

    rewrite_archive(exported(path), change)


def not_an_archive(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04 not really")


def pickle_named_pt2(path: Path) -> None:
    path.write_bytes(_torch_pickle({"x": Bomb(path.parent / "ran")}))


def truncated_archive(path: Path) -> None:
    exported(path).write_bytes(path.read_bytes()[:-200])


BAD_PROGRAMS = {
    "pickled_weight": Bad(pickled_weight, "names a pickled tensor"),
    "pickled_constant": Bad(pickled_constant, "names a pickled tensor"),
    "pickled_samples": Bad(pickled_samples, "pickles more than tensors"),
    "opaque_constant": Bad(opaque_constant, "pickled"),
    "legacy_weights": Bad(legacy_weights, "pickled"),
    "native_code": Bad(native_code, "native code"),
    "code_as_size": Bad(code_as_size, "code where a size is expected"),
    "code_as_guard": Bad(code_as_guard, "code where a guard is expected"),
    "foreign_call": Bad(foreign_call, "torch.os.system"),
    "importing_tree": Bad(importing_tree, "import"),
    "not_an_archive": Bad(not_an_archive, "not a readable .pt2"),
    "pickle_named_pt2": Bad(pickle_named_pt2, "not a readable .pt2"),
    "truncated_archive": Bad(truncated_archive, "not a readable .pt2"),
}
