"""Model folders of transformers and diffusers, loaded by their own classes from checked files."""

from __future__ import annotations

import contextlib
import difflib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from attn_rewrite.checkpoints.files import WeightFiles, find_weights, read_json
from attn_rewrite.checkpoints.recipe import stop_caching
from attn_rewrite.errors import CheckpointError

_POOLER = ("pooler.", "pooling")  # a head that `architectures` makes and many encoders never train


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model in eval mode, the files its weights came from, and what there is to say about it."""

    model: torch.nn.Module
    weights: WeightFiles
    notes: tuple[str, ...]


@dataclass(frozen=True)
class LoadOptions:
    """What the user allows and asks for; ``dtype`` None keeps the checkpoint's."""

    dtype: torch.dtype | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False


def load_folder(folder: Path, options: LoadOptions) -> tuple[str, Loaded]:
    """The kind of a folder (``transformers`` or ``diffusers``) and the model in it."""
    config = _config(folder)
    if "_class_name" in config:
        return "diffusers", _load_diffusers(folder, config, options)
    return "transformers", _load_transformers(folder, config, options)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if path.is_file():
        return read_json(path)
    if (folder / "model_index.json").is_file():
        parts = sorted(p.parent.name for p in folder.glob("*/config.json"))
        raise CheckpointError(
            f"{folder} is a diffusers pipeline, expected one component; name one of its folders: "
            f"{', '.join(parts)}"
        )
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{folder} is an adapter without its base model; merge it into the base model first"
        )
    raise CheckpointError(
        f"{folder} has no config.json; expected a transformers or diffusers model folder"
    )


def read_config(folder: Path) -> Any:
    """The configuration in a model folder as its library gives it; code in it is never run.

    Raises `CheckpointError` where there is none, or where the library is missing.
    """
    config = _config(folder)
    if "_class_name" in config:
        with _library("diffusers", "diffusers"):
            from diffusers.configuration_utils import FrozenDict
        return FrozenDict(config)
    with _library("transformers", "hf"):
        import transformers
    try:
        return transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except (ValueError, KeyError, OSError) as error:  # an unknown type, or one with its own code
        raise CheckpointError(f"cannot read the configuration in {folder}: {error}") from error


# transformers


def _load_transformers(folder: Path, config: dict[str, Any], options: LoadOptions) -> Loaded:
    if config.get("auto_map") and not options.trust_remote_code:
        raise CheckpointError(
            f"{folder / 'config.json'} makes the model run code that comes with the checkpoint "
            "(auto_map); read that code, then pass --trust-remote-code"
        )
    with _library("transformers", "hf"):
        import transformers
    if not config.get("auto_map"):
        _check_model_type(folder, config, transformers)
    weights = find_weights(folder, "model", allow_pickle=options.allow_pickle)
    model_class, notes = _transformers_class(folder, config, transformers)
    arguments: dict[str, Any] = {"dtype": options.dtype or "auto", "ignore_mismatched_sizes": True}
    if config.get("auto_map"):
        arguments["trust_remote_code"] = True
    if weights.pickle:
        arguments["weights_only"] = True  # diffusers has no other way to read one
    with _silent(transformers.utils.logging):
        model, info = _from_pretrained(model_class, folder, weights, arguments)
    stop_caching(model)  # a cache would be an output of every layer; one forward needs none
    return Loaded(model.eval(), weights, (*notes, *_weight_notes(folder, info)))


def _check_model_type(folder: Path, config: dict[str, Any], transformers: Any) -> None:
    kind = config.get("model_type")
    known = list(transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES)
    if kind in known:
        return
    near = difflib.get_close_matches(str(kind), known, n=1)
    raise CheckpointError(
        f"{folder / 'config.json'} names the model type {kind!r}, which transformers "
        f"{transformers.__version__} does not know"
        + (f" (nearest: {near[0]!r})" if near else "")
        + "; correct it or install a transformers that has it"
    )


def _transformers_class(
    folder: Path, config: dict[str, Any], transformers: Any
) -> tuple[Any, tuple[str, ...]]:
    """The class named by ``architectures``, else the headless model of the type."""
    names = config.get("architectures") or []
    auto = config.get("auto_map")
    if isinstance(auto, dict):
        name = next((n for n in auto if n.startswith("AutoModel")), "AutoModel")
        return getattr(transformers, name), (f"runs code of the checkpoint ({auto.get(name)})",)
    if names and hasattr(transformers, str(names[0])):
        return getattr(transformers, str(names[0])), ()
    if names:
        raise CheckpointError(
            f"{folder / 'config.json'} names the architecture {names[0]!r}, which transformers "
            f"{transformers.__version__} does not have; correct `architectures` in it"
        )
    return transformers.AutoModel, ("config.json names no architecture: loaded without a head",)


