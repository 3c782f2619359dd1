"""Tracing that leaves no trace: state is put back, torch kept quiet, errors name the model code."""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import sysconfig
import traceback
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO, cast

import torch

_TORCH = str(Path(torch.__file__).resolve().parent)
_OWN = str(Path(__file__).resolve().parent)
_STDLIB = str(Path(sysconfig.get_path("stdlib")).resolve())


@contextlib.contextmanager
def untouched(model: torch.nn.Module) -> Iterator[None]:
    """Undo what tracing does to the model's Python state (counters, caches of fake tensors): to
    that of its modules and of the plain objects that these hold."""
    before = [(state, {k: (v, _copied(v)) for k, v in state.items()}) for state in _states(model)]
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for state, saved in before:
            for value, copy in saved.values():
                _refill(value, copy)
            state.clear()
            state.update({key: value for key, (value, _) in saved.items()})


@contextlib.contextmanager
def buffers_kept(module: torch.nn.Module) -> Iterator[None]:
    """Undo what running ``module`` writes to its buffers (running statistics, caches): a run that
    only measures is no call."""
    before = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, saved in before:
                # Not by its version: batch normalisation writes without counting it.
                if not torch.equal(buffer, saved):
                    buffer.copy_(saved)


def _states(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Attributes of the modules, then of the objects of the model's own classes in them."""
    states = {id(vars(module)): vars(module) for module in model.modules()}
    for held in [value for state in states.values() for value in state.values()]:
        file = getattr(sys.modules.get(type(held).__module__), "__file__", None) or "<built-in>"
        if (
            not isinstance(held, torch.nn.Module)
            and hasattr(held, "__dict__")
            and is_user_code(file)
        ):
            states.setdefault(id(vars(held)), vars(held))
    return list(states.values())


@contextlib.contextmanager
def masks_unread() -> Iterator[None]:
    """Let the transformer layers of ``torch.nn`` be traced with a floating mask.

    They look at the values of the mask to see whether it is the causal one, only to give kernels a
    hint; a graph cannot.  Without an answer given by the caller it is "no", which is always right:
    the mask itself is applied.
    """
    module = torch.nn.modules.transformer
    original = module._detect_is_causal_mask

    def detect(mask: Any, is_causal: bool | None = None, size: int | None = None) -> bool:
        return is_causal is True

    module._detect_is_causal_mask = detect
    try:
        yield
    finally:
        module._detect_is_causal_mask = original


@contextlib.contextmanager
def caches_emptied(model: torch.nn.Module) -> Iterator[None]:
    """Empty the function caches of the model's code that tracing filled.

    ``functools.lru_cache`` on a method or a function of a module keeps what the function made while
    it was traced, a fake tensor, and gives it to every later call of the model itself.
    """
    before = {cached: cached.cache_info().currsize for cached in _cached_functions(model)}
    try:
        yield
    finally:
        for cached, size in before.items():
            if cached.cache_info().currsize != size:
                cached.cache_clear()


def _cached_functions(model: torch.nn.Module) -> set[functools._lru_cache_wrapper[Any]]:
    """Functions with a cache in the classes of the model's modules and in the files of these."""
    classes = {cls for module in model.modules() for cls in type(module).__mro__}
    files = {sys.modules[cls.__module__] for cls in classes if cls.__module__ in sys.modules}
    spaces = [vars(space) for space in (*classes, *files)]
    return {
        value
        for space in spaces
        for value in list(space.values())
        if isinstance(value, functools._lru_cache_wrapper) and is_user_code(_file_of(value))
    }


def _file_of(function: Any) -> str:
    code = getattr(getattr(function, "__wrapped__", None), "__code__", None)
    return code.co_filename if code is not None else "<built-in>"


def _copied(value: Any) -> Any:
    """A shallow copy of a container, None for anything else."""
    return value.copy() if type(value) in (dict, OrderedDict, list, set) else None


def _refill(value: Any, copy: Any) -> None:
    if copy is None:
        return
    value.clear()
    if isinstance(value, list):
        value.extend(copy)
    else:
        value.update(copy)


class _WithoutGraphDump:
    """A stderr that drops the partial graph torch prints when an export fails."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._dropped = False

    def write(self, text: str) -> int:
        newline_after_dump = self._dropped and text == "\n"
        self._dropped = text.lstrip().startswith("def forward(")
        return len(text) if self._dropped or newline_after_dump else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep torch's own account of a failed export out: it becomes a note or one error."""
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")

    def not_warning(record: logging.LogRecord) -> bool:
        return record.levelno != logging.WARNING

    logger.addFilter(not_warning)
    try:
        with contextlib.redirect_stderr(cast(TextIO, _WithoutGraphDump(sys.stderr))):
            yield
    finally:
        logger.removeFilter(not_warning)


def user_line(error: BaseException) -> str | None:
    """``file:line, in function: `code` `` of the deepest frame in the model's own code."""
    chain: BaseException | None = error
    while chain is not None:
        for frame in reversed(traceback.extract_tb(chain.__traceback__)):
            if is_user_code(frame.filename):
                return frame_text(frame)
        chain = chain.__cause__ or chain.__context__
    return None


def frame_text(frame: traceback.FrameSummary) -> str:
    """A frame as ``file:line, in function: `code` ``."""
    code = f": `{frame.line}`" if frame.line else ""
    return f"{frame.filename}:{frame.lineno}, in {frame.name}{code}"


def is_user_code(filename: str) -> bool:
    """Whether a file is the model's code: not torch, not the standard library, not this package."""
    if filename.startswith("<"):
        return False
    resolved = str(Path(filename).resolve())
    if resolved.startswith((_TORCH, _OWN)):
        return False
    return "site-packages" in resolved or not resolved.startswith(_STDLIB)
