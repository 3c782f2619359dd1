"""Names of an exported model: inputs and outputs as in the source, dynamic axes by meaning."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.utils import _pytree as pytree

_TAKEN_AXES = {0: "batch", 1: "sequence"}
_PAST = "past_key_values"
# What a cache of transformers is flattened to: one cache, or one of the decoder's own tokens and
# one of the encoder's.
_CACHED = re.compile(
    rf"{_PAST}[._](?:(self|cross)_attention_cache[._])?"
    r"(key|value)_cache[._](\d+)"
)
_OWNERS = {None: "", "self": "decoder.", "cross": "encoder."}


def _part(key: Any) -> str:
    """One step of a pytree path as text."""
    for attribute in ("name", "key", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _leaf_paths(spec: pytree.TreeSpec) -> list[str]:
    """A name for every leaf of a tree: the keys on the way to it, joined by ``.``."""
    # Tensors of four dimensions: a container of keys and values looks at what it is made of.
    tree = pytree.tree_unflatten([torch.empty(1, 1, 1, 1)] * spec.num_leaves, spec)
    try:
        paths = [path for path, _ in pytree.tree_flatten_with_path(tree)[0]]
    except ValueError:  # a container registered without names of its fields (diffusers)
        return [str(i) for i in range(spec.num_leaves)]
    return [".".join(_part(key) for key in path) for path in paths]


def input_name(placeholder: str) -> str:
    """The file's name for an input of the program: ``past_key_values.0.key`` for a cache's, with
    an encoder ``past_key_values.0.decoder.key`` and ``past_key_values.0.encoder.key``."""
    return _cached_name(placeholder, _PAST) or placeholder


def _cached_name(path: str, head: str) -> str | None:
    """What runtimes call a part of a cache; None for anything else."""
    found = _CACHED.fullmatch(path)
    if found is None:
        return None
    owner, part, layer = found.groups()
    return f"{head}.{layer}.{_OWNERS[owner]}{part}"


def is_past(name: str) -> bool:
    """Whether an input of the file holds past keys or values, which a call appends to."""
    return name.startswith(f"{_PAST}.") and not is_encoded(name)


def is_encoded(name: str) -> bool:
    """Whether an input of the file holds keys or values of the encoder, which no call changes."""
    return name.startswith(f"{_PAST}.") and ".encoder." in name


def output_names(program: ExportedProgram) -> list[str]:
    """Names of the tensor outputs: the keys of the returned tree, ``output`` for a single tensor.

    An index alone becomes ``output_0``; a name that an input or a weight has already gets the
    suffix ``_output`` (a graph has one namespace); a cache's are ``present.0.key`` and so on, as
    inputs are called.  Outputs that are no tensors have no name.
    """
    paths = _leaf_paths(program.call_spec.out_spec)
    specs = [s for s in program.graph_signature.output_specs if s.kind == OutputKind.USER_OUTPUT]
    inputs = input_values(program)
    taken = {*inputs, *program.state_dict, *program.constants}
    # A step behind an encoder returns the cache that it appends to alone.
    own = "self_attention_cache." if any(map(is_encoded, inputs)) else ""
    names: list[str] = []
    for path, spec in zip(paths, specs, strict=True):
        if isinstance(spec.arg, ConstantArgument):
            continue
        plain = path.replace(".", "_")
        name = f"output_{plain}" if plain[:1].isdigit() else plain or "output"
        name = _cached_name(path.replace(f"{_PAST}.", f"{_PAST}.{own}"), "present") or name
        while name in taken:
            name += "_output"
        taken.add(name)
        names.append(name)
    return names


def input_values(program: ExportedProgram) -> dict[str, Any]:
    """The traced values (fake tensors, symbols) of the user's inputs by the file's names, in
    order."""
    wanted = [
        s.arg.name
        for s in program.graph_signature.input_specs
        if s.kind == InputKind.USER_INPUT and not isinstance(s.arg, ConstantArgument)
    ]
    nodes = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    return {input_name(name): nodes[name].meta["val"] for name in wanted}


def sizes_of(value: object) -> tuple[object, ...]:
    """The extents of a traced tensor, ints or symbols; none for other values."""
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def _hint(size: object) -> int | None:
    """The size a symbol had in the example inputs, where it is known."""
    hint = getattr(getattr(size, "node", None), "hint", None)
    return hint if isinstance(hint, int) else None


def axis_names(program: ExportedProgram) -> dict[str, str]:
    """A readable name for every symbol of the inputs' shapes.

    The first symbol met on axis 0 is ``batch``, and so is every later one of axis 0 that had the
    same size in the example (a mask's batch is a symbol of its own where the graph would broadcast
    it); the first on axis 1 is ``sequence``, that of a decoder behind an encoder
    ``decoder_sequence``; others are called after their input and axis.  Derived sizes are
    expressions in these names.  With a cache the lengths of the past and of its mask are
    ``past_sequence`` and ``total_sequence``, and that of the encoder's keys ``encoder_sequence``.
    """
    names: dict[str, str] = {}
    batch: int | None = None
    values = input_values(program)
    decodes = any(map(is_past, values))
    encoded = any(map(is_encoded, values))
    for tensor_name, value in values.items():
        for axis, size in enumerate(sizes_of(value)):
            symbol = str(size)
            if isinstance(size, int) or not symbol.isidentifier() or symbol in names:
                continue
            if decodes and (known := _of_a_step(tensor_name, axis, encoded)):
                names[symbol] = known
                continue
            if (tensor_name, axis) == ("decoder_input_ids", 1):
                names[symbol] = "decoder_sequence"
                continue
            hint = _hint(size)
            common = _TAKEN_AXES.get(axis, "")
            again = axis == 0 and batch is not None and hint == batch
            free = bool(common) and common not in names.values()
            names[symbol] = common if free or again else f"{tensor_name}_{axis}"
            batch = hint if free and axis == 0 else batch
    return names


def axis_ranges(program: ExportedProgram) -> dict[str, tuple[int, int]]:
    """The least and the largest extent of every symbol; without limits 0, and what 32 bits hold."""
    return {
        str(symbol): (
            int(allowed.lower) if allowed.lower.is_Integer else 0,
            int(allowed.upper) if allowed.upper.is_Integer else 2**31 - 1,
        )
        for symbol, allowed in program.range_constraints.items()
    }


def _of_a_step(tensor: str, axis: int, encoded: bool) -> str | None:
    """The name of an axis whose length is the past's, the past's and the new tokens', or the
    encoder's (there is one if ``encoded``)."""
    if axis == 2 and is_past(tensor):
        return "past_sequence"
    if axis == 2 and is_encoded(tensor):
        return "encoder_sequence"
    masks = {"attention_mask": "total_sequence"}
    if encoded:
        masks = {"attention_mask": "encoder_sequence", "decoder_attention_mask": "total_sequence"}
    return masks.get(tensor) if axis == 1 else None


