"""Exported programs that load anywhere: outputs in plain containers, nothing to unpickle.

An archive whose output is a dataclass of a library names that class, and loads only in a process
that has imported it.  A saved program returns a dictionary by field name instead; the class is kept
in a record of its own, and `read_program` puts it back where it exists.  So it does with what the
nodes of rewritten sites say.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch._export.serde.serialize import SerializeError
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry
from torch.utils import _pytree as pytree

from attn_rewrite.calls import CallForm
from attn_rewrite.checkpoints.exported import load_program, names_imports, read_extra
from attn_rewrite.containers import make_known_by_name
from attn_rewrite.errors import ToolError
from attn_rewrite.graph import LEVELS
from attn_rewrite.passes.find.vmapped import ENTER, LEAVE
from attn_rewrite.site_marks import SiteMarks

_PLAIN = (tuple, list, dict)
_OUTPUTS = "outputs.json"
_CALL = "call.json"
_SITES = "sites.json"


def save_program(
    program: ExportedProgram,
    path: Path,
    form: CallForm | None = None,
    anchors: Mapping[str, str] | None = None,
) -> None:
    """Write ``program`` as a portable ``.pt2``; its output classes, the original's call signature,
    and what is known of its sites are records of their own.  `ToolError` where PyTorch cannot.

    ``anchors`` are the operators that attention was found at, by site.
    """
    tree = output_tree(program)
    extra = {_SITES: SiteMarks.of(program, anchors or {}).to_text()}
    if tree is not None:
        extra[_OUTPUTS] = tree
    if form is not None:
        extra[_CALL] = json.dumps(form.to_json())
    with _ArchiveFile(path) as file:
        try:
            torch.export.save(portable_program(program), file, extra_files=extra)
        except SerializeError as error:
            raise ToolError(
                f"PyTorch {torch.__version__} cannot save {_unsaved(error)}, which the model still "
                "calls; choose a policy that rewrites it, such as exact, or use the rewritten "
                "module without saving it",
                stage="save",
            ) from error
        file.check()


def _unsaved(error: SerializeError) -> str:
    """What PyTorch says that it has no record for."""
    found = re.match(r"Failed serializing node (\w+?)(_\d+)? ", str(error))
    if found is None:
        return "an operator"
    # PyTorch 2.11 has none for the levels of vmap.
    mapped = found[1].lstrip("_") in {name.lstrip("_") for name in (*LEVELS, ENTER, LEAVE)}
    return "torch.vmap" if mapped else f"the operator {found[1]}"


class _ArchiveFile(io.BytesIO):
    """A file for torch's archive writer, which ends the whole process when the disk is full.

    A write that fails is remembered and what follows is dropped; `check` raises it as `OSError`.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._error: OSError | None = None

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True  # the writer asks, and goes back to the start when it is done

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return offset

    def write(self, data: Any, /) -> int:
        if self._error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self._error = error
        return len(data)

    def check(self) -> None:
        """Raise what went wrong, if anything did."""
        if self._error is None:
            self._file.flush()
        else:
            raise self._error

    def close(self) -> None:
        if not self.closed:
            super().close()
            with contextlib.suppress(OSError):  # `check` has told
                self._file.close()


def read_program(path: Path) -> ExportedProgram:
    """The inverse of `save_program`; raises `CheckpointError` as `load_program` does."""
    program = load_program(path)
    read_marks(path).put_on(program)
    return with_outputs(program, read_extra(path, _OUTPUTS))


def read_marks(path: Path) -> SiteMarks:
    """What was saved with the program in ``path`` of its sites."""
    text = read_extra(path, _SITES)
    return SiteMarks() if text is None else SiteMarks.from_text(text)


def read_form(path: Path) -> CallForm | None:
    """The call signature saved with the program in ``path``, if any."""
    text = read_extra(path, _CALL)
    return None if text is None else CallForm.from_json(json.loads(text))


def portable_program(program: ExportedProgram) -> ExportedProgram:
    """``program`` with outputs in plain containers, and without example inputs that are not plain.

    Weights are shared, not copied; the same object when nothing has to change.
    """
    out_spec = program.call_spec.out_spec
    plain = _plain_spec(out_spec)
    examples = program.example_inputs
    kept = examples if _is_plain(examples) else None
    if plain is out_spec and kept is examples:
        return program
    return _rebuilt(program, plain, kept)


