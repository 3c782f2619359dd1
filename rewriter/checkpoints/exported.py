"""A ``.pt2`` exported program, inspected before it is loaded.

`torch.export.load` unpickles some records without restriction, imports modules that the archive
names, evaluates its symbolic expressions and guards as Python, resolves operator names by walking
the torch module and opens shared libraries that it carries.  An archive is loaded only when none of
these can happen: raw tensors, known operators, arithmetic expressions.
"""

from __future__ import annotations

import ast
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.pt2_archive._package import PT2ArchiveReader, load_pt2
from torch.export.pt2_archive.constants import EXTRA_DIR

from attn_rewrite.containers import make_known_by_name
from attn_rewrite.errors import CheckpointError
from attn_rewrite.graph import LEVELS
from attn_rewrite.passes.find.vmapped import ENTER, LEAVE

_PICKLED_RECORD = re.compile(
    r"data/constants/(custom|opaque)_obj_|data/(weights|constants)/[^/]*\.pt$"
)
_NATIVE_RECORD = re.compile(r"data/(aotinductor|executorch)/|\.(so|dll|dylib)$")
_SAMPLE_RECORD = re.compile(r"data/sample_inputs/[^/]*\.pt$")
_OPERATOR = re.compile(
    r"torch\.ops\.[A-Za-z_]\w*\.[A-Za-z_]\w*(\.\w+)?|torch\._?sym_\w+|math\.[a-z]\w*|_operator\.("
    r"add|sub|mul|truediv|floordiv|mod|pow|neg|pos|abs|eq|ne|lt|le|gt|ge|and_|or_|xor|not_|invert|"
    r"lshift|rshift|getitem|index)|"
    # `torch.vmap` in a graph
    rf"torch\._functorch\.predispatch\.({'|'.join((*LEVELS, ENTER, LEAVE))})"
)
_FILE_OPERATOR = re.compile(r"torch\.ops\.aten\.from_file")
_ATTRIBUTES = frozenset({"size", "stride", "storage_offset", "dim", "shape"})
_ARITHMETIC = re.compile(r"torch\._?sym_[a-z]\w*|math\.[a-z]\w*")
_CONTAINER = re.compile(r'\\"type\\": \\"([\w.]+)\\"')
_WORD = re.compile(r"[A-Za-z]\w*")
_FUNCTION = re.compile(r"[A-Z][A-Za-z]*|max|min|abs|int|floor|ceiling|sqrt")
_EXPRESSION_NODES = (
    ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub, ast.UAdd,
    ast.BinOp, ast.operator, ast.Compare, ast.cmpop, ast.Load, ast.Subscript, ast.IfExp,
    ast.keyword,
)  # fmt: skip
_IMPORTING_CONTEXT = ("default_factory_module", "__enum__")


def load_program(path: Path) -> ExportedProgram:
    """The exported program in ``path``; `CheckpointError` if it is broken or not safe to load."""
    try:
        reader = PT2ArchiveReader(str(path))
        names = reader.get_file_names()
    except (RuntimeError, AssertionError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a readable .pt2 archive of this PyTorch ({_first_line(error)}); "
            "save it again with torch.export.save"
        ) from error
    for problem in _problems(reader, names):
        raise CheckpointError(
            f"{path} is refused: {problem}; export the model again as plain tensors and operators"
        )
    make_known_by_name(_container_names(reader, names))
    try:
        programs = load_pt2(str(path)).exported_programs
        return programs["model"] if "model" in programs else next(iter(programs.values()))
    except Exception as error:  # torch raises whatever its reader ran into
        raise CheckpointError(
            f"cannot load {path}: {_first_line(error)}; import the package that defines its "
            "operators or output classes first, or save it again with this PyTorch "
            f"({torch.__version__})"
        ) from error


def read_extra(path: Path, name: str) -> str | None:
    """The text record ``name`` that `torch.export.save` was given as an extra file, if any."""
    reader = PT2ArchiveReader(str(path))
    record = EXTRA_DIR + name
    return reader.read_string(record) if record in reader.get_file_names() else None


