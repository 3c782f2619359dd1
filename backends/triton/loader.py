"""Launch the kernels of this folder without Triton and without attn-rewrite.

    bundle = Bundle()                        # the folder this file lies in, or its path
    (kernel,) = bundle.of_site("layers.0.attn#0")
    grid = kernel.grid(b=1, h=32, q=4096)
    kernel(grid, stream=0, Q_ptr=q.data_ptr(), Q_b=q.stride(0), ..., n_q=4096, n_kv=4096)

Arguments are numbers: addresses on the device, strides in elements, lengths.  The JSON file of a
kernel says what each of them is, which strides must be 1, and which values multiples of 16.  What
the file of tables of a site has (lists of tiles, tables of blocks) is copied to the device when the
kernel is made and need not be given; tokens in another order are in ``bundle.tables(site)``.
"""

import ctypes
import json
from pathlib import Path
from typing import Any, NamedTuple

_C_TYPES = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}
_LIBRARIES = {"cuda": ("libcuda.so.1", "cu"), "hip": ("libamdhip64.so", "hip")}


class Array(NamedTuple):
    """A table: the type as safetensors names it, extents and names of dimensions, the bytes."""

    dtype: str
    shape: "list[int]"
    ranks: "list[str]"
    data: bytes

    def stride(self, rank: str) -> int:
        """Elements between neighbours along ``rank``; 0 where one entry serves all."""
        place = self.ranks.index(rank)
        step = 1
        for extent in self.shape[place + 1 :]:
            step *= extent
        return step if self.shape[place] > 1 else 0


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

    def of_site(self, site: str) -> "list[Kernel]":
        """The kernels of an attention in the order of launch, by the name the report has for it."""
        tables = self.tables(site)
        names = enumerate(self.index["sites"][site])
        return [Kernel(self, name, tables, place) for place, name in names]

    def codes_of_site(self, site: str) -> "list[Kernel]":
        """The kernels that make the codes, scales and means that `of_site` reads, to launch first.

        ``meta["makes"]`` names what each of them writes, ``meta["operand"]`` what it reads.
        """
        return [Kernel(self, name) for name in self.index.get("codes", {}).get(site, ())]

    def tables(self, site: str) -> "dict[str, Array]":
        """What the kernels of a site read besides its operands, and the order of its tokens."""
        name = self.index.get("tables", {}).get(site)
        if name is None:
            return {}
        content = (self.folder / name).read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        ranks = json.loads(header.pop("__metadata__")["ranks"])
        return {
            n: Array(e["dtype"], e["shape"], ranks[n],
                     content[slice(*(start + o for o in e["data_offsets"]))])
            for n, e in header.items()
        }  # fmt: skip

    def upload(self, data: bytes) -> int:
        """The address of a copy of ``data`` on the device, which stays until the process ends."""
        address = ctypes.c_void_p()
        names = (
            ("MemAlloc_v2", "MemcpyHtoD_v2") if self.prefix == "cu" else ("Malloc", "MemcpyHtoD")
        )
        self.call(names[0], ctypes.byref(address), ctypes.c_size_t(max(len(data), 1)))
        self.call(names[1], address, data, ctypes.c_size_t(len(data)))
        return address.value or 0


class Kernel:
    """A loaded kernel; a context of the device must be current (PyTorch makes one)."""

    def __init__(
        self,
        bundle: Bundle,
        name: str,
        tables: "dict[str, Array] | None" = None,
        place: int = 0,
    ) -> None:
        self.bundle, self.meta = bundle, json.loads((bundle.folder / f"{name}.json").read_text())
        suffix = "cubin" if bundle.prefix == "cu" else "hsaco"
        image = (bundle.folder / f"{name}.{suffix}").read_bytes()
        module, self.function = ctypes.c_void_p(), ctypes.c_void_p()
        bundle.call("ModuleLoadData", ctypes.byref(module), image)
        function = self.meta["function"].encode()
        bundle.call("ModuleGetFunction", ctypes.byref(self.function), module, function)
        if bundle.prefix == "cu":  # more than 48 KB of shared memory must be asked for
            bundle.call("FuncSetAttribute", self.function, 8, self.meta["shared_bytes"])
        self.given = self._given(tables or {}, place)

    def _given(self, tables: "dict[str, Array]", place: int) -> "dict[str, Any]":
        """Arguments that are fixed, or come from the tables of the site."""
        found: dict[str, Any] = dict(self.meta.get("values", {}))
        found.update(dict.fromkeys(self.meta.get("null", ()), 0))
        inputs = [t for t in self.meta.get("inputs", ()) if t["name"] not in tables]
        elsewhere = {rank for t in inputs for rank in t["ranks"]}
        own = {r: n for a in tables.values() for r, n in zip(a.ranks, a.shape, strict=True)}
        for argument in self.meta["arguments"]:
            rank = argument.get("rank")
            if argument.get("kind") == "extent" and rank in own and rank not in elsewhere:
                found[argument["name"]] = own[rank]
        for argument in self.meta["arguments"]:
            tensor = argument.get("tensor", "")
            array = tables.get(f"{place}/{tensor}", tables.get(tensor))
            if array is None:
                continue
            pointer = argument["kind"] == "pointer"
            found[argument["name"]] = (
                self.bundle.upload(array.data) if pointer else array.stride(argument["rank"])
            )
        return found

    def grid(self, **extents: int) -> "tuple[int, int, int]":
        """The number of programs for extents of ranks: ``b=1, h=32, q=4096``."""
        rule = self.meta["grid"]
        packed = rule["packed_heads"]
        programs = -(-extents[rule["rows"]] * packed // rule["block_rows"]) if rule["rows"] else 1
        for rank in rule["ranks"]:
            programs *= extents[rank] // (packed if rank == "h" else 1)
        second = 1
        for rank in rule.get("second", ()):
            second *= extents[rank]
        return programs, second, 1

    def __call__(self, grid: "tuple[int, int, int]", stream: int = 0, **values: Any) -> None:
        """Launch; ValueError for a missing value, or one the kernel was not compiled for."""
        values = {**self.given, **values}
        missing = [a["name"] for a in self.meta["arguments"] if a["name"] not in values]
        if missing:
            raise ValueError(f"{self.meta.get('kernel', 'the kernel')} needs {', '.join(missing)}")
        boxes = [_boxed(argument, values[argument["name"]]) for argument in self.meta["arguments"]]
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


def _boxed(argument: "dict[str, Any]", value: Any) -> Any:
    """A value as the C type of an argument."""
    name, kind, unit = argument["name"], argument["type"], argument["multiple_of"]
    if unit > 1 and value % unit:
        raise ValueError(f"{name} must be a multiple of {unit}, not {value}")
    if kind[0] == "*":
        return ctypes.c_void_p(value)
    box: Any = _C_TYPES[kind](value)
    if kind[0] == "i" and box.value != value:
        raise ValueError(f"{name} does not fit {kind}: {value}")
    return box
