"""`export_onnx`: a rewritten program as an ONNX file that was opened and compared.

The file appears under its name only when everything about it held; until then it lives in a
temporary folder beside its place, which is removed whatever happens.
"""

from __future__ import annotations

import collections
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attn_rewrite.backends.onnx.lowering import SPARSE
from attn_rewrite.backends.onnx.options import CPU, check_options, check_place
from attn_rewrite.backends.onnx.runtime import require_exporter
from attn_rewrite.errors import LowerError, PolicyError
from attn_rewrite.site import Refusal

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch.export import ExportedProgram

    from attn_rewrite.backends.onnx.artifact import OnnxArtifact
    from attn_rewrite.backends.onnx.codes import Codes
    from attn_rewrite.backends.onnx.lowering import SiteLowering


def export_onnx(
    optimized: Any,
    path: str | Path,
    *,
    target: str = "portable",
    provider: str = CPU,
    opset: int | None = None,
    verify: bool = True,
    cache: str | None = None,
    static: bool = False,
) -> OnnxArtifact:
    """Write ``optimized`` (an `OptimizedModule`, or an ``ExportedProgram``) as ONNX.

    ``portable`` uses standard operators only and runs on any conforming runtime; ``onnxruntime``
    takes operators of ``com.microsoft`` where they express a site exactly and are faster on the
    CPU, and says for every site why (`SiteLowering.choice`).  Its file for the ``provider``
    "cuda" has ``SparseAttention`` where that is exactly the site, and our own forms elsewhere:
    nothing was measured there, and nothing of the file runs there in the check
    (`OnnxArtifact.checked` says what did).  ``opset`` is 20
    unless asked otherwise (18 to 24); the IR version is 10.  Batch and lengths that are dynamic in
    the program stay dynamic under readable names.  Where a sparse site has no band of fixed width
    the lengths become those of the example (``attn_rewrite.lengths`` of the metadata says so), so
    that only the blocks its mask keeps are in the file; ``static`` asks for that at every site.

    ``cache`` ("float" or "int8") writes the later steps of a decoder instead: the file takes
    ``past_key_values.0.key`` [batch, heads, past, width] and so on (of length 0 at the first call)
    and returns ``present.0.key``.  ``optimized`` has to hold its source module then.  Behind an
    encoder those are ``past_key_values.0.decoder.key`` and ``past_key_values.0.encoder.key``: the
    encoder's are made by the first call, which is the file without ``cache`` (its outputs are
    called ``present.0.encoder.key``, where the model returns its cache), and stay as they are, in
    their own type; the file with one takes nothing else of the encoder.  An int8 cache
    is approximate: codes by scales per head and channel, measured on the example inputs; what that
    does to the other outputs is measured too (`OnnxArtifact.approximation`).

    With ``verify`` the file is opened in ONNX Runtime and compared with the program on its example
    inputs, and at another batch size and length where those are dynamic, before it gets its name.

    Raises `PolicyError` on a bad option, `LowerError` (with refusals) where a site has no ONNX
    form, `ToolError` where a package is missing or a tool fails, `VerifyError` where the numbers
    disagree; no file is left behind then.
    """
    number = check_options(target, opset, cache, static, provider)
    goal = _Goal(number, target, provider)
    place = check_place(path)
    require_exporter()
    from attn_rewrite.backends.onnx.writing import said_of_check, write

    _check_source(optimized)
    optimized = optimized if cache is None else _step_of(optimized)
    from attn_rewrite.backends.onnx.artifact import OnnxArtifact

    if static and not hasattr(optimized, "at_one_length"):
        raise PolicyError(
            f"static= needs what optimize returned, got {type(optimized).__name__}: export a "
            "program with the lengths it shall have."
        )
    made = _fitting(optimized, goal, cache, static)
    model, codes = made.model, made.codes
    sites = _masks_named(optimized, made.sites)
    sites = (*sites, *_left_alone(optimized, sites))
    _check_census(node_census(model), target)
    metadata = _metadata(optimized, target, number, [s.to_json() for s in sites])
    metadata |= _options_metadata(made, cache, static)
    checked = said_of_check(provider, sites, verify)
    if checked:
        metadata |= {"attn_rewrite.provider": provider, "attn_rewrite.checked": checked}
    model.metadata_props.update(metadata)
    draft = OnnxArtifact(
        path=place,
        opset=number,
        target=target,
        inputs=_specs(model.graph.inputs),
        outputs=_specs(model.graph.outputs),
        sites=sites,
        bytes=0,
        metadata=metadata,
        source=made.program,
        codes=codes,
        provider=provider,
        checked=checked,
    )
    return write(model, draft, verify, made.twin)


