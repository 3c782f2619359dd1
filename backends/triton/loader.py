"""Launch the kernels of this folder without Triton and without attn-rewrite.

    kernels = Bundle("cuda-90")              # the folder this file lies in, or its path
    kernel = kernels.of_site("layers.0.attn#0")
    kernel(grid=(blocks, 1, 1), stream=0, Q_ptr=q.data_ptr(), Q_b=q.stride(0), ...)

Arguments are integers: addresses on the device, strides in elements, lengths.  ``kernels.json``
says what each of them is, which strides must be 1, and which values must be multiples of 16.
"""

import ctypes
import json
from pathlib import Path
from typing import Any

_C_TYPES = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}
_LIBRARIES = {"cuda": ("libcuda.so.1", "cu"), "hip": ("libamdhip64.so", "hip")}


class Bundle:
    """The kernels of one target."""

    def __init__(self, folder: "str | Path | None" = None) -> None:
        self.folder = Path(folder or Path(__file__).parent)
        self.index = json.loads((self.folder / "kernels.json").read_text())
        library, self.prefix = _LIBRARIES[self.index["target"].split(":")[0]]
        self.driver = ctypes.CDLL(library)

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function of the driver; RuntimeError unless it succeeds."""
        status = getattr(self.driver, self.prefix + name)(*arguments)
        if status != 0:
            raise RuntimeError(f"{self.prefix}{name} failed with status {status}")

    def of_site(self, site: str) -> "Kernel":
        """The last kernel of an attention, by the name the report has for it."""
        return Kernel(self, self.index["sites"][site][-1])


class Kernel:
    """A loaded kernel; a context of the device must be current (PyTorch makes one)."""

    def __init__(self, bundle: Bundle, name: str) -> None:
        self.bundle, self.meta = bundle, json.loads((bundle.folder / f"{name}.json").read_text())
        suffix = "cubin" if bundle.prefix == "cu" else "hsaco"
        image = (bundle.folder / f"{name}.{suffix}").read_bytes()
        module, self.function = ctypes.c_void_p(), ctypes.c_void_p()
        bundle.call("ModuleLoadData", ctypes.byref(module), image)
        function = self.meta["function"].encode()
        bundle.call("ModuleGetFunction", ctypes.byref(self.function), module, function)
        if bundle.prefix == "cu":  # more than 48 KB of shared memory must be asked for
            bundle.call("FuncSetAttribute", self.function, 8, self.meta["shared_bytes"])

    def __call__(self, grid: "tuple[int, int, int]", stream: int = 0, **values: Any) -> None:
        """Launch; ValueError for a value the kernel was not compiled for."""
        boxes: list[Any] = []
        for argument in self.meta["arguments"]:
            value = values[argument["name"]]
            if argument["multiple_of"] > 1 and value % argument["multiple_of"]:
                raise ValueError(f"{argument['name']} must be a multiple of 16, not {value}")
            kind = argument["type"]
            boxes.append(ctypes.c_void_p(value) if kind[0] == "*" else _C_TYPES[kind](value))
        for name in self.meta["unit_strides"]:
            if values.get(name, 1) != 1:
                raise ValueError(f"{name} must be 1, not {values[name]}")
        boxes += [ctypes.c_void_p(0)] * self.meta["trailing_null_pointers"]
        pointers = (ctypes.c_void_p * len(boxes))(*(ctypes.addressof(b) for b in boxes))
        prefix = "Launch" if self.bundle.prefix == "cu" else "ModuleLaunch"
        self.bundle.call(
            prefix + "Kernel", self.function, *grid, self.meta["threads"], 1, 1,
            self.meta["shared_bytes"], ctypes.c_void_p(stream), pointers, None,
        )  # fmt: skip
