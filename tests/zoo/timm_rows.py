"""Rows of timm: for every file of models that has attention, the smallest by name."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterator
from functools import partial
from types import ModuleType
from typing import Any

import torch

from tests.zoo.rows import Row

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


class _Named(type):
    """A class whose attributes are their own names (members of an enumeration)."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Stub(ModuleType):
    """A module in which every name is a class that nothing calls."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Named(name, (torch.nn.Module,), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds stubs of torchvision: timm imports it for data loading, its models run without it."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname.partition(".")[0] != "torchvision":
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: Any) -> ModuleType:
        return _Stub(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


def _import_timm() -> Any:
    if importlib.util.find_spec("torchvision") is None:
        sys.meta_path.append(_Finder())
    return importlib.import_module("timm")


def build(name: str, spelling: str, batch: int = 2) -> Any:
    """(model, args, kwargs); ``eager`` turns timm's fused attention off."""
    timm = _import_timm()
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
    timm = _import_timm()

    for family in timm.models.list_modules():
        source = inspect.getsource(importlib.import_module(f"timm.models.{family}"))
        if not re.search(r"softmax\(|scaled_dot_product_attention|Attention\w*\(", source):
            continue
        names = timm.list_models(module=family)
        if names:
            for spelling in ("sdpa", "eager"):
                name = smallest(names)
                yield Row("timm", f"{family}:{name}", spelling, partial(build, name, spelling))
