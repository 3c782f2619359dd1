"""Lanes: threads that each run their operators single-threaded, side by side.

A tile is small, so splitting each of its operators over all cores spends much of its time waiting
at the end of every one.  Running whole tiles side by side waits once.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Task = TypeVar("Task")

_pools: dict[int, ThreadPoolExecutor] = {}
_making = threading.Lock()


def _forget() -> None:
    """Threads do not survive a fork; the child makes its own."""
    global _making
    _pools.clear()
    _making = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def run_in_lanes(
    tasks: Iterable[Task], make: Callable[[], Callable[[Task], None]], lanes: int
) -> None:
    """Run every task once, in any order, on ``lanes`` threads.

    Each lane calls ``make`` for its own function, so that lanes share no memory.  The first
    exception is raised again here, when all lanes have stopped.
    """
    waiting, taking = iter(tasks), threading.Lock()

    def lane() -> None:
        with torch.no_grad():
            function = make()
            while True:
                with taking:
                    task = next(waiting, None)
                if task is None:
                    return
                function(task)

    running = [_pool(lanes).submit(lane) for _ in range(lanes)]
    errors = [f.exception() for f in running]
    for error in errors:
        if error is not None:
            raise error


def _pool(lanes: int) -> ThreadPoolExecutor:
    """Threads that compute single-threaded, made at first use."""
    with _making:
        if lanes not in _pools:
            threads = torch.get_num_threads()
            ready = threading.Barrier(lanes + 1)
            pool = ThreadPoolExecutor(lanes, "attn-rewrite-lane")
            for _ in range(lanes):
                pool.submit(_become_single_threaded, ready)
            ready.wait()
            # The setting is per thread, but threads that start later copy the last one made.
            torch.set_num_threads(threads)
            _pools[lanes] = pool
        return _pools[lanes]


def _become_single_threaded(ready: threading.Barrier) -> None:
    # Asked first, as the first question in a thread resets the answer.
    torch.get_num_threads()
    torch.set_num_threads(1)
    ready.wait()