def _container_names(reader: PT2ArchiveReader, names: list[str]) -> set[str]:
    """Dotted names of the classes in the input and output trees."""
    texts = (reader.read_string(n) for n in names if n.startswith("models/"))
    return {name for text in texts for name in _CONTAINER.findall(text)}


def _problems(reader: PT2ArchiveReader, names: list[str]) -> Iterator[str]:
    """Reasons not to load the archive, as clauses."""
    if not any(name.startswith("models/") for name in names):
        yield "it holds no exported program"
    for name in names:
        if _PICKLED_RECORD.search(name):
            yield f"its record {name} is pickled, and unpickling can run any code"
        elif _NATIVE_RECORD.search(name):
            yield f"its record {name} is native code"
        elif _SAMPLE_RECORD.search(name):
            yield from _sample_problems(name, reader.read_bytes(name))
        elif name.startswith(("models/", "data/weights/", "data/constants/")) and name.endswith(
            ".json"
        ):
            yield from _json_problems(name, reader.read_bytes(name))


def _sample_problems(name: str, data: bytes) -> Iterator[str]:
    """Sample inputs are always a pickle: plain tensors and containers, or torch falls back to
    unpickling without restriction."""
    if not data:
        return
    try:
        torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except Exception:  # any failure makes torch fall back to the unsafe reader
        yield f"its record {name} pickles more than tensors, and unpickling can run any code"


def _json_problems(name: str, data: bytes) -> Iterator[str]:
    try:
        value = json.loads(data)
    except ValueError as error:
        yield f"its record {name} is not valid JSON ({error})"
        return
    yield from _tree_problems(name, value)


def _tree_problems(name: str, value: Any) -> Iterator[str]:
    """Walk a JSON tree for what torch would execute."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, list):
            stack += item
        elif isinstance(item, dict):
            stack += item.values()
            for key, entry in item.items():
                clause = _entry_problem(key, entry)
                if clause:
                    yield f"its record {name} {clause}"


def _entry_problem(key: str, entry: Any) -> str | None:
    if key == "use_pickle" and entry is not False:
        return "names a pickled tensor, and unpickling can run any code"
    if key == "target" and isinstance(entry, str):
        return _target_problem(entry)
    if key == "expr_str" and isinstance(entry, str):
        return (
            None if _is_arithmetic(entry) else f"has code where a size is expected: {entry[:60]!r}"
        )
    if key == "guards_code" and isinstance(entry, list):
        bad = [g for g in entry if not isinstance(g, str) or not _is_arithmetic(g)]
        return f"has code where a guard is expected: {str(bad[0])[:60]!r}" if bad else None
    if key in ("in_spec", "out_spec") and isinstance(entry, str):
        return "makes torch import a module that it names" if names_imports(entry) else None
    return None


def names_imports(tree: str) -> bool:
    """Whether a dumped input or output tree makes torch import what it names."""
    return any(word in tree for word in _IMPORTING_CONTEXT)


def _target_problem(target: str) -> str | None:
    if _OPERATOR.fullmatch(target) and not _FILE_OPERATOR.match(target):
        return None
    return f"calls {target[:60]!r}, which is not an operator on tensors"


def _is_arithmetic(text: str) -> bool:
    """Whether ``text`` is an expression of numbers, names, sizes and symbolic functions only:
    ``Symbol('s0', integer=True)``, ``torch.sym_max(1, L['x'].size()[0]) <= 512``."""
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError):
        return False
    return all(_is_plain(node) for node in ast.walk(tree))


def _is_plain(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):  # sympy parses a string argument as code once more
        word = isinstance(node.value, str) and _WORD.fullmatch(node.value)
        return bool(word) or isinstance(node.value, int | float)
    if isinstance(node, ast.Attribute):
        return node.attr in _ATTRIBUTES or bool(_ARITHMETIC.fullmatch(ast.unparse(node)))
    if isinstance(node, ast.Name):
        return not node.id.startswith("_")
    if isinstance(node, ast.Call):
        named = isinstance(node.func, ast.Name) and _FUNCTION.fullmatch(node.func.id)
        return bool(named) or isinstance(node.func, ast.Attribute)
    return isinstance(node, _EXPRESSION_NODES)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")
