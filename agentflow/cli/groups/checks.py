"""`doctor`, `prove` and `load`: is all well, does it stay so, and how quick is it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

_SECONDS = click.FloatRange(0, 3600, min_open=True)


@click.command()
@click.option("--url", help="Check the AgentFlow there by its API instead, as after a deploy.")
@click.option(
    "--watch",
    "watch_min",
    type=click.FloatRange(0.05, 1440),
    help="With --url: then watch for errors, so many minutes.",
)
def doctor(url: str | None, watch_min: float | None) -> None:
    """Check settings, servers, schema, storage, disk and clock, and say what to do about what is wrong.

    With --url: health, metrics, workers, a ping through each queue, a short video, and a read of a Kommo account where one is
    connected, of a system that runs elsewhere. ADMIN_API_KEY is its operator's key; METRICS_TOKEN, where it has one, too.
    """
    from agentflow.cli import checkup

    if url is not None:
        checkup.deployed(url, watch_min)
    elif watch_min is not None:
        raise click.UsageError("--watch goes with --url")
    else:
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


@click.command()
@click.argument("url")
@click.option("--rate", type=click.FloatRange(0.1, 1000), default=5.0, show_default=True, help="Requests a second.")
@click.option("--minutes", type=click.FloatRange(0.05, 240), default=1.0, show_default=True, help="How long.")
@click.option("--kinds", metavar="KIND=WEIGHT,…", default="ping", show_default=True, help="What is handed in.")
@click.option("--seed", type=click.IntRange(0), help="The same seed is the same load.  [default: any]")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="File for the figures, as JSON.")
@click.option("--yes", "agreed", is_flag=True, help="Yes, also where the host is not this machine.")
@click.option("--intake-p95", type=_SECONDS, help="Exit 1 if the answer takes longer, in seconds.")
@click.option("--pickup-p95", type=_SECONDS, help="The same, until a worker has the job.")
@click.option("--finish-p95", type=_SECONDS, help="The same, until it has succeeded.")
@click.option("--errors", type=click.FloatRange(0, 100), help="Exit 1 if more go wrong, in per cent.")
def load(
    url: str,
    rate: float,
    minutes: float,
    kinds: str,
    seed: int | None,
    out: Path | None,
    agreed: bool,
    intake_p95: float | None,
    pickup_p95: float | None,
    finish_p95: float | None,
    errors: float | None,
) -> int:
    """Hand work in at a steady rate at the AgentFlow at URL, and say how long it takes to be accepted, begun and ended.

    ADMIN_API_KEY is a key of it. Kinds are ping, sleeps, fails-once, parks, native, keyed, again, later, cancelled, chain.
    Exit status: 0 well, 1 an objective was missed, 2 wrong usage, 3 nobody there.
    """
    from agentflow.cli import loading

    objectives = {
        "intake_s.p95": intake_p95,
        "pickup_s.p95": pickup_p95,
        "finish_s.p95": finish_p95,
        "errors_percent": errors,
    }
    return loading.load(url, rate, minutes, kinds, seed, out, agreed, objectives=objectives)