def _fitting(optimized: Any, goal: _Goal, cache: str | None, static: bool) -> _Lowered:
    """The program as ONNX, at the lengths of the example where only those leave a sparse site
    sparse; `LowerError` where nothing does."""
    made = _lowered_at(optimized, goal, cache, static)
    dense = _dense_though_sparse(optimized, made.sites)
    if dense and hasattr(optimized, "at_one_length") and cache is None and not static:
        # Which blocks to run is known once the lengths are.
        made = _lowered_at(optimized, goal, cache, True)
        dense = _dense_though_sparse(optimized, made.sites)
    _refuse_dense(dense)
    return made


def _options_metadata(made: _Lowered, cache: str | None, static: bool) -> dict[str, str]:
    """What the file says of fixed lengths and of its cache."""
    found = {}
    if made.fixed:
        why = "asked for" if static else "a mask has no band of fixed width"
        found["attn_rewrite.lengths"] = f"those of the example: {why}"
    if cache is not None:
        found["attn_rewrite.cache"] = cache
    if made.codes is not None:
        found["attn_rewrite.cache_scales"] = made.codes.to_text()
    return found


@dataclass(frozen=True)
class _Goal:
    """What a file is written for; without ``kernels`` in our own forms alone."""

    opset: int
    target: str
    provider: str
    kernels: bool = True


@dataclass(frozen=True, eq=False)
class _Lowered:
    """A program as ONNX; ``fixed`` where its lengths were made those of the example.

    ``twin`` is the same with standard operators for those that the CPU cannot run, if there are
    any.
    """

    program: ExportedProgram
    model: ir.Model
    sites: tuple[SiteLowering, ...]
    codes: Codes | None
    fixed: bool = False
    twin: ir.Model | None = None


def _lowered_at(optimized: Any, goal: _Goal, cache: str | None, fixed: bool) -> _Lowered:
    """The program lowered, its lengths ``fixed`` to those of the example or as it has them."""
    from attn_rewrite.portable import plain_program

    program = optimized.at_one_length() if fixed else getattr(optimized, "program", optimized)
    program = plain_program(program)
    made, twin = _lowered(program, goal, cache), None
    if any(s.form == SPARSE for s in made.sites):
        twin = _lowered(program, replace(goal, kernels=False), cache).model
    return replace(made, fixed=fixed, twin=twin)


def _lowered(program: ExportedProgram, goal: _Goal, cache: str | None) -> _Lowered:
    import onnx_ir.passes.common as common

    from attn_rewrite.backends.onnx import names
    from attn_rewrite.backends.onnx.coded import over_codes, with_codes
    from attn_rewrite.backends.onnx.flex import without_flex
    from attn_rewrite.backends.onnx.functions import FUNCTION_DOMAIN, gather_sites
    from attn_rewrite.backends.onnx.markers import site_cascades, site_names
    from attn_rewrite.backends.onnx.sites import Destination, expand
    from attn_rewrite.backends.onnx.strides import contiguous_attention
    from attn_rewrite.backends.onnx.translate import finish, quiet, translate

    source, number, portable = program, goal.opset, goal.target == "portable"
    with quiet():
        program = without_flex(program)
        coded = contiguous_attention(with_codes(program, portable))
        model = translate(coded, number)
        called_by = site_names(coded)
        whole = gather_sites(model, called_by, site_cascades(coded))
        # The only functions of the file are its rewritten sites.
        common.InlinePass(criteria=lambda f: f.domain != FUNCTION_DOMAIN)(model)
        codes = _quantised(model, program, number) if cache == "int8" else None
        ranges = names.axis_ranges(program)
        to = Destination(
            number, goal.target, ranges, called_by, provider=goal.provider, kernels=goal.kernels
        )
        sites = expand(model, to, whole)
        names.rename_inputs(model)
        names.rename_outputs(model, names.output_names(program))
        finish(model, number)
        if not portable:
            sites = _floats_chosen(sites, over_codes(program), goal.provider)
        called = names.axis_names(program)
        names.rename_axes(model, called)
        sites = tuple(replace(s, axis=called.get(s.axis, s.axis)) for s in sites)
    return _Lowered(source, model, sites, codes)


