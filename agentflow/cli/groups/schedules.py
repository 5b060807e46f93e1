"""`schedules`: jobs at certain times."""

from __future__ import annotations

import click

from agentflow.cli.groups import options


@click.group(cls=options.Group)
def schedules() -> None:
    """Jobs at certain times: cron lines, intervals, single moments. A running scheduler notices within seconds."""


_SCHEDULE = click.argument("schedule", metavar="ID|NAME")


@schedules.command("list")
@options.OF_ORGANIZATION
@options.AS_LINES
def list_schedules(org: str | None, as_json: bool) -> None:
    """Schedules, the newest first, and when they tick next."""
    from agentflow.cli import schedule_commands

    schedule_commands.list_all(org, as_json)


@schedules.command("create")
@click.argument("name")
@click.argument("type_", metavar="TYPE")
@click.option("--org", default="default", show_default=True, metavar="SLUG", help="Whose it is.")
@click.option("--payload", default="{}", show_default=True, metavar="JSON", help="The job's arguments.")
@click.option("--cron", metavar="'M H D M W'", help="Minute, hour, day of month, month, day of week.")
@click.option("--zone", default="UTC", show_default=True, help="Whose clocks --cron goes by, such as Europe/Berlin.")
@click.option("--every", "every_s", type=click.IntRange(1), metavar="SECONDS", help="Again and again after so long.")
@click.option("--at", metavar="TIME", help="Once, such as 2026-03-01T07:30:00+01:00.")
@click.option("--jitter", "jitter_s", type=click.IntRange(0, 86_400), default=0, help="Up to so many seconds late.")
def create_schedule(
    name: str,
    type_: str,
    org: str,
    payload: str,
    cron: str | None,
    zone: str,
    every_s: int | None,
    at: str | None,
    jitter_s: int,
) -> None:
    """Have jobs of a type made at certain times: one of --cron, --every and --at.

    \b
    agentflow schedules create 'every morning' ping --cron '30 7 * * mon-fri' --zone Europe/Berlin
    """
    from agentflow.cli import schedule_commands
    from agentflow.schedules.when import When

    when = When(cron, every_s, schedule_commands.moment(at) if at else None, zone)
    schedule_commands.create(org, name, type_, payload, when, jitter_s)


@schedules.command("show")
@_SCHEDULE
@options.AS_OBJECT
def show_schedule(schedule: str, as_json: bool) -> None:
    """One schedule: its next five times, and what became of the last ones."""
    from agentflow.cli import schedule_commands

    schedule_commands.show(schedule, as_json)


@schedules.command("pause")
@_SCHEDULE
def pause_schedule(schedule: str) -> None:
    """Make no more jobs until it is resumed."""
    from agentflow.cli import schedule_commands

    schedule_commands.enable(schedule, False)


@schedules.command("resume")
@_SCHEDULE
def resume_schedule(schedule: str) -> None:
    """Go on from now; what was missed while it was paused is not made up for."""
    from agentflow.cli import schedule_commands

    schedule_commands.enable(schedule, True)


@schedules.command("run")
@_SCHEDULE
def run_schedule(schedule: str) -> None:
    """Hand its job in now, and print the job's id."""
    from agentflow.cli import schedule_commands

    schedule_commands.run(schedule)


@schedules.command("delete")
@_SCHEDULE
def delete_schedule(schedule: str) -> None:
    """Delete a schedule and its history; jobs that it made stay."""
    from agentflow.cli import schedule_commands

    schedule_commands.delete(schedule)
