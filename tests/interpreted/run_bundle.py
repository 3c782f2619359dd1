"""Run the kernels of a bundle with its own loader and a driver that interprets their sources.

``python run_bundle.py FOLDER INPUTS OUTPUTS``, with ``TRITON_INTERPRET=1``: what the loader hands to
the driver (copies, grids, boxed arguments) is all that a kernel gets, as on a GPU.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

KINDS = {
    "*fp32": torch.float32,
    "*fp16": torch.float16,
    "*i32": torch.int32,
    "*i1": torch.bool,
    "*i8": torch.int8,
    "*u8": torch.uint8,
    "*i64": torch.int64,
    "*fp64": torch.float64,
}
NUMBERS = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}


def module_of(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem.replace("-", "_"), path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Driver:
    """Memory by address, and launches of the kernel that is set."""

    def __init__(self) -> None:
        self.memory: dict[int, torch.Tensor] = {}
        self.kernel: Any = None
        self.launches: list[tuple[str, tuple[int, int, int]]] = []

    def __getattr__(self, name: str) -> Any:
        known = {"cuMemAlloc_v2": self.allocate, "cuMemcpyHtoD_v2": self.copy,
                 "cuLaunchKernel": self.launch}  # fmt: skip
        # ModuleLoadData, ModuleGetFunction and FuncSetAttribute have nothing to do.
        return known.get(name, lambda *arguments: 0)

    def allocate(self, address: Any, size: Any) -> int:
        room = torch.zeros(size.value + 15, dtype=torch.uint8)
        room = room[-room.data_ptr() % 16 :]  # memory of a device is aligned
        self.memory[room.data_ptr()] = room
        address._obj.value = room.data_ptr()
        return 0

    def copy(self, address: Any, data: bytes, size: Any) -> int:
        ctypes.memmove(address.value, data, size.value)
        return 0

    def launch(self, function: Any, x: int, y: int, z: int, *rest: Any) -> int:
        meta, pointers = self.kernel.meta, rest[5]
        values: dict[str, Any] = dict(meta["constants"])
        for place, argument in enumerate(meta["arguments"]):
            kind, at = argument["type"], pointers[place]
            if argument["name"] in meta.get("null", ()):
                values[argument["name"]] = torch.zeros(1)  # not read
            elif kind in KINDS:
                room = self.memory[ctypes.c_void_p.from_address(at).value or 0]
                size = KINDS[kind].itemsize
                room = room[: room.numel() // size * size] if room.dtype == torch.uint8 else room
                values[argument["name"]] = room.view(KINDS[kind])
            else:
                values[argument["name"]] = NUMBERS[kind].from_address(at).value
        source = module_of(self.kernel.bundle.folder / f"{meta['kernel']}.py")
        getattr(source, meta["function"])[(x, y, z)](**values)
        self.launches.append((meta["kernel"], (x, y, z)))
        return 0


def codes_of(
    bundle: Any, driver: Driver, site: str, x: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What the quantising kernels of a site make of its operands, by name."""
    made: dict[str, torch.Tensor] = {}
    types = {"int8": torch.int8, "uint8": torch.uint8, "float32": torch.float32,
             "float64": torch.float64}  # fmt: skip
    for kernel in bundle.codes_of_site(site):
        meta = kernel.meta
        operand = x[meta["operand"]]
        b, h, n, d = operand.shape
        known = {"b": b, "h": h, "n": n, "d": d}
        for name, text in meta["makes"].items():
            kind, _, shape = text.partition(" [")
            sizes = [eval(s, {"ceil": math.ceil}, known) for s in split_sizes(shape)]
            made[name] = torch.zeros(sizes, dtype=types[kind])
        held = {**made, meta["operand"]: operand}
        driver.memory |= {t.data_ptr(): t for t in held.values()}
        driver.kernel = kernel
        values: dict[str, Any] = {"groups": -(-n // max(meta["group"], 1))}
        for argument in meta["arguments"]:
            if argument["kind"] == "pointer" and argument["tensor"]:
                values[argument["name"]] = held[argument["tensor"]].data_ptr()
            elif argument["kind"] == "extent":
                values[argument["name"]] = known[argument["rank"]]
            elif argument["kind"] == "stride":
                values[argument["name"]] = operand.stride("bhnd".index(argument["rank"]))
        kernel(kernel.grid(**known), **values)
    return made


def split_sizes(text: str) -> list[str]:
    """``b, h, ceil(n / 64)], two codes a byte`` as its sizes."""
    return text.partition("]")[0].split(", ")


def attend(bundle: Any, driver: Driver, site: str, x: dict[str, torch.Tensor]) -> torch.Tensor:
    """AV of a site from Q, K, V by the kernels of its bundle."""
    tables = {n: t for n, t in bundle.tables(site).items() if n in ("order_q", "order_kv", "place")}
    orders = {n: torch.frombuffer(bytearray(t.data), dtype=torch.int32).view(t.shape).long()
              for n, t in tables.items()}  # fmt: skip

    def gathered(t: torch.Tensor, order: str) -> torch.Tensor:
        if order not in orders:
            return t
        return t.gather(2, orders[order][None, :, :, None].expand(len(t), -1, -1, t.shape[3]))

    operands = {
        "Q": gathered(x["Q"], "order_q"), "K": gathered(x["K"], "order_kv"),
        "V": gathered(x["V"], "order_kv"),
    }  # fmt: skip
    b, h, q, _ = x["Q"].shape
    operands |= codes_of(bundle, driver, site, operands)
    operands |= {"AV": torch.zeros(b, h, q, x["V"].shape[3]), "LSE": torch.zeros(b, h, q)}
    driver.memory |= {t.data_ptr(): t for t in operands.values()}
    (kernel,) = bundle.of_site(site)
    driver.kernel = kernel
    sizes = {"b": b, "h": h, "q": q, "kv": x["K"].shape[2], "hkv": x["K"].shape[1]}
    ranks = {d["name"]: d["ranks"] for d in kernel.meta["inputs"]}
    for name, names in ranks.items():
        found = operands[name].shape if name in operands else ()
        sizes |= {r: n for r, n in zip(names, found, strict=False) if r not in (*sizes, "d", "f")}
    ranks |= {o["name"]: o["ranks"] for o in kernel.meta["outputs"]}
    values: dict[str, Any] = {}
    for argument in kernel.meta["arguments"]:
        name, tensor = argument["name"], argument["tensor"]
        if argument["kind"] == "extent" and argument["rank"] in sizes:
            values[name] = sizes[argument["rank"]]
        elif tensor in operands:
            place = ranks[tensor].index(argument["rank"]) if argument["kind"] == "stride" else 0
            pointer = argument["kind"] == "pointer"
            values[name] = (
                operands[tensor].data_ptr() if pointer else operands[tensor].stride(place)
            )
    kernel(kernel.grid(**sizes), **values)
    return gathered(operands["AV"], "place")


def main(folder: Path, inputs: Path, outputs: Path) -> None:
    load = module_of(folder / "load.py")
    driver = Driver()
    load.ctypes = type("ctypes", (), {**vars(ctypes), "CDLL": staticmethod(lambda name: driver)})
    bundle = load.Bundle(folder)
    x = load_file(inputs)
    found = {s: attend(bundle, driver, s, x).contiguous() for s in bundle.index["sites"]}
    save_file(found, outputs)
    print(json.dumps(driver.launches))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