def plain_program(program: ExportedProgram) -> ExportedProgram:
    """``program`` taking and returning plain containers; the same object where it does already.

    A container that is made while a graph is traced may leave traces of its own: an empty cache of
    transformers is made of empty tensors.
    """
    call, out_spec = program.call_spec, program.call_spec.out_spec
    in_spec, plain = _plain_spec(call.in_spec), _plain_spec(out_spec)
    if in_spec is call.in_spec and plain is out_spec:
        return program
    examples = program.example_inputs
    if examples is not None:
        examples = pytree.tree_unflatten(pytree.tree_leaves(examples), in_spec)
    return _rebuilt(program, plain, examples, in_spec)


def output_tree(program: ExportedProgram) -> str | None:
    """The output containers as text for `with_outputs`, None when they are plain already."""
    out_spec = program.call_spec.out_spec
    if out_spec is None or _plain_spec(out_spec) is out_spec:
        return None
    return pytree.treespec_dumps(out_spec)


def with_outputs(program: ExportedProgram, tree: str | None) -> ExportedProgram:
    """``program`` returning the containers of ``tree``, as far as their classes are known here."""
    if tree is None or names_imports(tree):
        return program
    try:
        make_known_by_name(_type_names(json.loads(tree)))
        out_spec = pytree.treespec_loads(tree)
    except (ValueError, TypeError, LookupError, NotImplementedError):
        return program  # the class is not known in this process: plain containers stay
    if out_spec.num_leaves != program.call_spec.out_spec.num_leaves:
        return program
    return _rebuilt(program, out_spec, program.example_inputs)


def _type_names(tree: Any) -> set[str]:
    """Dotted class names in a dumped tree."""
    if isinstance(tree, dict):
        own = {tree["type"]} if isinstance(tree.get("type"), str) else set()
        return own.union(*(_type_names(child) for child in tree.get("children_spec", ())))
    if isinstance(tree, list):
        return set().union(*(_type_names(child) for child in tree))
    return set()


def _plain_spec(spec: Any) -> Any:
    """``spec`` with every other container turned into a dictionary (or a tuple)."""
    if spec is None or spec.is_leaf():
        return spec
    children = [_plain_spec(child) for child in spec.children()]
    same = all(new is old for new, old in zip(children, spec.children(), strict=True))
    if spec.type in _PLAIN:
        return spec if same else pytree.TreeSpec(spec.type, spec._context, children)
    names = _field_names(spec._context, len(children))
    if names is None:
        return pytree.TreeSpec(tuple, None, children)
    return pytree.TreeSpec(dict, names, children)


def _field_names(context: Any, count: int) -> list[str] | None:
    """Names of the children in a context: the context itself, or its first part."""
    first = context[0] if isinstance(context, list | tuple) and context else None
    for names in (context, first):
        if not isinstance(names, list | tuple) or len(names) != count:
            continue
        if all(isinstance(name, str) for name in names):
            return list(names)
    return None


def _is_plain(value: Any) -> bool:
    """Whether unpickling ``value`` needs nothing but tensors and built-in containers."""
    if isinstance(value, tuple | list):
        return type(value) in _PLAIN and all(_is_plain(part) for part in value)
    if isinstance(value, dict):
        return type(value) in _PLAIN and all(_is_plain(part) for part in value.values())
    return value is None or type(value) in (torch.Tensor, torch.nn.Parameter, bool, int, float, str)


def _rebuilt(
    program: ExportedProgram, out_spec: Any, examples: Any, in_spec: Any = None
) -> ExportedProgram:
    """``program`` with another output tree, other example inputs and maybe another input tree."""
    entry = program.module_call_graph[0]
    assert entry.signature is not None, "the root of an exported program has a signature"
    trees = {"out_spec": out_spec, "in_spec": in_spec or entry.signature.in_spec}
    root = ModuleCallEntry(entry.fqn, replace(entry.signature, **trees))
    return ExportedProgram(
        root=program.graph_module,
        graph=program.graph,
        graph_signature=program.graph_signature,
        state_dict=program.state_dict,
        range_constraints=program.range_constraints,
        module_call_graph=[root, *program.module_call_graph[1:]],
        example_inputs=examples,
        constants=program.constants,
        verifiers=program.verifiers,
    )