def _floats_chosen(
    sites: tuple[SiteLowering, ...], coded: set[str], provider: str
) -> tuple[SiteLowering, ...]:
    """``sites``, with those over codes saying that floats multiply there."""
    known = "slower on the CPU" if provider == CPU else "not measured on CUDA"
    why = f"codes times their scales multiply as floats: integer products are {known}"
    return tuple(
        replace(s, choice=f"{s.choice}; {why}".removeprefix("; ")) if s.name in coded else s
        for s in sites
    )


def _quantised(model: ir.Model, program: ExportedProgram, opset: int) -> Codes:
    """The past inputs and present outputs of ``model`` turned into codes."""
    from attn_rewrite.backends.onnx.codes import Codes, quantise_cache
    from attn_rewrite.backends.onnx.oracle import example_inputs, own_outputs

    codes = Codes.of(own_outputs(program, example_inputs(program)[0]))
    quantise_cache(model, codes, opset)
    return codes


def _step_of(optimized: Any) -> Any:
    """The later steps of a decoder; `PolicyError` where ``optimized`` is no rewritten module, and
    `LowerError` where a step cannot be as sparse as the first call."""
    if not hasattr(optimized, "with_cache"):
        raise PolicyError(
            f"cache= needs what optimize returned, got {type(optimized).__name__}: a program alone "
            "does not say how its model takes a cache."
        )
    step = optimized.with_cache()
    lost = [
        r
        for s in step.report.sites
        if s.status == "refused" and s.name in _sparse_sites(optimized)
        for r in s.refusals
    ]
    if lost:  # the steps of a sparse decoder would attend to every key
        raise LowerError(f"ONNX: {lost[0].site}: in a step with a cache {lost[0].reason}.", lost)
    return step


def _check_source(optimized: Any) -> None:
    if hasattr(optimized, "at_one_length"):  # what optimize returned; its program is made later
        return
    if not hasattr(getattr(optimized, "program", optimized), "graph_signature"):
        raise PolicyError(
            f"export_onnx takes what optimize returned, or an ExportedProgram, got a "
            f"{type(optimized).__name__}."
        )


def node_census(model: ir.Model) -> dict[str, int]:
    """Nodes by operator, nested graphs included; operators of other domains as ``domain::name``."""
    import onnx_ir as ir

    counts: collections.Counter[str] = collections.Counter()
    for owner in (model.graph, *model.functions.values()):
        for node in ir.traversal.RecursiveGraphIterator(owner):
            plain = node.domain in ("", "ai.onnx")
            counts[node.op_type if plain else f"{node.domain}::{node.op_type}"] += 1
    return dict(sorted(counts.items()))


def _dense_though_sparse(
    optimized: Any, sites: tuple[SiteLowering, ...]
) -> tuple[SiteLowering, ...]:
    """Sites that the plan makes sparse and that would leave as a dense mask, or its causal half,
    though at fixed lengths more can be left out."""
    sparse = _sparse_sites(optimized)
    wide = ("dense mask", "half")
    return tuple(s for s in sites if s.name in sparse and s.form in wide and not s.covered)


def _sparse_sites(optimized: Any) -> set[str]:
    from attn_rewrite.passes.transform import SparsePattern

    steps = getattr(getattr(optimized, "plan", None), "steps", ())
    return {s.site for s in steps if any(isinstance(t, SparsePattern) for t in s.transforms)}


