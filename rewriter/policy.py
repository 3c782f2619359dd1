"""What the user asks for: transforms for Sites and heads, and how much error is allowed."""

from __future__ import annotations

import fnmatch
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attn_rewrite.budget import Budget as Budget
from attn_rewrite.budget import suggest
from attn_rewrite.errors import PolicyError
from attn_rewrite.passes.transform import (
    Exactness,
    FieldInfo,
    Transform,
    field_infos,
    literal,
    spans_text,
)
from attn_rewrite.policy_text import Transforms, parse_pipeline

if TYPE_CHECKING:
    from attn_rewrite.site import Site

KINDS = ("self", "cross", "joint", "pooling")
Pipeline = str | Transform | Sequence["str | Transform"]


@dataclass(frozen=True)
class Length:
    """A range of sequence lengths, both ends included; ``maximum`` None is no end."""

    minimum: int = 0
    maximum: int | None = None

    @classmethod
    def parse(cls, text: str | int) -> Length:
        """Read ``>=1024``, ``<512``, ``512..4096`` or a single length (`PolicyError` otherwise)."""
        match = re.fullmatch(r"\s*(?:(>=|<=|>|<)\s*(\d+)|(\d+)(?:\s*\.\.\s*(\d+))?)\s*", str(text))
        if match is None:
            raise PolicyError(f"length {text!r} is no range; write >=1024, <512 or 512..4096")
        sign, bound, first, last = match.groups()
        if first is not None:
            length = cls(int(first), int(last or first))
        elif sign[0] == ">":
            length = cls(int(bound) + (sign == ">"))
        else:
            length = cls(0, int(bound) - (sign == "<"))
        if length.maximum is not None and length.maximum < length.minimum:
            raise PolicyError(f"length {text!r} is an empty range")
        return length

    def __str__(self) -> str:
        return f">={self.minimum}" if self.maximum is None else f"{self.minimum}..{self.maximum}"

    def holds(self, low: int, high: int | None) -> bool | None:
        """Whether every length in low..high is in the range (True), none (False) or some (None)."""
        top = self.maximum
        if (top is not None and low > top) or (high is not None and high < self.minimum):
            return False
        inside = low >= self.minimum and (top is None or (high is not None and high <= top))
        return True if inside else None


def parse_heads(value: str | int | Iterable[int | str]) -> tuple[int, ...]:
    """Heads written as ``"0-3, 8"``, ``5`` or ``[0, 1]``, sorted (`PolicyError` otherwise)."""
    parts = [value] if isinstance(value, int) else value
    if isinstance(parts, str):
        parts = parts.split(",")
    heads: set[int] = set()
    for part in parts:
        match = (
            None
            if isinstance(part, bool)
            else re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", str(part))
        )
        if match is None:
            raise PolicyError(f'heads {value!r}: {part!r} is no head; write "0-3, 8" or [0, 1]')
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last > 65535:
            raise PolicyError(f"heads {value!r}: {str(part).strip()!r} is no range of heads")
        heads.update(range(first, last + 1))
    if not heads:
        raise PolicyError("heads is empty; leave it out to mean every head")
    return tuple(sorted(heads))


@dataclass(frozen=True)
class Where:
    """Which Sites a rule is about; what is left out holds for all.

    ``layer`` is a glob, or several, on the Site's name or module path; a glob that matches a module
    covers everything below it.  ``length`` is about the number of keys.  Constructors accept the
    texts of policy files: ``Where(layer="encoder.*", heads="0-3", length=">=1024")``.
    """

    layer: tuple[str, ...] = ()
    kind: tuple[str, ...] = ()
    causal: bool | None = None
    heads: tuple[int, ...] | None = None
    length: Length | None = None

    def __init__(
        self,
        layer: str | Iterable[str] = (),
        kind: str | Iterable[str] = (),
        causal: bool | None = None,
        heads: str | int | Iterable[int | str] | None = None,
        length: str | int | Length | None = None,
    ) -> None:
        layers, kinds = _strings("layer", layer), _strings("kind", kind)
        for name in kinds:
            if name not in KINDS:
                raise PolicyError(f"unknown kind {name!r}{suggest(name, KINDS)}")
        if causal is not None and not isinstance(causal, bool):
            raise PolicyError(f"causal is {causal!r}, expected true or false")
        if length is not None and not isinstance(length, Length):
            length = Length.parse(length)
        values = (layers, kinds, causal, None if heads is None else parse_heads(heads), length)
        for field, value in zip(
            ("layer", "kind", "causal", "heads", "length"), values, strict=True
        ):
            object.__setattr__(self, field, value)

    def matches(self, site: Site) -> bool:
        """Whether the layer, kind and causality of ``site`` are meant (not heads, not length)."""
        if self.layer and not any(glob_matches(g, site) for g in self.layer):
            return False
        if self.kind and site.kind not in self.kind:
            return False
        return self.causal is None or self.causal == site.causal

    def to_table(self) -> dict[str, Any]:
        """The ``where`` table of a policy file."""
        table: dict[str, Any] = {}
        for name, value in (("layer", self.layer), ("kind", self.kind)):
            if value:
                table[name] = value[0] if len(value) == 1 else list(value)
        if self.causal is not None:
            table["causal"] = self.causal
        if self.heads is not None:
            table["heads"] = spans_text(self.heads)
        if self.length is not None:
            table["length"] = str(self.length)
        return table


