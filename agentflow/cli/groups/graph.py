"""`graph`: which entities and relations are looked for."""

from __future__ import annotations

from pathlib import Path

import click

from agentflow.cli.groups import options


@click.group(cls=options.Group)
def graph() -> None:
    """The graph of documents."""


@graph.command("types")
@click.option("--org", help="Slug or number of an organization.  [default: number 1]")
@click.option(
    "--file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="JSON as this command prints it."
)
@click.option("--default", is_flag=True, help="The types of a new organization again.")
def graph_types(org: str | None, file: Path | None, default: bool) -> None:
    """Which types of entities and relations are looked for; with --file, from now on."""
    from agentflow.cli import graph_commands

    graph_commands.types(org, file, default)
