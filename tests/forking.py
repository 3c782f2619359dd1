"""A process that has imported the large libraries, and forks a process for every command.

Started by `tests.command` with ``python -m tests.forking``.  It reads one JSON object a line:
``argv``, ``cwd``, ``env``, and the files that take standard output and error; it answers with the
exit code.  Nothing of this project is imported before a fork, so that every command starts from
scratch but for PyTorch and transformers, whose import takes longer than the command does.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import sys
import traceback
from typing import Any, NoReturn


def main() -> None:
    """Serve until standard input ends."""
    import torch.export.pt2_archive  # noqa: F401
    import transformers.modeling_utils  # noqa: F401

    gc.freeze()  # a collection in a child would copy every page
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            _leave(_command(asked))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _command(asked: dict[str, Any]) -> int:
    """Become ``python -m attn_rewrite WORDS``; its exit code."""
    for descriptor, path in ((0, os.devnull), (1, asked["out"]), (2, asked["err"])):
        flags = os.O_RDONLY if descriptor == 0 else os.O_WRONLY
        opened = os.open(path, flags)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - what was read ahead is the server's
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["cwd"])
    sys.path[:1] = [asked["cwd"], *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    sys.argv = ["attn_rewrite", *asked["argv"]]
    try:
        runpy.run_module("attn_rewrite", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _leave(code: int) -> NoReturn:
    """End as the interpreter does, without taking the imported libraries apart."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
