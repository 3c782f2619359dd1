"""A folder with the kernels of a rewritten model: source, binaries, metadata and a loader."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attn_rewrite.backends.triton import loader
from attn_rewrite.backends.triton.aot import LIMITS, Binary, compile_source, fits, parse_target
from attn_rewrite.backends.triton.choose import unlisted
from attn_rewrite.backends.triton.emit import Source, emit
from attn_rewrite.backends.triton.lower import TritonKernel, lower
from attn_rewrite.backends.triton.quantise_aot import CodeWriter
from attn_rewrite.backends.triton.schedule import Schedule
from attn_rewrite.backends.triton.site_tables import missing_extents, site_tables
from attn_rewrite.backends.triton.staged import Staged, split
from attn_rewrite.cascade.reordered import Reordered, as_reordered
from attn_rewrite.errors import LowerError, ToolError
from attn_rewrite.site import Refusal, Site
from attn_rewrite.tables import Table

if TYPE_CHECKING:
    from attn_rewrite.optimized import OptimizedModule


@dataclass(frozen=True)
class TritonArtifact:
    """What was written: kernels by site, and why other sites have none.

    ``codes`` are the kernels that make what those of a quantised site read (`quantise_aot`), to
    launch before them; ``tables`` names the file of what the kernels of a site read besides its
    operands; ``notes`` says what holds of one site only.
    """

    target: str
    folder: str
    kernels: tuple[dict[str, Any], ...]
    sites: dict[str, tuple[str, ...]]
    refusals: tuple[Refusal, ...]
    tables: dict[str, str]
    notes: dict[str, str]
    codes: dict[str, tuple[str, ...]]

    def to_json(self) -> dict[str, Any]:
        """Plain values, as in ``kernels.json``."""
        return {
            "target": self.target,
            "kernels": list(self.kernels),
            "sites": {n: list(k) for n, k in self.sites.items()},
            "codes": {n: list(k) for n, k in self.codes.items()},
            "tables": self.tables,
            "notes": self.notes,
            "refusals": [r.to_json() for r in self.refusals],
        }


def export_triton(optimized: OptimizedModule, folder: str | Path, *, target: str) -> TritonArtifact:
    """Compile the kernels of every rewritten site of ``optimized`` for ``target`` into ``folder``.

    ``target`` is ``cuda:80``, ``cuda:90``, ``cuda:100`` or ``hip:gfx942``; no GPU is needed.  Sites
    with the same kernel share it.  Lists of tiles, tables of the plan and the order of tokens are
    written for each site (`site_tables`); where a length is dynamic there is no list, and more
    tiles run (`TritonArtifact.notes` says so).  A kernel whose default schedule spills registers,
    or takes more shared memory than a processor has, is compiled with smaller tiles; `ToolError`
    where none fits, `PolicyError` for an unknown target, `LowerError` where no site has a kernel.
    """
    device = parse_target(target)
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    written: dict[tuple[str, str], tuple[Source, dict[str, Any]]] = {}
    sites: dict[str, tuple[str, ...]] = {}
    tables: dict[str, str] = {}
    notes: dict[str, str] = {}
    codes: dict[str, tuple[str, ...]] = {}
    writer = CodeWriter(path, target)
    refusals: list[Refusal] = []
    for site in optimized.sites:
        found = _lowered(optimized, site, device)
        if isinstance(found, Refusal):
            refusals.append(found)
            continue
        kernels = []
        for source in found.kernel.sources:
            source, note = _without_lists(source, site)
            notes |= {site.name: note} if note else {}
            key = (source.text, _types(source, site))
            if key not in written:
                written[key] = _write(path, source, site, target)
            kernels.append(written[key])
        sites[site.name] = tuple(entry["name"] for _, entry in kernels)
        if found.stages is not None:
            codes[site.name], note = writer.write(site, found.stages)
            if note:
                notes[site.name] = "; ".join(n for n in (notes.get(site.name), note) if n)
        made = site_tables(tuple(s for s, _ in kernels), site, found.tables, found.reordered)
        if made.arrays:
            tables[site.name] = f"tables-{len(tables)}.safetensors"
            made.write(path / tables[site.name])
    if not sites:
        raise LowerError(
            f"no site has a Triton kernel for {target}: "
            + "; ".join(r.reason for r in refusals[:3]), refusals,
        )  # fmt: skip
    artifact = TritonArtifact(
        target, path.name, (*(entry for _, entry in written.values()), *writer.entries.values()),
        sites, tuple(refusals), tables, notes, codes,
    )  # fmt: skip
    (path / "kernels.json").write_text(json.dumps(artifact.to_json(), indent=1) + "\n", "utf-8")
    shutil.copyfile(loader.__file__, path / "load.py")
    return artifact


def _without_lists(source: Source, site: Site) -> tuple[Source, str]:
    """The kernel that runs every tile where no list can be made now, and why that is."""
    if source.schedule.skipping != "lists":
        return source, ""
    missing = missing_extents(source.program, site)
    if not missing:
        return source, ""
    skipping = unlisted(source.program, source.schedule)
    lanes = {r: int(site.extents()[r]) for r in source.program.roles.lanes}
    runs = "every tile runs" if skipping == "none" else "tiles within the bounds of its mask run"
    note = f"no list of tiles, as the extents of {', '.join(missing)} are dynamic: {runs}"
    schedule = source.schedule.with_(skipping=skipping)
    return emit(source.program, schedule, lanes, name=source.name), note


@dataclass(frozen=True, eq=False)
class _Lowered:
    """The kernels of a site, the tables of its plan, and the order of its tokens."""

    kernel: TritonKernel
    tables: Mapping[str, Table]
    reordered: Reordered | None
    stages: Staged | None


def _lowered(optimized: OptimizedModule, site: Site, device: Any) -> _Lowered | Refusal:
    """The kernel of a site as it was rewritten."""
    from attn_rewrite.plan import rewritten

    steps = optimized.plan.of(site.name)
    if not steps or all(s.keeps for s in steps):
        return Refusal("kept", f"{site.name} was left as it is", site=site.name)
    cascade = rewritten(site, *steps)
    if isinstance(cascade, Refusal):
        return cascade
    extents = {n: v if isinstance(v, int) else None for n, v in site.extents().items()}
    missing = [r for r in ("d", "f") if extents.get(r) is None]
    if missing:
        return Refusal(
            "dynamic-head", f"the head dimension {missing[0]} is dynamic", site=site.name
        )
    tables = optimized.plan.tables_of(site, cascade)
    if isinstance(tables, Refusal):
        return tables
    reordered = as_reordered(cascade)
    fixed = all(isinstance(extents[r], int) for r in ("h", "hkv", "q", "kv"))
    if reordered is not None and not fixed:
        reason = "the tokens are reordered, and a length is dynamic"
        return Refusal("dynamic-order", reason, site=site.name)
    size = site.inputs["Q"].node.meta["val"].element_size()
    inner = cascade if reordered is None else reordered.inner
    kernel = lower(inner, dropout=site.dropout, extents=extents, device=device, item_bytes=size)
    if isinstance(kernel, Refusal):
        return kernel
    return _Lowered(kernel, tables, reordered, split(inner))


def _types(source: Source, site: Site) -> str:
    """The operand type and head dimensions, as text: with the source they make the binary."""
    dtype = str(site.inputs["Q"].node.meta["val"].dtype).removeprefix("torch.")
    extents = site.extents()
    lanes = [f"{r}{int(extents[r])}" for r in source.program.roles.lanes]
    return "-".join([dtype, *lanes])


def _write(path: Path, source: Source, site: Site, target: str) -> tuple[Source, dict[str, Any]]:
    """Write a kernel with the first schedule that fits; the kernel, and its line in the index."""
    dtype = str(site.inputs["Q"].node.meta["val"].dtype).removeprefix("torch.")
    extents = site.extents()
    lanes = {r: int(extents[r]) for r in source.program.roles.lanes}
    fitted, binary = fit(source, target, dtype, lanes, _dtypes(site))
    name = f"{fitted.name}-{_types(source, site)}-{fitted.key}"
    (path / f"{name}.py").write_text(fitted.text, "utf-8")
    for kind, content in binary.files.items():
        (path / f"{name}.{kind}").write_bytes(content)
    metadata = {"kernel": name, "dtype": dtype, "lanes": lanes, **binary.metadata}
    (path / f"{name}.json").write_text(json.dumps(metadata, indent=1) + "\n", "utf-8")
    entry = {"name": name, "dtype": dtype, "lanes": lanes, "resources": asdict(binary.resources)}
    return fitted, entry


def _dtypes(site: Site) -> dict[str, str]:
    """The types of the operands as the model has them."""
    found = {n: o.node.meta["val"].dtype for n, o in site.inputs.items()}
    return {n: str(t).removeprefix("torch.") for n, t in found.items()}


def fit(
    source: Source,
    target: str,
    dtype: str,
    lanes: dict[str, int],
    dtypes: Mapping[str, str] | None = None,
) -> tuple[Source, Binary]:
    """The kernel with the first schedule, from the given one down, that a processor can hold.

    `ToolError` where every one of them spills or takes too much shared memory.
    """
    tried = []
    for schedule in smaller(source.schedule):
        candidate = source
        if schedule != source.schedule:
            candidate = emit(source.program, schedule, lanes, name=source.name)
        binary = compile_source(candidate, target, dtype, lanes, {"dropout": 0.0}, dtypes)
        if fits(binary.resources, LIMITS[target]):
            return candidate, binary
        tried.append(f"{schedule.block_rows}x{schedule.block_along}: "
                     f"{binary.resources.spilled} bytes spilled, "
                     f"{binary.resources.shared} bytes of shared memory")  # fmt: skip
    raise ToolError(
        f"no schedule of {source.name} fits {target} with {dtype} and head dimensions {lanes} "
        f"({'; '.join(tried)})", stage="triton resources",
    )  # fmt: skip


def smaller(schedule: Schedule) -> Iterator[Schedule]:
    """The schedule, then ones that need fewer registers and less shared memory."""
    yield schedule
    rows, along = schedule.block_rows, schedule.block_along
    if rows == 128 and schedule.warps == 4:
        yield schedule.with_(warps=8)
    for r, a in ((64, 64), (64, 32), (32, 32), (32, 16), (16, 16)):
        whole = schedule.skipping != "lists" or r % schedule.pack == 0
        if schedule.widen and a < 32:
            continue  # products of 8 bits have no fewer terms
        if whole and r * a < rows * along and r <= rows and a <= along:
            yield schedule.with_(block_rows=r, block_along=a, warps=4, stages=1)
