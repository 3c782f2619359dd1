"""Kernels compiled ahead of time, without a GPU: binaries and what they need of a processor.

A binary is specialised like a launch would specialise it: the last stride of every operand is 1,
its other strides and its address are multiples of 16 where the head dimension is one.  Those
assumptions are part of the metadata, and the loader checks them.  Strides are 64 bits wide, lengths
32.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from attn_rewrite.backends.triton.build import is_interpreted, kernel_of
from attn_rewrite.backends.triton.emit import Source
from attn_rewrite.backends.triton.frame import Parameter
from attn_rewrite.backends.triton.launch import last_line
from attn_rewrite.backends.triton.packed import is_packed
from attn_rewrite.backends.triton.schedule import Device, least_side, padded_side
from attn_rewrite.errors import PolicyError, ToolError

TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")
POINTERS = {
    "float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32", "float8_e4m3fn": "*fp8e4nv",
    "float8_e5m2": "*fp8e5", "int8": "*i8", "int32": "*i32", "int64": "*i64", "bool": "*i1",
    "uint8": "*u8",
}  # fmt: skip
_NARROW = ("float8_e4m3fn", "float8_e5m2", "int8")
_NUMBERS = {"dropout": "fp32"}
_DECLARED = {
    "bool": "bool", "i64": "int64", "i32": "int32", "i8": "int8", "f32": "float32", "i4": "uint8",
    "f8e4m3": "float8_e4m3fn", "f8e5m2": "float8_e5m2",
}  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """What one processor (SM, CU) has: registers, shared memory in bytes, resident threads."""

    registers: int
    shared: int
    threads: int
    lanes: int


# Sources: CUDA C programming guide, table of technical specifications per compute capability
# (shared memory and threads per multiprocessor); AMD CDNA3 ISA guide (512 vector registers of 4
# bytes per lane for each of 4 SIMDs, 64 KiB of LDS, 8 waves per SIMD).
LIMITS = {
    "cuda:80": Limits(65536, 164 * 1024, 2048, 32),
    "cuda:90": Limits(65536, 228 * 1024, 2048, 32),
    "cuda:100": Limits(65536, 228 * 1024, 2048, 32),
    "hip:gfx942": Limits(4 * 512 * 64, 64 * 1024, 2048, 64),
}


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes: registers a thread, bytes spilled, bytes of shared memory.

    ``occupancy`` bounds the share of a processor's threads that can be resident, from registers,
    shared memory and threads; schedulers may do worse.
    """

    registers: int
    spilled: int
    shared: int
    threads: int
    occupancy: float


@dataclass(frozen=True, eq=False)
class Binary:
    """A compiled kernel: its code and assembly by kind of file, and its metadata."""

    target: str
    files: Mapping[str, bytes]
    resources: Resources
    metadata: Mapping[str, Any]


def parse_target(text: str) -> Device:
    """``cuda:90`` or ``hip:gfx942`` as a device; `PolicyError` for anything else."""
    backend, _, arch = text.partition(":")
    if text not in TARGETS:
        raise PolicyError(f"target {text!r} is not known; this version has {', '.join(TARGETS)}")
    return Device(backend, int(arch) if backend == "cuda" else arch)


def compile_source(
    source: Source,
    target: str,
    dtype: str,
    lanes: Mapping[str, int],
    special: Mapping[str, Any] | None = None,
    dtypes: Mapping[str, str] | None = None,
) -> Binary:
    """Compile ``source`` for ``target`` with operands of ``dtype`` (a torch name, ``bfloat16``).

    ``lanes`` are the extents of the head dimensions; ``dtypes`` the types of operands that have
    another one, by name.  Raises `ToolError` where Triton or the assembler fails.
    """
    kernel = kernel_of(source)
    parts = _specialised(source, dtype, lanes, special or {}, dtypes or {})
    made = compile_kernel(
        kernel, parts, target, warps=source.schedule.warps, stages=source.schedule.stages,
        name=f"{source.name} with {dtype}",
    )  # fmt: skip
    meta = _metadata(source, target, made.compiled, *parts, made.resources)
    return Binary(target, made.files, made.resources, meta)


Signature = tuple[Mapping[str, str], Mapping[str, Any], Mapping[tuple[int, ...], Any]]


class Compiled(NamedTuple):
    """What Triton made, its files by kind, and what it takes."""

    compiled: Any
    files: Mapping[str, bytes]
    resources: Resources


