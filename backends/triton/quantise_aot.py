"""The kernels that make codes, compiled ahead of time for the bundle of a site.

An operand takes one kernel, or two where something is known of a channel only once all tokens are
read (a mean that is taken off, one scale a channel).  Their metadata is that of generated kernels,
and the loader launches them alike; ``makes`` says which argument is which tensor.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from attn_rewrite.backends.triton import quantise_kernel as kernels
from attn_rewrite.backends.triton.aot import LIMITS, POINTERS, Binary, compile_kernel, fits
from attn_rewrite.backends.triton.packed import is_packed
from attn_rewrite.backends.triton.quantise import Coded, coded
from attn_rewrite.backends.triton.quantise_ops import constants, padded, tile_of
from attn_rewrite.backends.triton.staged import Staged
from attn_rewrite.cascade.ir import Cascade
from attn_rewrite.errors import ToolError
from attn_rewrite.passes.quantize.quantisers import EPSILON
from attn_rewrite.site import Site

SOURCE = Path(kernels.__file__)
_TYPES = {
    "index": "*i64", "mean": "*fp64", "given": "*fp64", "scale": "*fp64", "mean_out": "*fp32",
    "scale_out": "*fp32", "codes": "*i8",
    "scales": "*fp32", "heads": "i32", "length": "i32", "groups": "i32", "largest": "fp32",
    "smallest": "fp32", "stride_b": "i64", "stride_h": "i64", "stride_n": "i64",
    "stride_d": "constexpr",
}  # fmt: skip


@dataclass(frozen=True)
class CodeKernel:
    """One kernel of `quantise_kernel`: its name, constants, and the tensors behind its arguments.

    ``rows`` tokens are the share of one program; 0: all tokens are.
    """

    function: str
    constants: tuple[tuple[str, Any], ...]
    tensors: tuple[tuple[str, str], ...]
    numbers: tuple[tuple[str, float], ...]
    rows: int
    group: int
    packed: bool


def code_kernels(item: Coded, channels: int, core: Cascade) -> tuple[CodeKernel, ...]:
    """The kernels that make the codes ``item`` of an operand with ``channels``, in order."""
    numbers = (("largest", float(item.quantiser.limit)), ("smallest", EPSILON))
    smooth, scaled = item.mean is not None, item.group == 0
    # In float64 beside what the attention reads in float32.
    wide = {
        "mean": f"{item.mean}64" if smooth else "",
        "scale": f"{item.scales}64" if scaled else "",
    }
    found = []
    if smooth or scaled:
        held = {
            "lanes": channels, "padded": padded(channels), "tile": tile_of(32, channels),
            "smooth": smooth, "scaled": scaled, "stride_d": 1,
        }  # fmt: skip
        tensors = {
            "x": item.operand, "mean": wide["mean"], "scale": wide["scale"],
            "mean_out": item.mean or "", "scale_out": item.scales if scaled else "",
        }  # fmt: skip
        found.append(CodeKernel("channels_kernel", tuple(held.items()), tuple(tensors.items()),
                                numbers, 0, 0, packed=False))  # fmt: skip
    packed = any(t.name == item.codes and is_packed(t) for t in core.inputs)
    row = torch.empty(1, 1, channels, device="meta")
    x = torch.empty(1, 1, 1, channels, device="meta")
    held = constants(
        x, None, row if smooth else None, row if scaled else None, max(item.group, 1),
        item.quantiser.rounding == "away", packed,
    )  # fmt: skip
    tensors = {
        "x": item.operand, "index": "", "mean": wide["mean"],
        "given": wide["scale"], "codes": item.codes,
        "scales": "" if scaled else item.scales,
    }  # fmt: skip
    found.append(CodeKernel("quantise_kernel", tuple({**held, "stride_d": 1}.items()),
                            tuple(tensors.items()), numbers, held["shared"], max(item.group, 1),
                            packed))  # fmt: skip
    return tuple(found)


def compile_codes(kernel: CodeKernel, target: str, dtype: str) -> Binary:
    """Compile for ``target`` with an operand of ``dtype``; `ToolError` where Triton fails.

    A tensor that the kernel does not read has a null address.
    """
    function = getattr(kernels, kernel.function)
    held = dict(kernel.constants)
    signature = {
        n: "constexpr" if n in held else POINTERS[dtype] if n == "x" else _TYPES[n]
        for n in function.arg_names
    }
    if kernel.packed:
        signature["codes"] = POINTERS["uint8"]
    aligned = held["lanes"] % 16 == 0
    wide = [
        n for n in signature if n == "x" or (aligned and n.startswith("stride_") and n not in held)
    ]
    places = {n: i for i, n in enumerate(function.arg_names)}
    attributes: dict[tuple[int, ...], Any] = {(places[n],): [["tt.divisibility", 16]] for n in wide}
    compiled, files, resources = compile_kernel(
        function, (signature, held, attributes), target, warps=4, stages=2, name=kernel.function
    )
    used = {n for n, t in kernel.tensors if t}
    given = [
        {
            "name": n, "type": kind, "kind": _kind(n, kind),
            "tensor": dict(kernel.tensors).get(n, ""),
            "rank": _RANKS.get(n, ""), "multiple_of": 16 if n in wide else 1,
        }
        for n, kind in signature.items() if kind != "constexpr"
    ]  # fmt: skip
    meta = {
        "function": compiled.metadata.name, "warps": 4, "stages": 2, "target": target,
        "threads": resources.threads, "shared_bytes": resources.shared, "arguments": given,
        "trailing_null_pointers": 2, "inputs": [], "constants": held, "unit_strides": ["stride_d"],
        "grid": {
            "formula": f"(ceil(n / {kernel.rows}), b * h)" if kernel.rows else "(b * h)",
            "rows": "n" if kernel.rows else "", "block_rows": max(kernel.rows, 1),
            "packed_heads": 1, "ranks": [] if kernel.rows else ["b", "h"],
            "second": ["b", "h"] if kernel.rows else [], "split": False,
        },
        "values": dict(kernel.numbers), "group": kernel.group,
        "null": sorted({n for n, _ in kernel.tensors} - used),
        "makes": {
            t: _SHAPES["halves" if n == "codes" and kernel.packed else n].format(g=kernel.group)
            for n, t in kernel.tensors if t and _is_made(kernel, n)
        },
        "resources": asdict(resources),
    }  # fmt: skip
    return Binary(target, files, resources, meta)


_RANKS = {"heads": "h", "length": "n", "stride_b": "b", "stride_h": "h", "stride_n": "n"}
_SHAPES = {
    "codes": "int8 [b, h, n, d]", "halves": "uint8 [b, h, n, ceil(d / 2)], two codes a byte",
    "scales": "float32 [b, h, ceil(n / {g})]",
    "mean": "float64 [b, h, d]", "scale": "float64 [b, h, d]", "mean_out": "float32 [b, h, d]",
    "scale_out": "float32 [b, h, d]",
}  # fmt: skip


def _kind(name: str, kind: str) -> str:
    if kind.startswith("*"):
        return "pointer"
    return "stride" if name.startswith("stride_") else "extent" if name in _RANKS else "special"


def _is_made(kernel: CodeKernel, name: str) -> bool:
    return name in (
        ("mean", "scale", "mean_out", "scale_out")
        if kernel.function == "channels_kernel"
        else ("codes", "scales")
    )


class CodeWriter:
    """Writes the kernels of quantised sites into ``path``, equal ones once; ``entries`` by name."""

    def __init__(self, path: Path, target: str) -> None:
        self.path, self.target = path, target
        self.entries: dict[str, dict[str, Any]] = {}

    def write(self, site: Site, held: Staged) -> tuple[tuple[str, ...], str]:
        """Names of the kernels in the order of launch, and what none of them makes."""
        names, made = [], set[str]()
        for item in coded(held.stages):
            made |= {item.codes, item.scales, *([item.mean] if item.mean else [])}
            operand = site.inputs[item.operand].node.meta["val"]
            dtype = str(operand.dtype).removeprefix("torch.")
            channels = int(site.extents()["f" if item.operand == "V" else "d"])
            names += [
                self._write(kernel, dtype) for kernel in code_kernels(item, channels, held.core)
            ]
        left = [n for n in held.stages.outputs if n not in made]
        note = f"no kernel here makes {', '.join(left)}: the caller computes them" if left else ""
        return tuple(names), note

    def _write(self, kernel: CodeKernel, dtype: str) -> str:
        key = hashlib.sha256(repr((kernel, dtype)).encode()).hexdigest()[:12]
        name = f"{kernel.function}-{dtype}-{key}"
        if name in self.entries:
            return name
        binary = compile_codes(kernel, self.target, dtype)
        if not fits(binary.resources, LIMITS[self.target]):
            raise ToolError(
                f"{name} does not fit {self.target}: {binary.resources.spilled} bytes spilled, "
                f"{binary.resources.shared} bytes of shared memory", stage="triton resources",
            )  # fmt: skip
        shutil.copyfile(SOURCE, self.path / f"{name}.py")
        for kind, content in binary.files.items():
            (self.path / f"{name}.{kind}").write_bytes(content)
        meta = {
            "kernel": name,
            "dtype": dtype,
            "operand": dict(kernel.tensors)["x"],
            **binary.metadata,
        }
        (self.path / f"{name}.json").write_text(json.dumps(meta, indent=1) + "\n", "utf-8")
        lanes = {"d": dict(kernel.constants)["lanes"]}
        self.entries[name] = {
            "name": name,
            "dtype": dtype,
            "lanes": lanes,
            "resources": asdict(binary.resources),
        }
        return name
