"""Pipelines as text: ``window(size=256, sinks=4) | exact``.

The grammar is that of Python expressions, so Python's own parser reads it and gives the positions.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from attn_rewrite.budget import suggest
from attn_rewrite.errors import PolicyError
from attn_rewrite.passes.transform import FieldInfo, Transform, field_infos

Transforms = Mapping[str, type[Transform]]

_WORDS = {"true": True, "false": False, "none": None}
EXPECTED = "expected transforms joined by |, such as window(size=256, sinks=4) | exact"


def parse_pipeline(text: str, transforms: Transforms | None = None) -> tuple[Transform, ...]:
    """Read transforms joined by ``|``.

    ``transforms`` are the names that may be used (default: `attn_rewrite.passes.TRANSFORMS`).
    Raises `PolicyError` with line and column, and the nearest known name where one was misspelt.
    """
    if transforms is None:
        from attn_rewrite.passes import TRANSFORMS

        transforms = TRANSFORMS
    return _Reader(text, transforms).pipeline()


class _Reader:
    """Reads one pipeline; keeps the text for the positions of errors."""

    def __init__(self, text: str, transforms: Transforms) -> None:
        self.text, self.transforms = text, transforms
        # A line break between transforms is white space here, unlike in Python.
        self.flat = "".join(" " if c in "\r\n\t" else c for c in text)
        self.start = len(self.flat) - len(self.flat.lstrip())

    def fail(self, index: int, message: str) -> PolicyError:
        before = self.text[: max(index, 0)]
        column = len(before) - (before.rfind("\n") + 1) + 1
        line = before.count("\n") + 1
        where = f"line {line}, column {column}" if "\n" in self.text.strip() else f"column {column}"
        shown = self.text if len(self.text) <= 100 else self.text[:97] + "..."
        return PolicyError(f"policy {shown!r}, {where}: {message}")

    def at(self, node: ast.expr | ast.keyword, message: str) -> PolicyError:
        # The parser counts bytes of UTF-8, people count characters.
        before = self.flat.lstrip().encode()[: node.col_offset].decode(errors="replace")
        return self.fail(self.start + len(before), message)

    def pipeline(self) -> tuple[Transform, ...]:
        if not self.flat.strip():
            raise PolicyError(f"the policy is empty; {EXPECTED}")
        try:
            tree = ast.parse(self.flat.strip(), mode="eval").body
            steps = []
            while isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.BitOr):
                steps.append(tree.right)
                tree = tree.left
            return tuple(self.transform(node) for node in [tree, *reversed(steps)])
        except SyntaxError as error:
            index = self.start + (error.offset or 1) - 1
            raise self.fail(index, f"{error.msg}; {EXPECTED}") from None
        except (RecursionError, MemoryError):
            raise PolicyError(f"the policy is nested too deeply; {EXPECTED}") from None

    def transform(self, node: ast.expr) -> Transform:
        name, call = (node.func, node) if isinstance(node, ast.Call) else (node, None)
        if not isinstance(name, ast.Name):
            raise self.at(node, f"{ast.unparse(node)!r} is no transform; {EXPECTED}")
        cls = self.transforms.get(name.id)
        if cls is None:
            hint = suggest(name.id, self.transforms)
            raise self.at(name, f"unknown transform {name.id!r}{hint}")
        given = self.options(cls, call) if call else {}
        missing = [f.name for f in field_infos(cls) if f.default is None and f.name not in given]
        if missing:
            raise self.at(node, f"{cls.name} needs {' and '.join(missing)}")
        try:
            return cls(**given)
        except ValueError as error:
            raise self.at(node, str(error)) from None

    def options(self, cls: type[Transform], call: ast.Call) -> dict[str, Any]:
        infos = field_infos(cls)
        known = {f.name: f for f in infos}
        if len(call.args) > len(infos):
            fields = ", ".join(known) or "none"
            count = f"{len(infos)} option{'s' * (len(infos) != 1)}"
            raise self.at(call.args[len(infos)], f"{cls.name} has {count}: {fields}")
        given: dict[str, Any] = {}
        for info, node in zip(infos, call.args, strict=False):
            given[info.name] = self.option(cls, info, node)
        for keyword in call.keywords:
            name = keyword.arg or "**"
            if name not in known:
                raise self.at(keyword, f"{cls.name} has no option {name!r}{suggest(name, known)}")
            if name in given:
                raise self.at(keyword, f"{cls.name} is given {name} twice")
            given[name] = self.option(cls, known[name], keyword.value)
        return given

    def option(self, cls: type[Transform], info: FieldInfo, node: ast.expr) -> Any:
        value = self.value(node)
        if problem := info.problem(value):
            raise self.at(node, f"{cls.name}: {info.name} {problem}")
        return value

    def value(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Name) and node.id in _WORDS:
            return _WORDS[node.id]
        if isinstance(node, ast.List | ast.Tuple):
            return tuple(self.value(item) for item in node.elts)
        if isinstance(node, ast.Call):
            return self.transform(node)
        try:
            value = ast.literal_eval(node)
        except ValueError:
            value = ...
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise self.at(
            node, f"{ast.unparse(node)!r} is no number, true, false, none, text, list or transform"
        )
