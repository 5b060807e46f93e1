"""How far a command is that moves many bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


@contextmanager
def of_bytes(said: Console) -> Iterator[Callable[[str, int, int], None]]:
    """`show(step, done, total)`: a bar for each step with bytes, rate and time left on a terminal, a line for each elsewhere."""
    if not said.is_terminal:
        told: set[str] = set()

        def tell(step: str, done: int, total: int) -> None:
            if step not in told:
                told.add(step)
                said.print(f"  {step} …")

        yield tell
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=said, transient=True) as progress:
        bars = {}

        def draw(step: str, done: int, total: int) -> None:
            if step not in bars:
                bars[step] = progress.add_task(step, total=total)
            progress.update(bars[step], completed=done, total=total)

        yield draw