# diffusers


def _load_diffusers(folder: Path, config: dict[str, Any], options: LoadOptions) -> Loaded:
    with _library("diffusers", "diffusers"):
        import diffusers
    name = str(config["_class_name"])
    model_class = getattr(diffusers, name, None)
    if model_class is None or not hasattr(model_class, "from_pretrained"):
        raise CheckpointError(
            f"{folder / 'config.json'} names the class {name!r}, which diffusers "
            f"{diffusers.__version__} does not have; correct it or install a diffusers that has it"
        )
    if getattr(model_class, "_keep_in_fp32_modules", None):
        with _library("accelerate", "diffusers"):
            importlib.import_module("accelerate")  # diffusers mixes dtypes only with its help
    stem = "diffusion_pytorch_model"
    weights = find_weights(folder, stem, allow_pickle=options.allow_pickle)
    arguments: dict[str, Any] = {"torch_dtype": options.dtype or _first_dtype(weights)}
    with _silent(diffusers.utils.logging):
        model, info = _from_pretrained(model_class, folder, weights, arguments)
    return Loaded(model.eval(), weights, _weight_notes(folder, info))


def _first_dtype(weights: WeightFiles) -> torch.dtype | None:
    """The dtype of the stored weights, where it can be read without unpickling."""
    if weights.pickle:
        return None
    from safetensors import safe_open

    with safe_open(weights.files[0], framework="pt") as handle:
        for key in handle.keys():  # noqa: SIM118 - the handle is not a mapping
            dtype = handle.get_slice(key).get_dtype()
            return {"F16": torch.float16, "BF16": torch.bfloat16}.get(dtype, torch.float32)
    return None


# both


def _from_pretrained(
    model_class: Any, folder: Path, weights: WeightFiles, arguments: dict[str, Any]
) -> tuple[torch.nn.Module, dict[str, Any]]:
    try:
        model, info = model_class.from_pretrained(
            str(folder),
            local_files_only=True,
            use_safetensors=not weights.pickle,
            output_loading_info=True,
            **arguments,
        )
    except Exception as error:  # the library raises whatever its reader ran into
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0].rstrip(".") if lines else type(error).__name__
        raise CheckpointError(
            f"cannot load {folder} as {model_class.__name__}: {reason}; check that config.json and "
            "the weights belong together"
        ) from error
    return model, info


def _weight_notes(folder: Path, info: dict[str, Any]) -> tuple[str, ...]:
    """Notes on names that did not fit; `CheckpointError` where the model would be part random."""
    for name, stored, expected in info.get("mismatched_keys") or ():
        raise CheckpointError(
            f"the weight {name} in {folder} has shape {list(stored)}, but config.json asks for "
            f"{list(expected)}; they belong to different checkpoints"
        )
    missing = sorted(info.get("missing_keys") or ())
    needed = [name for name in missing if not any(part in name for part in _POOLER)]
    if needed:
        raise CheckpointError(
            f"{folder} lacks {len(needed)} weights that its model needs (first: {needed[0]}); "
            "check that config.json and the weights belong together"
        )
    notes = [f"no weights for the pooler ({missing[0]}): its output is random"] if missing else []
    unexpected = sorted(info.get("unexpected_keys") or ())
    if unexpected:
        notes.append(
            f"{len(unexpected)} weights in the files are not used (first: {unexpected[0]})"
        )
    return tuple(notes)


@contextlib.contextmanager
def _library(name: str, extra: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise CheckpointError(
            f"{name} is needed to load this model and cannot be imported ({error}); "
            f"pip install 'attn-rewrite[{extra}]'"
        ) from error


@contextlib.contextmanager
def _silent(logs: Any) -> Iterator[None]:
    """No progress bars and load tables: what matters in them becomes notes or an error."""
    level = logs.get_verbosity()
    shown = logs.is_progress_bar_enabled()
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    try:
        yield
    finally:
        logs.set_verbosity(level)
        if shown:
            logs.enable_progress_bar()