def glob_matches(glob: str, site: Site) -> bool:
    """Whether a layer glob means ``site``: its name, its module, or a module around that."""
    parts = site.module.split(".")
    paths = [site.name, *(".".join(parts[:n]) for n in range(len(parts), 0, -1))]
    return any(fnmatch.fnmatchcase(path, glob) for path in paths)


def _strings(field: str, value: str | Iterable[str]) -> tuple[str, ...]:
    values = (value,) if isinstance(value, str) else tuple(value)
    for text in values:
        if not isinstance(text, str) or not text:
            raise PolicyError(f"{field} is {text!r}, expected a text or a list of texts")
    return values


@dataclass(frozen=True)
class Rule:
    """Transforms for the Sites and heads of ``where``, in order.

    ``apply`` may be a pipeline as text, a transform, or a list of both.
    """

    where: Where
    apply: tuple[Transform, ...]

    def __init__(self, where: Where | None = None, apply: Pipeline = "exact") -> None:
        object.__setattr__(self, "where", Where() if where is None else where)
        object.__setattr__(self, "apply", _pipeline(apply, None))
        if not self.apply:
            raise PolicyError(
                "a rule applies nothing; write exact, or keep to leave Sites untouched"
            )

    @property
    def text(self) -> str:
        """The pipeline as text."""
        return pipeline_text(self.apply)


def pipeline_text(transforms: Iterable[Transform]) -> str:
    """Transforms joined by ``|``, as `parse_pipeline` reads them."""
    return " | ".join(map(str, transforms))


def _pipeline(value: Pipeline, transforms: Transforms | None) -> tuple[Transform, ...]:
    if isinstance(value, str):
        return parse_pipeline(value, transforms)
    if isinstance(value, Transform):
        return (value,)
    if not isinstance(value, Sequence):
        raise PolicyError(f"apply is {value!r}, expected a pipeline as text or a list")
    return tuple(t for part in value for t in _pipeline(part, transforms))