def compile_kernel(
    kernel: Any, parts: Signature, target: str, *, warps: int, stages: int, name: str
) -> Compiled:
    """Compile a kernel of ``triton.jit`` for ``target``.

    ``parts`` are the types of its arguments, the values of constants, and what is known of numbers
    and addresses.  Raises `ToolError` where Triton or the assembler fails.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    device = parse_target(target)
    if is_interpreted(kernel):
        raise ToolError(
            "kernels are interpreted in this process (TRITON_INTERPRET is set); compile ahead of "
            "time in a process without it", stage="triton compile",
        )  # fmt: skip
    warp = 64 if device.backend == "hip" else 32
    options = {"num_warps": warps, "num_stages": stages}
    try:
        compiled = triton.compile(
            ASTSource(kernel, *parts),
            target=GPUTarget(device.backend, device.arch, warp),
            options={**options, "enable_fp_fusion": True},
        )
    except Exception as error:
        raise ToolError(
            f"Triton cannot compile {name} for {target}: {last_line(error)}",
            stage="triton compile",
        ) from error
    kinds = ("ptx", "cubin") if device.backend == "cuda" else ("amdgcn", "hsaco")
    files = {k: _bytes(compiled.asm[k]) for k in kinds}
    if getattr(compiled.metadata, "global_scratch_size", 0):
        raise ToolError(
            f"{name} for {target} wants scratch memory, which the loader does not provide",
            stage="triton compile",
        )
    resources = _resources(target, device, files, compiled.metadata, warps * warp)
    return Compiled(compiled, files, resources)


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value


# Specialisation


def _specialised(
    source: Source,
    dtype: str,
    lanes: Mapping[str, int],
    special: Mapping[str, Any],
    dtypes: Mapping[str, str],
) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], list[list[Any]]]]:
    """Types of all arguments, values of constants, and what is known of pointers and strides."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    packed = {t.name for t in source.program.cascade.inputs if is_packed(t)}
    for place, p in enumerate(source.parameters):
        if p.constant:
            signature[p.name] = "constexpr"
            constants[p.name] = _constant(source, p, lanes, special)
        elif p.kind == "pointer":
            known = dtypes.get(p.tensor)
            signature[p.name] = POINTERS[known] if known else pointer_type(source, p.tensor, dtype)
            attributes[place,] = [["tt.divisibility", 16]]
        elif p.kind == "stride" and p.rank == last_rank(source, p.tensor):
            signature[p.name] = "constexpr"
            constants[p.name] = 1
        else:
            # A tensor of 2^20 tokens has strides beyond 32 bits.
            signature[p.name] = _NUMBERS.get(p.name, "i64" if p.kind == "stride" else "i32")
            step = 32 if p.tensor in packed else 16  # two in a byte
            aligned = all(n % step == 0 for n in lanes.values())
            if p.kind == "stride" and aligned and set(lanes) & set(ranks_of(source, p.tensor)):
                attributes[place,] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _constant(
    source: Source, p: Parameter, lanes: Mapping[str, int], special: Mapping[str, Any]
) -> Any:
    schedule, roles = source.schedule, source.program.roles
    if p.kind == "lane":
        least = least_side(schedule, source.program.cascade.inputs)
        side = padded_side(lanes[p.rank], least)
        return side if p.name.startswith("BLOCK_") else lanes[p.rank]
    if p.rank in (roles.row, roles.along):
        return schedule.block_rows if p.rank == roles.row else schedule.block_along
    return schedule.precision if p.name == "PRECISION" else special[p.name]


def ranks_of(source: Source, tensor: str) -> tuple[str, ...]:
    """The dimensions of an input, an output or a table."""
    for decl in source.program.cascade.inputs:
        if decl.name == tensor:
            return decl.ranks
    for output in source.outputs:
        if output.name == tensor:
            return output.ranks
    return ()


def last_rank(source: Source, tensor: str) -> str:
    """The rank whose neighbours are next to each other in memory."""
    ranks = ranks_of(source, tensor)
    return ranks[-1] if ranks else ""


def pointer_type(source: Source, tensor: str, dtype: str) -> str:
    """The Triton type of a pointer: operands have ``dtype``, statistics and states float32."""
    for decl in source.program.cascade.inputs:
        if decl.name == tensor:
            statistic = decl.dtype == "float" and not set(decl.ranks) & set(
                source.program.roles.lanes
            )
            return POINTERS["float32" if statistic else _DECLARED.get(decl.dtype, dtype)]
    for output in source.outputs:
        if output.name == tensor:
            wide = source.schedule.split or not set(output.ranks) & set(source.program.roles.lanes)
            return POINTERS["float32" if wide else "bfloat16" if dtype in _NARROW else dtype]
    # A seed has 64 bits; tables of tiles, pages and sequences have 32.
    return POINTERS["int64" if tensor == "seed" else "int32"]


# Resources


def _resources(
    target: str, device: Device, files: Mapping[str, bytes], metadata: Any, threads: int
) -> Resources:
    if device.backend == "cuda":
        registers, spilled = _ptxas(files["ptx"].decode(), int(device.arch))
    else:
        text = files["amdgcn"].decode()
        # Accumulation registers are counted among these: both are one file since gfx90a.
        registers = _number(text, r"\.vgpr_count:\s+(\d+)")
        # Scalar registers spill into lanes of vector registers, which costs no memory.
        spilled = 4 * _number(text, r"\.vgpr_spill_count:\s+(\d+)")
    shared = int(metadata.shared)
    return Resources(registers, spilled, shared, threads,
                     occupancy_bound(LIMITS[target], registers, shared, threads))  # fmt: skip


