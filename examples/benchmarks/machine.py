"""What results files say of the machine."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def hardware() -> str:
    """Architecture, cores and, where the kernel says it, the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (x.partition(":")[2].strip() for x in lines if x.startswith("model name"))
    return f"{platform.machine()}, {os.cpu_count()} cores, {next(names, 'processor unknown')}"