def _masks_named(optimized: Any, sites: tuple[SiteLowering, ...]) -> tuple[SiteLowering, ...]:
    """``sites``, with sparse ones that the rewriting left to one dense operator called that.

    It does so where the mask leaves out next to no whole block, as at a length of one block.
    """
    sparse, whole = _sparse_sites(optimized), ("dense", "Attention", "MultiHeadAttention")
    why = "every key is read, since the mask leaves out no whole blocks at this length"
    return tuple(
        replace(s, form="dense mask", detail=f"{s.detail}: {why}")
        if s.name in sparse and (s.form in whole or (s.operator == "aten" and s.covered))
        else s
        for s in sites
    )


def _left_alone(optimized: Any, sites: tuple[SiteLowering, ...]) -> tuple[SiteLowering, ...]:
    """Attentions of the report that keep their own operators, with the reason.

    Those spelled with torch's operator are among ``sites`` whether they were rewritten or not.
    """
    from attn_rewrite.backends.onnx.lowering import SiteLowering

    anchors: Mapping[str, str] = getattr(optimized, "anchors", {})
    reports = getattr(getattr(optimized, "report", None), "sites", ())
    named = {s.name for s in sites}
    left = []
    for site in reports:
        anchor = anchors.get(site.name)
        if site.name in named or site.kernel is not None or anchor is None:
            continue
        if anchor == "scaled_dot_product_attention":
            continue
        why = "; ".join(r.reason for r in site.refusals) or "the policy keeps it"
        left.append(SiteLowering(site.name, "aten", "operators", f"left as it is: {why}"))
    return tuple(left)


def _refuse_dense(dense: tuple[SiteLowering, ...]) -> None:
    """A site that the plan makes sparse never leaves as a dense mask, or as its causal half."""
    if dense:
        reason = f"the plan makes it sparse, and here it would compute {dense[0].detail}"
        remedy = (
            "no tiles are made of probabilities that a policy maps: leave that out, or keep the "
            "site dense."
            if dense[0].operator == "aten"
            else "export with fixed lengths (static=True, or --static and --length), where the "
            "blocks to run are known, or keep the site exact."
        )
        raise LowerError(
            f"ONNX: {dense[0].name}: {reason}; {remedy}",
            [Refusal("onnx-dense-mask", s.detail, site=s.name) for s in dense],
        )


def _check_census(census: Mapping[str, int], target: str) -> None:
    own = "com.microsoft::" if target == "onnxruntime" else "attn_rewrite::"
    own_domains = (own, "attn_rewrite::")  # the second: functions whose bodies are in the file
    foreign = [name for name in census if "::" in name and not name.startswith(own_domains)]
    if foreign:
        reason = f"the graph needs {', '.join(foreign)}, which no runtime has to know"
        raise LowerError(
            f"ONNX target {target!r}: {reason}; rewrite that operator in the model.",
            [Refusal("onnx-foreign-operator", reason)],
        )


def _specs(values: Any) -> Any:
    from attn_rewrite.backends.onnx.artifact import TensorSpec

    return tuple(
        TensorSpec(
            v.name,
            str(v.dtype.numpy()) if v.dtype is not None else "unknown",
            tuple(d if isinstance(d, int) else str(d.value) for d in v.shape or ()),
        )
        for v in values
    )


def _metadata(
    optimized: Any, target: str, opset: int, sites: list[dict[str, Any]]
) -> dict[str, str]:
    """What the file says about itself, all of it text."""
    try:
        own = version("attn-rewrite")
    except PackageNotFoundError:
        own = "unknown"
    found = {
        "attn_rewrite.version": own,
        "attn_rewrite.target": target,
        "attn_rewrite.opset": str(opset),
        "attn_rewrite.sites": json.dumps(sites, sort_keys=True),
    }
    plan, report = getattr(optimized, "plan", None), getattr(optimized, "report", None)
    for key, value in (
        ("policy", getattr(plan, "policy", None)),
        ("plan_hash", getattr(plan, "hash", None) or getattr(plan, "digest", None)),
        ("report", report),
    ):
        text = _plain(value)
        if text:
            found[f"attn_rewrite.{key}"] = text
    return found


def _plain(value: Any) -> str:
    if value is None:
        return ""
    if callable(value):
        value = value()
    to_json = getattr(value, "to_json", None)
    return json.dumps(to_json(), default=str) if to_json else str(value)
