"""`doctor` and `prove`: is all well, and does it stay so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command()
def doctor() -> None:
    """Check settings, servers, schema, storage, disk and clock, and say what to do about what is wrong."""
    from agentflow.cli import checkup

    checkup.doctor()


@click.command()
@click.option("--minutes", type=click.FloatRange(0.2, 1440), help="How long the load lasts.  [default: 2; a soak: 30]")
@click.option(
    "--seed", type=click.IntRange(0), help="The same seed is the same load and the same faults.  [default: any]"
)
@click.option("--faults", metavar="A,B,…", help="Only these kinds of fault.")
@click.option("--jobs-per-minute", type=click.FloatRange(10), help="[default: 3300; a soak: 6000]")
@click.option("--url", help="Load and check the AgentFlow there by its API; nothing is killed.")
@click.option("--yes", "agreed", is_flag=True, help="With --url: yes, hand all those jobs in there.")
@click.option("--cluster", is_flag=True, help="Three RabbitMQ nodes with quorum queues; nodes are killed.")
@click.option("--redis", is_flag=True, help="Redis as the broker, although RabbitMQ is installed.")
@click.option("--soak", "soaks", is_flag=True, help="No faults: does any process grow?")
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), help="Folder for the report, journals and logs."
)
def prove(**asked: Any) -> int:
    """Show that nothing is lost: load a private copy of the whole system, hurt it, and check its history.

    Exit status: 0 all well, 1 something is wrong, 2 the run was too weak to mean anything.
    """
    from agentflow.cli import proving

    return proving.prove(**asked)