def _number(text: str, pattern: str) -> int:
    found = re.search(pattern, text)
    return int(found.group(1)) if found else 0


def _ptxas(ptx: str, arch: int) -> tuple[int, int]:
    """Registers a thread and bytes of spill stores, as the assembler reports them."""
    from triton.backends.nvidia import compiler

    name = re.search(r"\.target\s+(\w+)", ptx)
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "kernel.ptx"
            path.write_text(ptx)
            command = [compiler.get_ptxas(arch).path, "-v",
                       f"--gpu-name={name.group(1) if name else arch}",
                       str(path), "-o", str(path.with_suffix(".cubin"))]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, check=False)
    except (OSError, RuntimeError) as error:
        raise ToolError(f"ptxas cannot be run: {last_line(error)}", stage="ptxas") from error
    if done.returncode:
        raise ToolError(f"ptxas failed: {last_line(Exception(done.stderr))}", stage="ptxas")
    return (
        _number(done.stderr, r"Used (\d+) registers"),
        _number(done.stderr, r"(\d+) bytes spill stores"),
    )


def occupancy_bound(limits: Limits, registers: int, shared: int, threads: int) -> float:
    """Upper bound on resident threads over the most a processor holds, between 0 and 1."""
    granule = 8  # registers are handed out to a warp in steps of 8 a thread
    each = max(1, -(-max(registers, 1) // granule) * granule * threads)
    blocks = [limits.registers // each, limits.threads // threads]
    if shared:
        blocks.append(limits.shared // shared)
    return min(1.0, min(blocks) * threads / limits.threads)


def fits(resources: Resources, limits: Limits) -> bool:
    """No register is spilled, and one block's shared memory is there."""
    reserved = 1024  # a block's share of the processor's shared memory for the system
    return resources.spilled == 0 and resources.shared + reserved <= limits.shared


# Metadata


def grid_formula(source: Source) -> str:
    """The number of programs along the first dimension of the grid, as an expression of extents."""
    roles, schedule = source.program.roles, source.schedule
    rows = roles.row if schedule.pack == 1 else f"{roles.row} * {schedule.pack}"
    factors = [f"ceil({rows} / {schedule.block_rows})"]
    for rank in roles.grid:
        packed = rank == "h" and schedule.pack > 1
        factors.append(f"({rank} / {schedule.pack})" if packed else rank)
    return " * ".join(factors)


def _lists(source: Source) -> dict[str, Any] | None:
    """What the int32 arguments ``tiles`` and ``columns`` hold, where a kernel has them."""
    schedule = source.schedule
    if schedule.skipping != "lists":
        return None
    (guard,) = source.program.guards()
    return {
        "guard": str(guard),
        "rows": schedule.block_rows // schedule.pack,
        "columns": schedule.block_along,
        "tiles": "[b or 1, h or 1, blocks of rows, 3]: places in columns where the partial tiles "
        "of a block begin, its full tiles begin, and both end",
        "columns_hold": "numbers of tiles, those of a block one after the other",
    }


def _metadata(
    source: Source,
    target: str,
    compiled: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    attributes: Mapping[tuple[int, ...], Any],
    resources: Resources,
) -> dict[str, Any]:
    """Everything a caller without Triton needs, as plain values."""
    given = [
        {
            "name": p.name, "type": signature[p.name], "kind": p.kind, "tensor": p.tensor,
            "rank": p.rank, "multiple_of": 16 if (place,) in attributes else 1,
        }
        for place, p in enumerate(source.parameters)
        if signature[p.name] != "constexpr"
    ]  # fmt: skip
    roles, schedule = source.program.roles, source.schedule
    return {
        "function": compiled.metadata.name,
        "warps": schedule.warps,
        "stages": schedule.stages,
        "target": target,
        "threads": resources.threads,
        "shared_bytes": resources.shared,
        "arguments": given,
        "trailing_null_pointers": 2,
        "inputs": [{"name": t.name, "ranks": list(t.ranks), "dtype": t.dtype}
                   for t in source.program.cascade.inputs],
        "constants": dict(constants),
        "unit_strides": [p.name for p in source.parameters if p.kind == "stride" and
                         signature[p.name] == "constexpr"],
        "grid": {
            "formula": grid_formula(source), "rows": roles.row, "block_rows": schedule.block_rows,
            "packed_heads": schedule.pack, "ranks": list(roles.grid), "split": schedule.split,
        },
        "tile_lists": _lists(source),
        "outputs": [asdict(o) for o in source.outputs],
        "resources": asdict(resources),
        "schedule": {k: sorted(v) if isinstance(v, frozenset) else v
                     for k, v in asdict(schedule).items()},
    }  # fmt: skip
