"""The call signature of the original model, on a graph that knows only the call it was captured
with."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from attn_rewrite.errors import AttnRewriteError

Call = tuple[tuple[Any, ...], dict[str, Any]]
_JSON = (bool, int, float, str, type(None))


@dataclass(frozen=True, eq=False)
class CallForm:
    """How a graph is called: ``positional`` parameter names, then ``keywords``, and fixed values.

    ``signature`` is that of the model's forward.  ``fixed`` holds the captured value of arguments
    that are no tensors: the graph has them baked in.  ``configured`` holds the plain values of the
    model's configuration: an option that repeats one of them (``return_dict=True``) asks for what
    the graph does anyway.
    """

    signature: inspect.Signature
    positional: tuple[str, ...]
    keywords: tuple[str, ...]
    fixed: Mapping[str, Any]
    configured: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> CallForm | None:
        """The form of a captured call; None where the signature does not name every argument."""
        signature = inspect.signature(model.forward)
        kinds = {p.kind for p in signature.parameters.values()}
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return None
        names = tuple(signature.parameters)
        if inspect.Parameter.VAR_POSITIONAL in kinds or not set(bound.arguments) <= set(names):
            return None
        spread = next(
            (p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), None
        )
        values = {**bound.arguments, **bound.arguments.get(spread or "", {})}
        fixed = {n: v for n, v in values.items() if n != spread and _is_plain(v)}
        return cls(signature, names[: len(args)], tuple(kwargs), fixed, _configured(model))

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """The same call in the captured form; `AttnRewriteError` for one the graph cannot
        answer."""
        bound = self.signature.bind(*args, **kwargs)
        values = dict(bound.arguments)
        for parameter in self.signature.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                values |= values.pop(parameter.name, {})
        wanted = (*self.positional, *self.keywords)
        for name, value in values.items():
            if name not in wanted and not self._is_default(name, value):
                raise AttnRewriteError(
                    f"argument {name!r} was not given when the model was captured, so the graph "
                    f"cannot use it: give it in the example inputs (captured: {', '.join(wanted)})"
                )
        for name in wanted:
            if name not in values:
                if name not in self.fixed:
                    raise AttnRewriteError(
                        f"argument {name!r} is missing: the model was captured with it"
                    )
                values[name] = self.fixed[name]
        return tuple(values[n] for n in self.positional), {n: values[n] for n in self.keywords}

    def _is_default(self, name: str, value: Any) -> bool:
        parameter = self.signature.parameters.get(name)
        if value is None:
            return True
        if not _is_plain(value):
            return False
        if parameter is not None and parameter.default is not None and parameter.default == value:
            return True
        return name in self.configured and bool(self.configured[name] == value)

    def to_json(self) -> dict[str, Any]:
        """Plain values; defaults that JSON does not have (a dtype) are left out."""
        parameters = []
        for parameter in self.signature.parameters.values():
            entry: dict[str, Any] = {"name": parameter.name, "kind": parameter.kind.name}
            if parameter.default is not parameter.empty:
                entry["default"] = _json(parameter.default)
            parameters.append(entry)
        return {
            "parameters": parameters,
            "positional": list(self.positional),
            "keywords": list(self.keywords),
            "fixed": {n: v for n, v in self.fixed.items() if isinstance(v, _JSON)},
            "configured": dict(self.configured),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CallForm:
        """The inverse of `to_json`."""
        parameters = [
            inspect.Parameter(
                entry["name"],
                inspect._ParameterKind[entry["kind"]],
                default=entry.get("default", inspect.Parameter.empty),
            )
            for entry in data["parameters"]
        ]
        return cls(
            inspect.Signature(parameters),
            tuple(data["positional"]),
            tuple(data["keywords"]),
            dict(data["fixed"]),
            dict(data["configured"]),
        )


def _configured(model: nn.Module) -> dict[str, Any]:
    """Plain values of a library model's configuration, whether an object or a mapping."""
    config = getattr(model, "config", None)
    if isinstance(config, Mapping):
        table: Mapping[str, Any] = config
    else:  # `_output_attentions` is where `output_attentions` is kept
        names = (name.lstrip("_") for name in getattr(config, "__dict__", ()))
        table = {name: getattr(config, name, None) for name in names}
    return {n: v for n, v in table.items() if isinstance(v, _JSON) and v is not None}


def _json(value: Any) -> Any:
    return value if isinstance(value, _JSON) else None


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype))
