"""Whose graph is it: the module of the model that a graph captured just in time runs for.

Dynamo compiles function by function.  After a graph break in a loop over layers one graph serves
all of them: parameters are its inputs, and paths are relative to the layer (``L['self'].attn``).
Which layer a call is for is read from the parameters it is given, and for a graph without any from
the module that is being called.  Paths are those of ``named_modules`` of the compiled model.
"""

from __future__ import annotations

import re
import sys
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import FrameType, MethodType
from typing import Any

import torch
from torch import fx, nn

from attn_rewrite.site import Findings, Site

# ``L['self']._modules['attn']._parameters['weight']``: a local name, modules, and a tensor of them.
_MEMBER = re.compile(
    r"^L\['([^']+)'\]((?:\._modules\['[^']+'\])*)\._(?:parameters|buffers)\['([^']+)'\]$"
)
_LOCAL = re.compile(r"^L\['([^']+)'\]|^L__(self)__")

Lines = tuple[str, ...]
_Place = tuple[Lines, int]  # lines of source, and how many with the same ones stand before


@dataclass(frozen=True)
class Member:
    """An input of a graph that is a parameter or buffer: the ``path`` below the local ``name``."""

    place: int
    local: str
    path: str


class Owners:
    """Finds the module that a graph's frame belongs to, call by call."""

    def __init__(self, graph: fx.Graph) -> None:
        """To be made while the model is compiled: what it is, is read from its call."""
        root = compiled_module()
        self._root = None if root is None else weakref.ref(root)
        self.members = tuple(_members(graph))
        self._names: dict[int, tuple[weakref.ref[torch.Tensor], tuple[str, ...]]] = {}
        self._known: dict[tuple[int, ...], str | None] = {}

    @property
    def root(self) -> nn.Module | None:
        """The compiled model, as long as it lives."""
        return None if self._root is None else self._root()

    def local(self, site: Site | None = None) -> str | None:
        """The local name that stands for the owner: where the Site is, else the only one."""
        stack = {} if site is None else site.anchor.meta.get("nn_module_stack") or {}
        found = _LOCAL.match(str(next(reversed(stack.values()))[0])) if stack else None
        if found is not None:
            return found.group(1) or found.group(2)
        locals_ = dict.fromkeys(m.local for m in self.members)
        return "self" if "self" in locals_ else next(iter(locals_), None)

    def of(self, inputs: Sequence[Any], local: str | None) -> str | None:
        """The path of the module that ``inputs`` are for ("" is the model); None if unknown."""
        own = [m for m in self.members if m.local == local]
        if not own:
            return self._called()
        key = tuple(id(inputs[m.place]) for m in own)
        if key not in self._known or not self._alive(own, inputs):
            self._names = self._named()
            self._known[key] = self._shared(own, inputs)
        return self._known[key]

    def candidates(self, local: str | None, owner: str) -> tuple[str, ...]:
        """``owner`` first, then every module of its class that has what the graph reads."""
        root = self.root
        if root is None:
            return (owner,)
        kind = type(root.get_submodule(owner))
        paths = {m.path for m in self.members if m.local == local}
        found = (
            path for path, module in root.named_modules(remove_duplicate=False)
            if type(module) is kind and all(_has(module, p) for p in paths)
        )  # fmt: skip
        return tuple(dict.fromkeys((owner, *found)))

    def _alive(self, own: Sequence[Member], inputs: Sequence[Any]) -> bool:
        """An address says nothing once what stood there is gone."""
        found = (self._names.get(id(inputs[m.place])) for m in own)
        return all(
            f is not None and f[0]() is inputs[m.place] for f, m in zip(found, own, strict=True)
        )

    def _named(self) -> dict[int, tuple[weakref.ref[torch.Tensor], tuple[str, ...]]]:
        root = self.root
        if root is None:
            return {}
        names: dict[int, tuple[weakref.ref[torch.Tensor], tuple[str, ...]]] = {}
        for walk in (root.named_parameters, root.named_buffers):
            for name, tensor in walk(remove_duplicate=False):
                _, known = names.get(id(tensor), (None, ()))
                names[id(tensor)] = (weakref.ref(tensor), (*known, name))
        return names

    def _shared(self, own: Sequence[Member], inputs: Sequence[Any]) -> str | None:
        """The first module that has every member under its own name."""
        found: dict[str, None] | None = None
        for member in own:
            _, names = self._names.get(id(inputs[member.place]), (None, ()))
            tail = f".{member.path}"
            here = [
                f".{n}".removesuffix(tail).removeprefix(".")
                for n in names
                if f".{n}".endswith(tail)
            ]
            found = dict.fromkeys(h for h in here if found is None or h in found)
        return next(iter(found or {}), None)

    def _called(self) -> str | None:
        """The module whose call is under way."""
        root, inner = self.root, next(_calls(), None)
        if root is None or inner is None:
            return None if root is None else ""
        return next((p for p, m in root.named_modules() if m is inner), None)


