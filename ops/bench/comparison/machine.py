"""What was measured on, keeping what was measured, and an end that leaves nothing behind."""

from __future__ import annotations

import json
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

_FLUSHES: Final = 100
_PAGE: Final = bytes(8192)


def machine() -> dict[str, Any]:
    return {
        "processor": f"{platform.machine()}, {os.cpu_count()} cores",
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "load_at_start": round(os.getloadavg()[0], 1),
        "flush_ms": round(flush_ms(), 2),
        "at": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def flush_ms() -> float:
    """What a page takes to the disk of temporary files (fdatasync, median): a commit takes no less."""
    took = []
    with tempfile.TemporaryFile(buffering=0) as file:
        for _ in range(_FLUSHES):
            file.write(_PAGE)
            began = time.perf_counter()
            os.fdatasync(file.fileno())
            took.append(1000 * (time.perf_counter() - began))
    return statistics.median(took)


def end_when_told() -> None:
    """SIGTERM ends the servers, workers and hosts that were started, too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def said_of(figures: dict[str, Any]) -> str:
    """The line below a report's title."""
    where, versions = figures["machine"], figures["versions"]
    said = ", ".join([f"Python {where['python']}", *(f"{name} {version}" for name, version in versions.items())])
    return f"{where['processor']}, {said}; {where['at']}. Medians; in brackets least, most and how many rounds."


def keep(figures: dict[str, Any], out: Path) -> None:
    """Whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    new = out.with_suffix(".new")
    new.write_text(json.dumps(figures, indent=1) + "\n")
    new.replace(out)
