"""Containers that models take and return: dataclasses and key/value caches.

`torch.export` flattens inputs and outputs and refuses a class it does not know.  Plain dataclasses
are made known by their fields; transformers' caches by their layers.  Registration is global and
permanent in torch, so it is done only for a class that a captured model really uses.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils import _pytree as pytree


def make_known(value: Any) -> None:
    """Register every unknown container class inside ``value``; unknown plain objects stay so."""
    kind = type(value)
    if isinstance(value, torch.Tensor):
        return
    if kind not in pytree.SUPPORTED_NODES and not _register(value):
        return
    children, _ = pytree.SUPPORTED_NODES[kind].flatten_fn(value)
    for child in children:
        make_known(child)


_LIBRARIES = ("transformers.", "diffusers.")
# What a cache of transformers for an encoder and a decoder is made of.
_CACHES = ("self_attention_cache", "cross_attention_cache")


def make_known_by_name(names: Iterable[str]) -> None:
    """Register the container classes with these dotted names that transformers or diffusers have.

    Nothing outside these libraries is imported: the names come from files.
    """
    for name in names:
        module, _, attribute = name.rpartition(".")
        if not name.startswith(_LIBRARIES):
            continue
        with contextlib.suppress(ImportError):  # torch names the unknown class when it needs it
            kind = getattr(importlib.import_module(module), attribute, None)
            if isinstance(kind, type) and module == "transformers.cache_utils":
                _register_cache(kind)


def _register(value: Any) -> bool:
    """Whether the class of ``value`` is known now."""
    kind = type(value)
    if kind.__module__ == "transformers.cache_utils":
        _register_cache(kind)
    elif dataclasses.is_dataclass(value):
        torch.export.register_dataclass(
            kind, serialized_type_name=f"{kind.__module__}.{kind.__qualname__}"
        )
    return kind in pytree.SUPPORTED_NODES


def _register_cache(kind: type) -> None:
    if kind.__name__ == "DynamicCache":
        from transformers.integrations.executorch import register_dynamic_cache_export_support

        register_dynamic_cache_export_support()
    elif kind.__name__ == "EncoderDecoderCache" and kind not in pytree.SUPPORTED_NODES:
        # Named by keys, as a dictionary is: guards of a program name its inputs by their places.
        pytree.register_pytree_node(
            kind,
            lambda cache: ([getattr(cache, n) for n in _CACHES], list(_CACHES)),
            lambda caches, _: kind(*caches),
            serialized_type_name=f"{kind.__module__}.{kind.__name__}",
            flatten_with_keys_fn=lambda cache: (
                [(pytree.MappingKey(n), getattr(cache, n)) for n in _CACHES],
                list(_CACHES),
            ),
        )
