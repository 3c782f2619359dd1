"""Rows of timm: for every file of models that has attention, the smallest by name."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from tests.zoo.rows import Row
from tests.zoo.stand_in import import_timm

_SIZES = (
    "test",
    "atto",
    "femto",
    "pico",
    "nano",
    "xxtiny",
    "xxs",
    "xtiny",
    "tiny",
    "xs",
    "mini",
    "_t",
    "small",
)


# Pixels of a side where a model of larger images can be made for it.
IMAGE = 256
# Parameters; the reference takes eight bytes for each.
LARGEST = 100_000_000


def build(name: str, spelling: str, batch: int = 2) -> Any:
    """(model, args, kwargs); ``eager`` turns timm's fused attention off."""
    timm = import_timm()
    timm.layers.set_fused_attn(spelling == "sdpa")
    model = _made(timm, name).eval()
    if sum(p.numel() for p in model.parameters()) > LARGEST:
        raise ValueError(f"the smallest model of the family, {name}, is too large for a test")
    channels, height, width = model.default_cfg.get("input_size", (3, 224, 224))
    if height > IMAGE and _takes(model, torch.zeros(1, channels, IMAGE, IMAGE)):
        height = width = IMAGE
    generator = torch.Generator().manual_seed(0)
    return model, (torch.randn(batch, channels, height, width, generator=generator),), {}


def _takes(model: torch.nn.Module, image: torch.Tensor) -> bool:
    try:
        with torch.no_grad():
            model(image)
    except (RuntimeError, AssertionError, ValueError):  # of models for one size
        return False
    return True


def _made(timm: Any, name: str) -> torch.nn.Module:
    """The model, as small as its function lets it be made: two blocks show every kind of block that
    a model of equal blocks has, and images of a thousand pixels show nothing that small ones do
    not."""
    large = timm.get_pretrained_cfg(name).input_size[-1] > IMAGE
    depths, sizes = ({"depth": 2}, {}), ({"img_size": IMAGE}, {}) if large else ({},)
    for size in sizes:
        for depth in depths:
            try:
                model = timm.create_model(name, pretrained=False, num_classes=8, **depth, **size)
            except (TypeError, RuntimeError, AssertionError):
                continue
            return model
    raise ValueError(f"timm cannot make {name}")


def smallest(names: list[str]) -> str:
    """The name that promises the smallest model."""

    def key(name: str) -> tuple[int, str]:
        places = [i for i, s in enumerate(_SIZES) if s in name]
        return (min(places, default=len(_SIZES)), name)

    return min(names, key=key)


def rows() -> Iterator[Row]:
    """One architecture per file of ``timm.models`` whose source has attention."""
    timm = import_timm()

    for family in timm.models.list_modules():
        source = inspect.getsource(importlib.import_module(f"timm.models.{family}"))
        if not re.search(r"softmax\(|scaled_dot_product_attention|Attention\w*\(", source):
            continue
        names = timm.list_models(module=family)
        if names:
            for spelling in ("sdpa", "eager"):
                name = smallest(names)
                yield Row("timm", f"{family}:{name}", spelling, partial(build, name, spelling))
