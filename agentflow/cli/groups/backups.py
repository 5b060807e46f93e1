"""`backup` and `restore`: the whole system, and a system from it."""

from __future__ import annotations

import click

from agentflow.cli.groups import options


@click.command()
@click.argument("where", metavar="FOLDER|URL")
@click.option(
    "--keep", type=click.IntRange(1, 10_000), help="Then delete all but the newest N backups.  [default: all stay]"
)
@options.AS_OBJECT
def backup(where: str, keep: int | None, as_json: bool) -> None:
    """Copy the database and the files, while everything goes on, such as: agentflow backup s3://backups/agentflow --keep 14

    Of files only those are copied that the place does not have yet. Buckets take the AWS_… variables that STORAGE_URL takes.
    """
    from agentflow.cli import backup_commands

    backup_commands.backup(where, keep, as_json)


@click.command()
@click.argument("where", metavar="FOLDER|URL")
@click.option("--backup", "id_", metavar="ID", help="Which one.  [default: the newest]")
@click.option("--hold", is_flag=True, help="Pause every queue: nothing runs before you have looked.")
@click.option("--list", "lists", is_flag=True, help="Show the backups, restore nothing.")
@click.option("--check", "checks", is_flag=True, help="Read all of it and compare its checksums, restore nothing.")
@options.AS_OBJECT
def restore(where: str, id_: str | None, hold: bool, lists: bool, checks: bool, as_json: bool) -> None:
    """Make the system of a backup, in the empty database and storage that the settings name.

    All or nothing: what was stopped is begun anew by the same command. Stop the old system first.
    """
    from agentflow.cli import backup_commands

    if lists + checks + hold > 1:
        raise click.UsageError("--list, --check and --hold exclude each other")
    if lists:
        backup_commands.show(where, as_json)
    elif checks:
        backup_commands.check(where, id_)
    else:
        backup_commands.restore(where, id_, hold, as_json)
