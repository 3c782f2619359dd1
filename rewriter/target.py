"""Hardware a plan is made for: arithmetic and memory ceilings, and how much fits on the chip.

Data-sheet values are data with their source, dense (without 2:4 sparsity).  The CPU of this machine
is measured once and remembered on disk.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attn_rewrite.errors import PolicyError, ToolError

if TYPE_CHECKING:
    import torch

_SPELLINGS = {
    "float64": "f64",
    "double": "f64",
    "float": "f32",
    "float32": "f32",
    "tfloat32": "tf32",
    "float16": "f16",
    "half": "f16",
    "bfloat16": "bf16",
    "float8_e4m3fn": "f8",
    "float8_e5m2": "f8",
    "fp8": "f8",
    "int8": "i8",
    "uint8": "i8",
}
BYTES = {"f64": 8, "f32": 4, "tf32": 4, "f16": 2, "bf16": 2, "f8": 1, "i8": 1}


def dtype_name(dtype: object) -> str:
    """The short name of a dtype given as ``torch.float32``, ``"float32"`` or ``"f32"``.

    Raises `PolicyError` for a dtype that no target computes in.
    """
    text = str(dtype).removeprefix("torch.").lower()
    name = _SPELLINGS.get(text, text)
    if name not in BYTES:
        raise PolicyError(f"dtype {dtype} has no arithmetic ceiling; use {', '.join(BYTES)}")
    return name


@dataclass(frozen=True)
class Target:
    """One processor.

    ``flops`` lists (dtype, FLOP/s) of matrix products, a multiply-add being two; ``vector_flops``
    is the ceiling of elementwise float32 work, None where the same units do both.  ``bandwidth`` is
    bytes/s of main memory, ``on_chip`` the bytes of the last cache shared by all ``units`` (cores
    or multiprocessors).  ``source`` names where the numbers come from.

    Raises:
        ValueError: a ceiling is not positive.
    """

    name: str
    device: str
    flops: tuple[tuple[str, float], ...]
    bandwidth: float
    on_chip: int
    units: int
    source: str
    vector_flops: float | None = None

    def __post_init__(self) -> None:
        ceilings = {"bandwidth": self.bandwidth, "on_chip": self.on_chip, "units": self.units}
        for what, value in (*ceilings.items(), *self.flops):
            if not value > 0:
                raise ValueError(f"target {self.name}: {what} is {value}; give a positive number")

    def peak(self, dtype: object) -> float:
        """FLOP/s of matrix products in ``dtype``.

        Raises `PolicyError` when the target does not compute in it.
        """
        known = dict(self.flops)
        name = dtype_name(dtype)
        if name not in known:
            raise PolicyError(
                f"target {self.name} does not multiply {name} matrices; it has {', '.join(known)}"
            )
        return known[name]

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` reads them back."""
        return {**asdict(self), "flops": dict(self.flops)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Target:
        """The target of `to_json`; raises `PolicyError` for missing or unknown keys."""
        try:
            flops = tuple((str(k), float(v)) for k, v in values["flops"].items())
            return cls(**{**values, "flops": flops})
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            keys = ", ".join(f.name for f in fields(cls))
            raise PolicyError(f"not a target ({error}); expected the keys {keys}") from error


def _tera(**flops: float) -> tuple[tuple[str, float], ...]:
    return tuple((name, value * 1e12) for name, value in flops.items())


# Matrix rates are the dense ones: the sheets print twice as much "with sparsity".  H100 and H200
# share the GH100 chip.  Figures of the data sheets to four digits (sheet: 67, 989, 1 979).
_HOPPER = _tera(f64=66.9, tf32=494.7, f32=66.9, f16=989.4, bf16=989.4, f8=1978.9, i8=1978.9)

#: Data-sheet targets by name.
TARGETS: Mapping[str, Target] = {
    t.name: t
    for t in (
        Target(
            "a100",
            "cuda",
            # "NVIDIA A100 Tensor Core GPU" data sheet, SXM 80 GB: FP64 TC 19.5, TF32 156, FP16 312.
            _tera(f64=19.5, tf32=156, f32=19.5, f16=312, bf16=312, i8=624),
            2.039e12,  # same sheet: 2 039 GB/s
            40 * 2**20,  # "NVIDIA A100 Tensor Core GPU Architecture" white paper: 40 960 KB of L2
            108,  # same white paper: 7 GPCs, 54 TPCs
            "NVIDIA A100 Tensor Core GPU data sheet (SXM4, 80 GB); L2 cache and multiprocessors "
            "from the Ampere architecture white paper",
            19.5e12,  # data sheet: FP32
        ),
        Target(
            "h100",
            "cuda",
            # "NVIDIA H100 Tensor Core GPU Architecture" white paper, H100 SXM5 table.
            _HOPPER,
            3.35e12,  # "NVIDIA H100 Tensor Core GPU" data sheet: 3.35 TB/s
            50 * 2**20,  # white paper: 50 MB of L2
            132,  # white paper: 8 GPCs, 66 TPCs
            "NVIDIA H100 Tensor Core GPU data sheet (SXM5, 80 GB); rates, L2 cache and "
            "multiprocessors from the Hopper architecture white paper",
            66.9e12,  # white paper: FP32
        ),
        Target(
            "h200",
            "cuda",
            _HOPPER,  # "NVIDIA H200 Tensor Core GPU" data sheet: the rates of the H100 SXM
            4.8e12,  # same sheet: 4.8 TB/s
            50 * 2**20,
            132,
            "NVIDIA H200 Tensor Core GPU data sheet (SXM, 141 GB); same GH100 chip as H100",
            66.9e12,
        ),
        Target(
            "b200",
            "cuda",
            # "NVIDIA Blackwell Architecture" technical brief, HGX B200 at 1 000 W, per GPU.
            _tera(f64=40, tf32=1100, f32=80, f16=2250, bf16=2250, f8=4500, i8=4500),
            8e12,  # same brief: up to 8 TB/s (drivers report a bus of 7.67 TB/s)
            126 * 2**20,  # CUDA "Blackwell Tuning Guide": 126 MB of L2
            148,  # as the CUDA runtime reports it (74 of 80 on each of two dies)
            "NVIDIA Blackwell architecture technical brief (HGX B200, 1000 W, per GPU); L2 cache "
            "from the CUDA Blackwell tuning guide, multiprocessors as the CUDA runtime reports "
            "them",
            80e12,  # brief: FP32
        ),
    )
}


def target(name: str, *, cache_dir: Path | str | None = None) -> Target:
    """The target called ``name``: a data-sheet one, or ``cpu`` for `this_cpu`.

    Raises `PolicyError` for an unknown name.
    """
    key = name.lower()
    if key == "cpu":
        return this_cpu(cache_dir=cache_dir)
    if key not in TARGETS:
        raise PolicyError(f"no target is called {name!r}; choose from cpu, {', '.join(TARGETS)}")
    return TARGETS[key]


def for_device(device: str, *, cache_dir: Path | str | None = None) -> Target:
    """The target of a torch device as text (``cpu``, ``cuda:0``).

    Raises `PolicyError` for a device no data sheet is kept for: pass a `Target` of your own.
    """
    if device.split(":")[0] == "cpu":
        return this_cpu(cache_dir=cache_dir)
    if device.split(":")[0] != "cuda":
        raise PolicyError(f"device {device} has no target; pass a Target with its ceilings")
    import torch

    product = torch.cuda.get_device_name(device).lower()
    for name, known in TARGETS.items():
        if name in product:
            return known
    raise PolicyError(
        f"device {device} is called {product!r}, which has no target; "
        f"known are {', '.join(TARGETS)}"
    )


def this_cpu(*, cache_dir: Path | str | None = None) -> Target:
    """The CPU of this machine, measured once per (processor, threads, torch) and kept on disk.

    ``cache_dir`` relocates the file; the default is `knobs.cache_directory`.  Takes about a second
    the first time.  A cache that cannot be written is told at debug level 1 and costs only time.
    """
    import torch

    from attn_rewrite.knobs import cache_directory, tell

    folder = Path(cache_dir) if cache_dir is not None else cache_directory()
    key = f"{_processor()}|{torch.get_num_threads()} threads|torch {torch.__version__}"
    path = folder / "targets.json"
    kept = _read(path)
    if key in kept:
        return Target.from_json(kept[key])
    measured = _measure(key)
    try:
        _write(path, {**kept, key: measured.to_json()})
    except ToolError as error:
        # `error` is unbound after this block, before the message may be asked for.
        message = str(error)
        tell(1, message)
    return measured


def _read(path: Path) -> dict[str, Any]:
    """Entries of the cache; a file that is absent or not ours has none, and is written anew."""
    try:
        entries = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(entries, dict):
        return {}
    return {k: v for k, v in entries.items() if _is_target(v)}


def _is_target(value: object) -> bool:
    try:
        Target.from_json(value)  # type: ignore[arg-type]
    except PolicyError:
        return False
    return True


def _write(path: Path, entries: Mapping[str, Any]) -> None:
    """Replace the file at once, so that a crash leaves the old one or the new one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(entries, file, indent=1)
        Path(name).replace(path)
    except OSError as error:
        raise ToolError(
            f"the measured CPU cannot be kept in {path} ({error.strerror}); it is measured again "
            "next time",
            stage="cache",
        ) from error


def _processor() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        return platform.processor() or platform.machine()
    return platform.processor() or platform.machine()


_SIZE = 512  # order of the measured matrices: 0.27 GFLOP, well above any overhead
_COPY_BYTES = 128 * 2**20  # beyond every last-level cache slice of one process
_REPEATS = 5


def _measure(key: str) -> Target:
    import torch

    def product(dtype: torch.dtype) -> float:
        a, b = (torch.ones(_SIZE, _SIZE).to(dtype) for _ in range(2))
        multiply = torch._int_mm if dtype is torch.int8 else torch.mm
        return 2 * _SIZE**3 / _best(lambda: multiply(a, b))

    dtypes = {"f64": torch.float64, "f32": torch.float32, "f16": torch.float16}
    dtypes |= {"bf16": torch.bfloat16, "i8": torch.int8}
    source = torch.ones(_COPY_BYTES // 4)
    sink = torch.empty_like(source)
    with torch.no_grad():
        flops = tuple((name, product(dtype)) for name, dtype in dtypes.items())
        moved = 2 * _COPY_BYTES / _best(lambda: sink.copy_(source))
    name = f"measured on this machine: {key}"
    return Target("cpu", "cpu", flops, moved, _cache_bytes(), torch.get_num_threads(), name)


def _best(action: Callable[[], object]) -> float:
    """Shortest of a few runs in seconds, after one to warm up: the ceiling, not the average."""
    action()
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times)


def _cache_bytes() -> int:
    """The largest cache of core 0; 8 MiB where the system does not tell."""
    return max(_cache_sizes(), default=8 * 2**20)


def _cache_sizes() -> list[int]:
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    found = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text("utf-8").strip()
        if text[:-1].isdigit() and text[-1] in units:
            found.append(int(text[:-1]) * units[text[-1]])
    return found