def placed(findings: Findings, owner: str) -> Findings:
    """The same Sites under the paths and names that they have in the whole model."""
    if not owner:
        return findings
    sites = []
    for site in findings.sites:
        module = f"{owner}.{site.module}".rstrip(".")
        _, _, index = site.name.rpartition("#")
        sites.append(replace(site, name=f"{module}#{index}", module=module))
    return Findings(tuple(sites), findings.refusals)


@dataclass
class Numbers:
    """The Sites of every module in the order in which they were first seen, over all graphs.

    A Site is known by its lines of source: the same attention in another graph (another length, a
    step with a cache) has the number it had.
    """

    seen: dict[str, list[_Place]] = field(default_factory=dict)

    def give(self, findings: Findings) -> Findings:
        """The same Sites, with ``#0``, ``#1``, ... counted over all graphs so far."""
        sites: list[Site] = []
        here: dict[str, list[Lines]] = {}
        for site in findings.sites:
            path = site.name.rpartition("#")[0]
            lines = _lines(site.anchor)
            before = here.setdefault(path, [])
            number = self._number(path, (lines, before.count(lines)))
            before.append(lines)
            sites.append(replace(site, name=f"{path}#{number}"))
        return Findings(tuple(sites), findings.refusals)

    def _number(self, path: str, place: _Place) -> int:
        known = self.seen.setdefault(path, [])
        for number, (lines, nth) in enumerate(known):
            if nth == place[1] and _continues(lines, place[0]):
                return number
        known.append(place)
        return len(known) - 1


def _continues(one: Lines, other: Lines) -> bool:
    """Equal as far in as both go: a graph that begins further inside has fewer lines."""
    length = min(len(one), len(other))
    return one[len(one) - length :] == other[len(other) - length :]


def _lines(node: fx.Node) -> Lines:
    """The lines of source of a node, outermost first, without the names of functions."""
    found = re.findall(r'File "([^"]*)", line (\d+)', node.meta.get("stack_trace") or "")
    return tuple(f"{file}:{line}" for file, line in found)


def compiled_module() -> nn.Module | None:
    """The model whose compiled call is under way: what was given to ``torch.compile``, or the
    outermost module that is called inside it; None outside of any."""
    outermost = None
    for frame in _frames():
        if _is_call(frame):
            outermost = frame.f_locals["self"]
        if frame.f_code.co_name == "compile_wrapper" and "_dynamo" in frame.f_code.co_filename:
            given = frame.f_locals.get("fn")
            owner = given.__self__ if isinstance(given, MethodType) else given
            return owner if isinstance(owner, nn.Module) else outermost
    return None


def _calls() -> Iterator[nn.Module]:
    """Modules whose call is under way, innermost first."""
    return (f.f_locals["self"] for f in _frames() if _is_call(f))


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_call(frame: FrameType) -> bool:
    return frame.f_code is nn.Module._call_impl.__code__


def _members(graph: fx.Graph) -> Iterator[Member]:
    for place, node in enumerate(graph.find_nodes(op="placeholder")):
        source = getattr(node, "_dynamo_source", None)
        name = getattr(source, "name", "")
        found = _MEMBER.match(str(name() if callable(name) else name))
        if found is not None:
            modules = re.findall(r"\['([^']+)'\]", found.group(2))
            yield Member(place, found.group(1), ".".join((*modules, found.group(3))))


def _has(module: nn.Module, path: str) -> bool:
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part, None)
    return isinstance(value, torch.Tensor)
