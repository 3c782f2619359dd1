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


# Parameters; the reference takes eight bytes for each.
LARGEST = 100_000_000


def build(name: str, spelling: str, batch: int = 2) -> Any:
    """(model, args, kwargs); ``eager`` turns timm's fused attention off."""
    timm = import_timm()
    timm.layers.set_fused_attn(spelling == "sdpa")
    try:  # two blocks show every kind of block that a model of equal blocks has
        model = timm.create_model(name, pretrained=False, num_classes=8, depth=2).eval()
    except (TypeError, RuntimeError, AssertionError):
        model = timm.create_model(name, pretrained=False, num_classes=8).eval()
    if sum(p.numel() for p in model.parameters()) > LARGEST:
        raise ValueError(f"the smallest model of the family, {name}, is too large for a test")
    channels, height, width = model.default_cfg.get("input_size", (3, 224, 224))
    generator = torch.Generator().manual_seed(0)
    return model, (torch.randn(batch, channels, height, width, generator=generator),), {}


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
