"""timm without torchvision, which it imports for data loading: its models run without it."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from typing import Any

import torch


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


def import_timm() -> Any:
    """The package ``timm``, with stubs for torchvision where that is not installed."""
    if importlib.util.find_spec("torchvision") is None:
        sys.meta_path.append(_Finder())
    return importlib.import_module("timm")


def timm_for_transformers() -> None:
    """Let transformers use timm for the backbones of its models, as it does where torchvision is
    installed; what else it asks torchvision for stays off."""
    import transformers
    from transformers.utils import import_utils

    import_utils.is_torchvision_available()  # cached, before there are stubs to find
    import_timm()

    def available() -> bool:
        return True

    message = import_utils.BACKENDS_MAPPING["timm"][1]
    import_utils.BACKENDS_MAPPING["timm"] = (available, message)
    import_utils.is_timm_available = available
    transformers.utils.is_timm_available = available
