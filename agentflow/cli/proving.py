"""`agentflow prove`: which run, what it says meanwhile, and the exit status."""

from __future__ import annotations

import secrets
import signal
import tempfile
from pathlib import Path
from typing import Any, Final

from agentflow import log, settings
from agentflow.cli import output
from agentflow.cli.errors import CANNOT_START, USAGE, Failure
from agentflow.prove import plan, rabbitmq, run, soak, staging
from agentflow.prove.plan import Options
from agentflow.prove.rabbitmq import RabbitError
from agentflow.prove.run import CannotRun

_STATUS: Final = {"ok": 0, "wrong": 1, "weak": 2}
_SOAK_PER_MINUTE: Final = 6000.0


def prove(
    minutes: float | None,
    seed: int | None,
    faults: str | None,
    jobs_per_minute: float | None,
    url: str | None,
    agreed: bool,
    cluster: bool,
    redis: bool,
    soaks: bool,
    out: Path | None,
) -> int:
    """Returns the exit status. Raises Failure."""
    with_rabbitmq = rabbitmq.installed() and not redis
    if cluster and not with_rabbitmq:
        raise Failure(f"--cluster needs RabbitMQ's package ({rabbitmq.BIN} is not there)", USAGE)
    options = Options(
        minutes=minutes or (30.0 if soaks else 2.0),
        seed=secrets.randbelow(1_000_000) if seed is None else seed,
        faults=_faults(faults, cluster=cluster, with_rabbitmq=with_rabbitmq),
        jobs_per_minute=jobs_per_minute or (_SOAK_PER_MINUTE if soaks else plan.LOAD_PER_MINUTE),
        out=(out or Path(tempfile.mkdtemp(prefix="agentflow-proof-"))).resolve(),
        worker="agentflow.cli.prove_worker",
        web="agentflow.cli.prove_web",
        cluster=cluster,
        rabbitmq=with_rabbitmq,
    )
    # What this process says itself is said below; its own connections come and go by intention.
    log.configure(settings.load({"WORKER_LOG_LEVEL": "ERROR"}), "prove")
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        if url is not None:
            return _staging(options, url, agreed)
        return _private(options, soaks=soaks, redis=redis)
    except (CannotRun, RabbitError) as error:
        raise Failure(str(error), CANNOT_START) from error
    finally:
        signal.signal(signal.SIGTERM, before)


def _private(options: Options, *, soaks: bool, redis: bool) -> int:
    tier = "a RabbitMQ cluster of three" if options.cluster else "RabbitMQ" if options.rabbitmq else "Redis tier"
    if not options.rabbitmq and not redis:
        tier += f", since RabbitMQ is not installed ({rabbitmq.BIN})"
    if soaks:
        print(
            f"Soak: {options.minutes:g} minutes at {options.jobs_per_minute / 60:g} jobs a second, {tier}", flush=True
        )
        return _end_of_soak(soak.soak(options, output.progress), options)
    print(f"Proving: {options.minutes:g} minutes with seed {options.seed}, {tier}", flush=True)
    return _end_of_run(run.prove(options, output.progress), options)


def _stop(_number: int, _frame: object) -> None:
    """As Ctrl-C: everything that was started is ended."""
    raise KeyboardInterrupt


def _faults(named: str | None, *, cluster: bool, with_rabbitmq: bool) -> tuple[str, ...]:
    known = plan.offers(rabbitmq=with_rabbitmq, cluster=cluster)
    if named is None:
        return known
    wanted = tuple(word for word in named.replace(" ", "").split(",") if word)
    for word in wanted:
        if word not in known:
            raise Failure(f"--faults: {word!r} is not one of {', '.join(known)}", USAGE)
    return wanted


def _staging(options: Options, url: str, agreed: bool) -> int:
    if not agreed:
        total = options.jobs_per_minute * options.minutes
        raise Failure(f"--url hands about {total:.0f} jobs in at {url}: say --yes if that is what you want", USAGE)
    read = settings.current()
    if read.admin_api_key is None:
        raise Failure("its key is needed: set ADMIN_API_KEY to the operator's key of that AgentFlow", USAGE)
    made = staging.prove(options, url, read.admin_api_key.get_secret_value(), output.progress)
    _print_wrong(made)
    print(f"{options.out / 'report.json'}")
    return _STATUS[made["verdict"]]


def _end_of_run(made: dict[str, Any], options: Options) -> int:
    _print_wrong(made)
    console = output.console()
    rows = [
        (kind.replace("_", " "), count, *(_seconds(made, kind, name) for name in ("recovered_s", "taken_s", "rerun_s")))
        for kind, count in made["faults"].items()
    ]
    columns = ("fault", "times", "first success", "its jobs taken", "they ran again")
    console.print(output.table(columns, rows, right=columns[1:]))
    for kind, why in made["faults_not_to_be_had"].items():
        console.print(f"not done: {kind.replace('_', ' ')} ({why})")
    for reason in made["weak"]:
        console.print(f"[yellow]too weak:[/yellow] {reason}")
    said = {
        "ok": "[green]All well.[/green]",
        "wrong": "[red]Something is wrong.[/red]",
        "weak": "Nothing wrong was seen.",
    }
    console.print(f"\n{said[made['verdict']]} {options.out / 'report.html'}", soft_wrap=True)
    return _STATUS[made["verdict"]]


def _print_wrong(made: dict[str, Any]) -> None:
    output.end_progress()
    console = output.console()
    finished = ", ".join(f"{count} {state}" for state, count in made["finished"].items())
    console.print(f"{made['accepted']} jobs accepted, {made['jobs_per_minute']} a minute; {finished}")
    console.print(output.table(("what must not be", "count"), list(made["wrong"].items()), right=("count",)))
    for rule, found in made["violations"].items():
        console.print(f"[red]{rule}: {found['count']}[/red], such as {found['examples'][0]}", soft_wrap=True)


def _seconds(made: dict[str, Any], kind: str, name: str) -> str | None:
    value = made["slowest_recovery_s"].get(kind, {}).get(name)
    return None if value is None else f"{value:.2f} s"


def _end_of_soak(made: dict[str, Any], options: Options) -> int:
    output.end_progress()
    console = output.console()
    console.print(f"{made['accepted']} jobs accepted, {made['jobs_per_s']} a second finished")
    columns = ("process", "MB", "MB per hour", "descriptors", "more")
    rows = [
        (name, p["mb_last"], f"{p['mb_per_h']:+.2f}", p["descriptors_last"], f"{p['descriptors_more']:+d}")
        for name, p in made["processes"].items()
    ]
    console.print(output.table(columns, rows, right=columns[1:]))
    for line in (*made["grows"], *made["weak"]):
        console.print(f"[yellow]{line}[/yellow]")
    console.print(f"{options.out / 'soak.html'}", soft_wrap=True)
    return _STATUS[made["verdict"]]
