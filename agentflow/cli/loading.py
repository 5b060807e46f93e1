"""`agentflow load`: how quickly the AgentFlow at a URL takes, picks up and ends work that comes at a given rate."""

from __future__ import annotations

import ipaddress
import json
import secrets
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from rich.markup import escape

from agentflow import settings
from agentflow.cli import output
from agentflow.cli.errors import CANNOT_START, USAGE, WRONG, Failure
from agentflow.prove import measuring
from agentflow.prove.measuring import Objective, Plan
from agentflow.prove.run import CannotRun

#: A million rows are some gigabytes over there; whoever wants more has several runs.
_MOST_JOBS: Final = 1_000_000


def load(
    url: str,
    rate: float,
    minutes: float,
    kinds: str,
    seed: int | None,
    out: Path | None,
    agreed: bool,
    *,
    objectives: dict[str, float | None],
) -> int:
    """Returns the exit status. Raises Failure. `objectives`: figures and the most that each may be."""
    host = _host(url)
    if rate * minutes * 60 > _MOST_JOBS:
        raise Failure(f"that is {rate * minutes * 60:.0f} jobs, and {_MOST_JOBS} are the most of one run", USAGE)
    if not agreed and not _is_loopback(host):
        raise Failure(
            f"this hands about {rate * minutes * 60:.0f} jobs in at {host}: say --yes if that is what you want", USAGE
        )
    try:
        mix = measuring.read_mix(kinds)
    except ValueError as error:
        raise Failure(f"--kinds: {error}", USAGE) from None
    if out is not None and not out.parent.is_dir():
        raise Failure(f"--out: there is no folder {out.parent}", USAGE)
    read = settings.current()
    if read.admin_api_key is None:
        raise Failure("a key is needed: set ADMIN_API_KEY to the operator's key of that AgentFlow", USAGE)
    plan = Plan(rate, minutes, mix, secrets.randbelow(1_000_000) if seed is None else seed)
    wanted = [Objective(figure, most) for figure, most in objectives.items() if most is not None]
    try:
        made = measuring.measure(plan, url, read.admin_api_key.get_secret_value(), wanted, output.progress)
    except CannotRun as error:
        raise Failure(str(error), CANNOT_START) from error
    finally:
        output.end_progress()
    if out is not None:
        out.write_text(json.dumps(made, indent=2) + "\n")
    _print(made)
    return WRONG if made["missed"] else 0


def _host(url: str) -> str:
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError:
        host = None
    if not host or parts.scheme not in ("http", "https"):
        raise Failure(f"{url!r} is not the URL of an AgentFlow, such as http://127.0.0.1:8000", USAGE)
    return host


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _print(made: dict[str, Any]) -> None:
    console = output.console()
    ends = ", ".join(f"{count} {state}" for state, count in made["ended"].items() if count)
    console.print(f"{made['accepted']} of {made['sent']} requests accepted; {ends or 'none ended'}")
    rows = [
        (name, *("–" if made[figure][share] is None else f"{made[figure][share]:.3f} s" for share in made[figure]))
        for name, figure in (("intake", "intake_s"), ("picked up", "pickup_s"), ("finished", "finish_s"))
    ]
    columns = ("from handing in", *made["intake_s"])
    console.print(output.table(columns, rows, right=columns[1:]))
    for what, count in made["no_answer"].items():
        console.print(f"{count} times no answer ({what}), and sent again")
    for sentence in (*made["refused"], *made["missed"]):
        console.print(f"[red]{escape(sentence)}[/red]", soft_wrap=True)
