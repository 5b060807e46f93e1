"""The commands. Only click is imported here, so that `agentflow --help` answers at once."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

import click

import agentflow
from agentflow.cli import errors

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def main(arguments: list[str] | None = None) -> NoReturn:
    """The console script. Ends the process: 0 well, 1 what was asked for failed, 2 wrong usage or settings, 3 no servers."""
    sys.exit(run(arguments))


def run(arguments: list[str] | None = None) -> int:
    try:
        status = cli(arguments, prog_name="agentflow", standalone_mode=False)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "agentflow"
        return _say(f"{errors.one_line(error.format_message())} (`{path} --help` shows how)", errors.USAGE)
    except click.ClickException as error:
        return _say(errors.one_line(error.format_message()), errors.WRONG)
    except (click.Abort, KeyboardInterrupt):
        return 130
    except BrokenPipeError:  # `agentflow jobs list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:  # what is foreseen becomes one line; the rest keeps its traceback
        failure = errors.explained(error)
        if failure is None:
            raise
        return _say(str(failure), failure.status)


def _say(message: str, status: int) -> int:
    print(f"agentflow: {message}", file=sys.stderr)
    return status


class _Group(click.Group):
    """Called without a command, it shows its help."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args or ["--help"])


@click.group(cls=_Group, context_settings=_CONTEXT)
@click.version_option(agentflow.__version__, message="agentflow %(version)s")
def cli() -> None:
    """Background jobs that cannot get lost: start AgentFlow, hand work in, look at it.

    Settings come from the environment (see README). Without any, everything runs on this machine in AGENTFLOW_HOME.
    """


@cli.command()
@click.option("--host", help="Address to listen at.  [default: 127.0.0.1; with PORT set, all addresses]")
@click.option("--port", type=click.IntRange(0, 65535), help="Port; 0 takes a free one.  [default: PORT, or 8000]")
@click.option("--announce", type=int, hidden=True, help="Descriptor of a socket: gets the URL; its end is ours.")
def up(host: str | None, port: int | None, announce: int | None) -> None:
    """Run everything in one process: web, worker threads and schedule.

    Postgres and Valkey are started too, unless DATABASE_URL and REDIS_URL name others. Ctrl-C or SIGTERM stops: running
    jobs get SHUTDOWN_GRACE seconds, then they are handed back; a second signal ends at once.
    """
    from agentflow.cli import serve

    serve.up(host, port, announce)


@cli.command()
@click.argument("video", metavar="FILE|URL")
@click.option("--url", "base", envvar="AGENTFLOW_URL", help="A running AgentFlow (its key: ADMIN_API_KEY).")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the pictures.  [default: ./agentflow-NAME]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON; pictures are fetched only with --out.")
def analyze(video: str, base: str | None, out: Path | None, as_json: bool) -> None:
    """Find a video's shots, with a picture of each and a contact sheet.

    Uses the AgentFlow at --url, or the one that runs on this machine's home, or starts one for as long as it takes.
    """
    from agentflow.cli import video as videos

    videos.analyze(video, base, out, as_json)


@cli.group(cls=_Group)
def jobs() -> None:
    """Look at jobs, hand them in, cancel them, try them again."""


_STATES = ["queued", "running", "succeeded", "failed", "cancelled"]


@jobs.command("list")
@click.option("--state", type=click.Choice(_STATES))
@click.option("--type", "type_", metavar="TYPE")
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
def list_jobs(state: str | None, type_: str | None, limit: int, as_json: bool) -> None:
    """The newest jobs."""
    from agentflow.cli import job_commands

    job_commands.list_jobs(state, type_, limit, as_json)


@jobs.command("show")
@click.argument("job", metavar="ID", type=click.UUID)
@click.option("--json", "as_json", is_flag=True, help="As one JSON object.")
def show_job(job: object, as_json: bool) -> None:
    """One job: its state, attempts, progress, result, and the jobs before and after it."""
    from agentflow.cli import job_commands

    job_commands.show(str(job), as_json)


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


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="As one JSON object.")
def queues(as_json: bool) -> None:
    """What waits and runs, by queue, and the workers that live."""
    from agentflow.cli import job_commands

    job_commands.queues(as_json)


@cli.command()
@click.option(
    "--count", type=click.IntRange(1, 10_000), default=5, show_default=True, help="How many, one after the other."
)
@click.option("--timeout", type=click.FloatRange(0.1, 3600), default=10.0, show_default=True, help="Seconds for each.")
def ping(count: int, timeout: float) -> None:
    """Send ping jobs through the whole system and say how long each took."""
    from agentflow.cli import job_commands

    job_commands.ping(count, timeout)


@cli.command()
def doctor() -> None:
    """Check settings, servers, schema, storage, disk and clock, and say what to do about what is wrong."""
    from agentflow.cli import checkup

    checkup.doctor()


@cli.command()
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
    """Show that nothing is lost: load a private copy of the whole system, hurt it, and check its history.

    Exit status: 0 all well, 1 something is wrong, 2 the run was too weak to mean anything.
    """
    from agentflow.cli import proving

    return proving.prove(minutes, seed, faults, jobs_per_minute, url, agreed, cluster, redis, soaks, out)