@dataclass(frozen=True)
class Policy:
    """Rules in order, and the error the user allows.

    The first rule that matches wins for each Site and head; what no rule matches is kept untouched.
    Every error is a `PolicyError`.
    """

    rules: tuple[Rule, ...]
    budget: Budget | None = None

    def __init__(self, rules: Iterable[Rule] = (), budget: Budget | str | None = None) -> None:
        if isinstance(budget, str):
            budget = Budget.parse(budget)
        object.__setattr__(self, "rules", tuple(rules))
        object.__setattr__(self, "budget", budget)
        if not self.rules:
            raise PolicyError("the policy has no rule; write exact to lower every Site again")

    @classmethod
    def parse(cls, text: str, transforms: Transforms | None = None) -> Policy:
        """A policy of one rule for every Site, from a pipeline as text.

        ``transforms`` are the names that may be used (default: `attn_rewrite.passes.TRANSFORMS`).
        """
        return cls([Rule(apply=parse_pipeline(text, transforms))])

    @classmethod
    def of(cls, policy: str | Policy) -> Policy:
        """A policy as it is, from a pipeline as text, or from the path of a ``.toml`` file."""
        if isinstance(policy, Policy):
            return policy
        return cls.load(policy) if policy.strip().endswith(".toml") else cls.parse(policy)

    @classmethod
    def load(cls, path: str | Path, transforms: Transforms | None = None) -> Policy:
        """Read a policy file (TOML: ``[[rule]]`` with ``where`` and ``apply``, ``[budget]``)."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PolicyError(f"the policy file {path} cannot be read: {error}") from error
        return cls.from_toml(text, transforms, name=str(path))

    @classmethod
    def from_toml(
        cls, text: str, transforms: Transforms | None = None, *, name: str = "policy"
    ) -> Policy:
        """Read the text of a policy file; ``name`` is what errors call it."""
        try:
            table = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise PolicyError(f"{name} is not valid TOML: {error}") from None
        lines = [
            n for n, s in enumerate(text.splitlines(), 1) if re.match(r"\s*\[\[\s*rule\s*]]", s)
        ]
        try:
            _only(table, ("rule", "budget"), "a policy file")
            budget = _budget(table.get("budget"))
            entries = table.get("rule", [])
            if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
                raise PolicyError("rule is not a list of tables; write [[rule]]")
            if not entries:
                raise PolicyError('there is no [[rule]]; write one with apply = "exact" at least')
        except PolicyError as error:
            raise PolicyError(f"{name}: {error}") from None
        rules = []
        for index, entry in enumerate(entries):
            line = f" (line {lines[index]})" if index < len(lines) else ""
            try:
                rules.append(_rule(entry, transforms))
            except PolicyError as error:
                raise PolicyError(f"{name}, rule {index + 1}{line}: {error}") from None
        return cls(rules, budget)

    def to_toml(self) -> str:
        """The policy as a file; ``Policy.from_toml`` of it is equal."""
        blocks = []
        for rule in self.rules:
            where = ", ".join(f"{k} = {_toml(v)}" for k, v in rule.where.to_table().items())
            lines = ["[[rule]]", *([f"where = {{ {where} }}"] if where else [])]
            blocks.append("\n".join([*lines, f"apply = {_toml(rule.text)}"]))
        if self.budget:
            bounds = (("site", self.budget.site), ("end_to_end", self.budget.end_to_end))
            given = [f"{scope} = {_toml(str(bound))}" for scope, bound in bounds if bound]
            blocks.append("\n".join(["[budget]", *given]))
        return "\n\n".join(blocks) + "\n"

    def __str__(self) -> str:
        """A pipeline where that says everything, else the file."""
        if len(self.rules) == 1 and self.rules[0].where == Where() and self.budget is None:
            return self.rules[0].text
        return self.to_toml()


def _only(table: Mapping[str, Any], known: tuple[str, ...], what: str) -> None:
    for key in table:
        if key not in known:
            raise PolicyError(f"{what} has no key {key!r}{suggest(key, known)}")


def _budget(value: object) -> Budget | None:
    if value is None:
        return None
    if isinstance(value, str):
        return Budget.parse(value)
    if isinstance(value, dict):
        return Budget.from_table(value)
    raise PolicyError(f"budget is {value!r}, expected a table or a text")


def _rule(entry: Mapping[str, Any], transforms: Transforms | None) -> Rule:
    _only(entry, ("where", "apply"), "a rule")
    where = entry.get("where", {})
    if not isinstance(where, dict):
        raise PolicyError(f'where is {where!r}, expected a table such as {{ layer = "encoder.*" }}')
    _only(where, ("layer", "kind", "causal", "heads", "length"), "where")
    if "apply" not in entry:
        raise PolicyError("apply is missing; write for example apply = 'window(size=256)'")
    for name, value in where.items():
        if isinstance(value, dict) or (
            name in ("layer", "kind") and not isinstance(value, str | list)
        ):
            raise PolicyError(f"where.{name} is {value!r}, expected a text or a list")
    return Rule(Where(**where), _pipeline(entry["apply"], transforms))


def _toml(value: object) -> str:
    if isinstance(value, str):
        import json

        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return literal(value)


@dataclass(frozen=True)
class TransformInfo:
    """What ``attn-rewrite policies`` tells about a transform."""

    name: str
    summary: str
    exactness: Exactness
    source: str
    fields: tuple[FieldInfo, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        fields = [
            {"name": f.name, "type": f.type, "default": f.default, "doc": f.doc}
            for f in self.fields
        ]
        return {
            "name": self.name,
            "summary": self.summary,
            "exactness": self.exactness.value,
            "source": self.source,
            "fields": fields,
        }


def describe_transforms(transforms: Transforms | None = None) -> tuple[TransformInfo, ...]:
    """Every transform a policy may name: fields, defaults (None: required), exactness, source."""
    if transforms is None:
        from attn_rewrite.passes import TRANSFORMS

        transforms = TRANSFORMS
    return tuple(
        TransformInfo(
            name,
            (cls.__doc__ or "").strip().split("\n")[0].replace("`", ""),
            cls.exactness,
            cls.source,
            field_infos(cls),
        )
        for name, cls in transforms.items()
    )
