"""`OptimizedModule`: a rewritten model that is used like the one it came from."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from attn_rewrite.errors import AttnRewriteError
from attn_rewrite.gates import carry_gates

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from attn_rewrite.calls import CallForm
    from attn_rewrite.packed_decoder import PackedDecoder
    from attn_rewrite.plan import Plan
    from attn_rewrite.report import Report
    from attn_rewrite.site import Site

_GUARD = "Guard failed:"
Rebuild = Callable[..., Any]  # of a source module; cached=, packed= for its later steps


class OptimizedModule(nn.Module):
    """A rewritten model: same call signature, parameters, buffers and ``state_dict`` keys.

    ``report``, ``plan`` and ``sites`` say what was done.  Parameters are shared with the source
    module while it is held; unknown attributes come from it.  Moving to another device or dtype
    captures and rewrites the source again, because an exported graph has devices and casts baked
    in.
    """

    plan: Plan
    report: Report
    sites: tuple[Site, ...]

    def __init__(
        self,
        graph: fx.GraphModule,
        *,
        plan: Plan,
        report: Report,
        sites: tuple[Site, ...] = (),
        source: nn.Module | None = None,
        rebuild: Rebuild | None = None,
        program: Callable[..., ExportedProgram] | None = None,
        form: CallForm | None = None,
    ) -> None:
        super().__init__()
        self._adopt(graph)
        self._say(plan, report, sites)
        self._hold("_source", source)
        self._hold("_rebuild", rebuild)
        self._hold("_make_program", program)
        self._hold("_program", None)
        self._hold("_folder", None)
        self._hold("_anchors", {})
        self._hold_form(form)
        self.training = graph.training if source is None else source.training

    @classmethod
    def from_program(
        cls,
        program: ExportedProgram,
        *,
        plan: Plan,
        report: Report,
        form: CallForm | None = None,
        folder: Path | None = None,
        anchors: Mapping[str, str] | None = None,
    ) -> OptimizedModule:
        """A module that runs a saved, already rewritten program; it has no source module.

        ``folder`` is where it was read from: the model's configuration lies there.  ``anchors`` are
        the operators that its attention was found at, by site.
        """
        module = cls(program.module(), plan=plan, report=report, form=form)
        module._hold("_program", program)
        module._hold("_folder", folder)
        module._hold("_anchors", dict(anchors or {}))
        return module

    def _hold(self, name: str, value: Any) -> None:
        """Keep a reference that is not part of the module tree."""
        object.__setattr__(self, name, value)

    def _say(self, plan: Plan, report: Report, sites: tuple[Site, ...]) -> None:
        """What was done: held beside the module tree, where a model may have the same names."""
        self._hold("plan", plan)
        self._hold("report", report)
        self._hold("sites", sites)

    def replace_report(self, report: Report) -> None:
        """Take another report, from one who knows more of the inputs than `optimize` does."""
        self._hold("report", report)

    def _hold_form(self, form: CallForm | None) -> None:
        """Take calls in ``form``; without one, as the graph was captured."""
        self._hold("_form", form)
        if form is not None:
            self.__class__ = _with_signature(form.signature)

    def _adopt(self, graph: fx.GraphModule) -> None:
        """Run ``graph`` from now on; its parameters, buffers and children become this module's."""
        self._hold("_graph", graph)
        for table in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self._hold(table, getattr(graph, table))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the rewritten model."""
        if self._form is not None:
            args, kwargs = self._form.bind(args, kwargs)
        try:
            return self._graph(*args, **kwargs)
        except AssertionError as error:  # what torch's guards on an exported graph raise
            if not str(error).startswith(_GUARD):
                raise
            needed = str(error).removeprefix(_GUARD).strip()
            raise AttnRewriteError(
                f"the inputs do not fit the captured graph, which needs {needed}; optimize the "
                "model with example inputs and dynamic_shapes= of the sizes you run"
            ) from error

    def with_cache(self) -> OptimizedModule:
        """The same rewriting of a decoder's later steps: its forward takes ``past_key_values`` and
        returns the present ones.

        Captured again, with a past that the source module computes from the first half of the
        example; behind an encoder with the encoder's keys and values in that past.  Raises
        `PolicyError` where the model has no such forward.
        """
        if self._source is None or self._rebuild is None:
            raise AttnRewriteError(
                "a cache needs the source module, which is not held here: optimize the original"
            )
        later: OptimizedModule = self._rebuild(self._source, cached=True, made=self.plan)
        carry_gates(self, later)
        return later

    def with_packed_cache(self) -> PackedDecoder:
        """A decoder that goes on from what it has read, its keys and values stored in the few bits
        that a policy of ``kv_int8``, ``kv_int4`` or ``kv_int2`` names.

        Runs on torch operators.  Raises `PolicyError` with the reason where the policy names
        something else, or the attention of a later step is more than causal.
        """
        if self._source is None or self._rebuild is None:
            raise AttnRewriteError(
                "a packed cache needs the source module, which is not held here: optimize the "
                "original"
            )
        return self._rebuild(self._source, packed=True)  # type: ignore[no-any-return]

    @property
    def form(self) -> CallForm | None:
        """How the original model is called, where its signature names every argument."""
        return self._form  # type: ignore[no-any-return]

    @property
    def anchors(self) -> Mapping[str, str]:
        """The operators that attention was found at, by site; of a saved result as well, which
        holds no ``sites``."""
        from attn_rewrite.graph import op_name

        return self._anchors or {s.name: op_name(s.anchor) for s in self.sites}

    @property
    def graph_module(self) -> fx.GraphModule:
        """The rewritten host graph."""
        return self._graph  # type: ignore[no-any-return]

    @property
    def program(self) -> ExportedProgram:
        """The rewritten model as an exported program, for saving and for export."""
        if self._program is None:
            if self._make_program is None:
                raise AttnRewriteError("this module holds no program: it was captured just in time")
            self._hold("_program", self._make_program(self._graph))
        return self._program  # type: ignore[no-any-return]

    def at_one_length(self) -> ExportedProgram:
        """The rewritten model as a program whose lengths are those of the example, its batch as
        dynamic as before: what depends on the lengths can be computed when it is exported."""
        if self._make_program is not None:
            return self._make_program(self._graph, lengths=False)  # type: ignore[no-any-return]
        from attn_rewrite.reexport import export_again

        return export_again(self._graph, self.program, lengths=False)

    def _apply(
        self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> OptimizedModule:
        probe = next(
            (t for t in (*self.parameters(), *self.buffers()) if t.is_floating_point()), None
        )
        if probe is None:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            return self
        with torch.no_grad():
            moved = fn(probe.detach().flatten()[:1])
        if moved.dtype == probe.dtype and moved.device == probe.device:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            return self
        if self._source is None or self._rebuild is None:
            raise AttnRewriteError(
                f"a saved program is fixed to {probe.dtype} on {probe.device} and its source "
                f"module is not held: optimize the original in {moved.dtype} on {moved.device}"
            )
        self._source._apply(fn, recurse)
        again: OptimizedModule = self._rebuild(self._source)
        carry_gates(self, again)
        self._become(again)
        return self

    def _become(self, other: OptimizedModule) -> None:
        self._adopt(other._graph)
        self._say(other.plan, other.report, other.sites)
        for name in ("_make_program", "_program"):
            self._hold(name, getattr(other, name))
        self._hold_form(other._form)

    def train(self, mode: bool = True) -> OptimizedModule:
        """Keep the mode the model was captured in; another one needs the just-in-time path."""
        if mode != self.training:
            was, asked = ("training", "evaluation") if self.training else ("evaluation", "training")
            raise AttnRewriteError(
                f"the graph was captured in {was} mode, and {asked} mode was asked for: use "
                "torch.compile(model, backend='attn_rewrite', options=...), which follows the mode"
            )
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            source = self.__dict__.get("_source")
            if name.startswith("__") or "_folder" not in self.__dict__:
                raise
            if source is not None:
                return self._from_source(source, name)
            return self._of_program(name)

    def _of_program(self, name: str) -> Any:
        """What libraries ask of a model, where only its saved program is held."""
        if name in ("device", "dtype"):
            floating = (t for t in (*self.parameters(), *self.buffers()) if t.is_floating_point())
            if (tensor := next(floating, None)) is not None:
                return getattr(tensor, name)
        if name == "config" and self._folder is not None:
            from attn_rewrite.checkpoints.huggingface import read_config

            config = read_config(self._folder)
            self._hold("config", config)
            return config
        raise AttributeError(
            f"{name!r} is not saved with a program; it belongs to the original model"
        )

    def _from_source(self, source: nn.Module, name: str) -> Any:
        """An attribute of the source; its methods see a twin whose forward is the rewritten one."""
        value = getattr(source, name)
        if getattr(value, "__self__", None) is not source:
            return value
        twin = copy.copy(source)
        twin.__dict__["forward"] = self.forward
        return getattr(twin, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> OptimizedModule:
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        nn.Module.__init__(new)
        source = copy.deepcopy(self._source, memo)  # parameters first: the graph shares them
        new._hold("_source", source)
        for name in ("_rebuild", "_make_program", "_form", "_folder", "_anchors"):
            new._hold(name, getattr(self, name))
        new._hold("_program", None if self._make_program else self._program)
        new._say(self.plan, self.report, self.sites)
        new._adopt(copy.deepcopy(self._graph, memo))
        new.training = self.training
        return new

    def load_state_dict(
        self, state: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load weights into the parameters shared with the source module."""
        if assign:
            raise AttnRewriteError(
                "assign=True would separate the graph from its parameters: use assign=False"
            )
        return super().load_state_dict(state, strict=strict)

    def extra_repr(self) -> str:
        """Policy and number of rewritten sites."""
        return f"sites={len(self.sites)}"


def _with_signature(signature: inspect.Signature) -> type[OptimizedModule]:
    """`OptimizedModule` with the signature of the original's forward, which libraries inspect.

    `inspect.signature` reads it from the function, and a function belongs to a class.
    """

    def forward(self: OptimizedModule, *args: Any, **kwargs: Any) -> Any:
        return OptimizedModule.forward(self, *args, **kwargs)

    receiver = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    parameters = (receiver, *signature.parameters.values())
    forward.__doc__ = OptimizedModule.forward.__doc__
    forward.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return type(OptimizedModule.__name__, (OptimizedModule,), {"forward": forward})
