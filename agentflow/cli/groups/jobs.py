"""`jobs`, `queues` and `ping`: work, and where it stands."""

from __future__ import annotations

import click

from agentflow.cli.groups import options


@click.group(cls=options.Group)
def jobs() -> None:
    """Look at jobs, hand them in, cancel them, try them again."""


_STATES = ["queued", "running", "succeeded", "failed", "cancelled"]


@jobs.command("list")
@click.option("--state", type=click.Choice(_STATES))
@click.option("--type", "type_", metavar="TYPE")
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True)
@options.AS_LINES
def list_jobs(state: str | None, type_: str | None, limit: int, as_json: bool) -> None:
    """The newest jobs."""
    from agentflow.cli import job_commands

    job_commands.list_jobs(state, type_, limit, as_json)


@jobs.command("show")
@click.argument("job", metavar="ID", type=click.UUID)
@options.AS_OBJECT
def show_job(job: object, as_json: bool) -> None:
    """One job: its state, attempts, progress, result, and the jobs before and after it."""
    from agentflow.cli import job_commands

    job_commands.show(str(job), as_json)


@jobs.command("logs")
@click.argument("job", metavar="ID", type=click.UUID)
@click.option("--level", type=click.Choice(["info", "warning", "error", "critical"]), default="info", show_default=True)
@options.AS_LINES
def logs_of_job(job: object, level: str, as_json: bool) -> None:
    """What the code of a job logged, the oldest line first."""
    from agentflow.cli import job_commands

    job_commands.logs(str(job), level, as_json)


@jobs.command("cancel")
@click.argument("job", metavar="ID", type=click.UUID)
def cancel_job(job: object) -> None:
    """Cancel a queued job; stop a running one."""
    from agentflow.cli import job_commands

    job_commands.cancel(str(job))


@jobs.command("retry")
@click.argument("job", metavar="ID", type=click.UUID)
def retry_job(job: object) -> None:
    """Try a failed or cancelled job again, as a new job."""
    from agentflow.cli import job_commands

    job_commands.retry(str(job))


@jobs.command("submit")
@click.argument("type_", metavar="TYPE")
@click.argument("payload", metavar="JSON", default="{}")
@click.option("--wait", is_flag=True, help="Wait for its end; exit 1 if it fails.")
def submit_job(type_: str, payload: str, wait: bool) -> None:
    """Hand in a job, such as: agentflow jobs submit ping '{"sleep_ms": 100}'"""
    from agentflow.cli import job_commands

    job_commands.submit(type_, payload, wait)


@click.command()
@options.AS_OBJECT
def queues(as_json: bool) -> None:
    """What waits and runs, by queue, and the workers that live."""
    from agentflow.cli import job_commands

    job_commands.queues(as_json)


@click.command()
@click.option(
    "--count", type=click.IntRange(1, 10_000), default=5, show_default=True, help="How many, one after the other."
)
@click.option("--timeout", type=click.FloatRange(0.1, 3600), default=10.0, show_default=True, help="Seconds for each.")
def ping(count: int, timeout: float) -> None:
    """Send ping jobs through the whole system and say how long each took."""
    from agentflow.cli import job_commands

    job_commands.ping(count, timeout)
