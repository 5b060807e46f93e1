"""The child process's way in: the analysis, with its progress put behind the download's."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

# The products of the detector are small: several threads would only wait for each other. Read when NumPy is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from actors.analyze_video import analysis


def analyze(
    *,
    source: str,
    out_dir: str,
    share_done: float,
    share_end: float,
    report: Callable[[float, str | None], None],
    **options: Any,
) -> dict[str, Any]:
    """See analysis.analyze. `share_done` of the whole was done before, at `share_end` others go on."""

    def scaled(fraction: float, stage: str) -> None:
        report(share_done + (share_end - share_done) * fraction, stage)

    return analysis.analyze(source, out_dir, report=scaled, **options)