def rename_inputs(model: ir.Model) -> None:
    """Give the inputs the file's names."""
    for value in model.graph.inputs:
        value.name = input_name(value.name or "")


def _values(model: ir.Model) -> Iterator[ir.Value]:
    yield from model.graph.inputs
    for owner in (model.graph, *model.functions.values()):
        for node in ir.traversal.RecursiveGraphIterator(owner):
            yield from node.outputs


def rename_axes(model: ir.Model, names: dict[str, str]) -> None:
    """Replace symbols in every shape of the model, inside expressions too; a symbol that is a
    number becomes that number."""
    pattern = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, names)) or '(?!)'})(?!\w)")
    for value in _values(model):
        if value.shape is None or value.shape.is_static():
            continue
        value.shape = ir.Shape(
            [
                d if isinstance(d, int) or d.value is None else _renamed(pattern, names, d.value)
                for d in value.shape
            ]
        )


def _renamed(pattern: re.Pattern[str], names: dict[str, str], text: str) -> str | int:
    renamed = pattern.sub(lambda match: names[match.group()], text)
    return int(renamed) if renamed.isdecimal() else renamed


def rename_outputs(model: ir.Model, names: list[str]) -> None:
    """Give the outputs their names; a value that is returned twice, or is an input, is copied."""
    graph = model.graph
    for value in _values(model):
        if value.name in names:
            value.name = f"{value.name}.value"
    seen: set[int] = {id(v) for v in (*graph.inputs, *graph.initializers.values())}
    for position, (value, name) in enumerate(zip(list(graph.outputs), names, strict=True)):
        if id(value) in seen:
            node = ir.node("Identity", [value], name=f"return_{name}")
            node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
            graph.append(node)
            graph.outputs[position] = value = node.outputs[0]
        seen.add(id(value))
        value.name = name
