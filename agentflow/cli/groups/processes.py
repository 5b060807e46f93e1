"""`up` and `worker`: the processes that serve."""

from __future__ import annotations

import click


@click.command()
@click.option("--host", help="Address to listen at.  [default: 127.0.0.1; with PORT set, all addresses]")
@click.option("--port", type=click.IntRange(0, 65535), help="Port; 0 takes a free one.  [default: PORT, or 8000]")
@click.option("--announce", type=int, hidden=True, help="Descriptor of a socket: gets the URL; its end is ours.")
def up(host: str | None, port: int | None, announce: int | None) -> None:
    """Run everything in one process: web, worker threads and schedule.

    Postgres and Valkey are started too, unless DATABASE_URL and REDIS_URL name others. Ctrl-C or SIGTERM stops: running
    jobs get SHUTDOWN_GRACE seconds, then they are handed back; a second signal hands them back at once.
    """
    from agentflow.cli import serve

    serve.up(host, port, announce)


@click.command()
@click.option("-n", "--number", type=click.IntRange(1, 100), default=1, show_default=True, help="Worker processes.")
@click.option(
    "-Q",
    "--queues",
    multiple=True,
    metavar="QUEUE …",
    help="Take jobs of these queues only: default, heavy, gpu, large.  [default: all but large]",
)
@click.option("--threads", type=click.IntRange(1, 1000), help="Jobs at once in each.  [default: JOB_CONCURRENCY]")
@click.option("--module", default="actors", hidden=True, help="What to import for the types of jobs.")
@click.option(
    "--child", hidden=True, help="Be one of the processes: parent, descriptors of its probe and its readiness."
)
@click.argument("more", metavar="", nargs=-1)
def worker(
    number: int, queues: tuple[str, ...], threads: int | None, module: str, child: str | None, more: tuple[str, ...]
) -> None:
    """Run worker processes, and start them again when they die.

    Each is what `dramatiq actors --processes 1` runs. SIGTERM, SIGHUP or Ctrl-C stops them: running jobs get SHUTDOWN_GRACE
    seconds, then they are handed back; a second signal hands them back at once. /health and /metrics on PORT are of all.
    """
    from agentflow.cli import workers

    if more and not queues:
        raise click.UsageError(f"Got unexpected extra argument ({more[0]}); queues follow -Q")
    names = (*queues, *more)
    if child is not None:
        workers.run_child(child, names, threads, module)
    workers.work(number, names, threads, module)
