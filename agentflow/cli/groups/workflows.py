"""`workflows`: what may be rendered by name."""

from __future__ import annotations

from pathlib import Path

import click

from agentflow.cli.groups import options


@click.group(cls=options.Group)
def workflows() -> None:
    """Workflows for renders: those that are shipped, and organizations' own, in versions that never change."""


_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@workflows.command("list")
@options.OF_ORGANIZATION
@options.AS_LINES
def list_workflows(org: str | None, as_json: bool) -> None:
    """The newest version of each, by name."""
    from agentflow.cli import workflow_commands

    workflow_commands.list_all(org, as_json)


@workflows.command("show")
@click.argument("name")
@options.ORGANIZATION
@click.option("--version", type=click.IntRange(1), help="Which one.  [default: the newest]")
@options.AS_OBJECT
def show_workflow(name: str, org: str, version: int | None, as_json: bool) -> None:
    """One workflow and its parameters; with --json all of it, as a file for `add`."""
    from agentflow.cli import workflow_commands

    workflow_commands.show(name, org, version, as_json)


@workflows.command("check")
@click.argument("name", metavar="NAME|FILE")
@options.ORGANIZATION
@click.option("--pool", default="default", show_default=True, help="Whose servers have to be able to run it.")
@click.option("--nodes", type=_FILE, help="A saved answer of a server's /object_info, in place of the pool's last one.")
def check_workflow(name: str, org: str, pool: str, nodes: Path | None) -> None:
    """Check a workflow, or a file with a workflow or a graph, against what servers say of their nodes and models.

    Ends with 1 where a render would be refused.

    \b
    curl http://127.0.0.1:8188/object_info > nodes.json
    agentflow workflows check qwen-image-edit --nodes nodes.json
    """
    from agentflow.cli import workflow_commands

    workflow_commands.check(name, org, pool, nodes)


@workflows.command("add")
@click.argument("file", type=_FILE)
@options.ORGANIZATION
@click.option("--name", help="Under this name, in place of the file's own.")
def add_workflow(file: Path, org: str, name: str | None) -> None:
    """Add a workflow from a file, or a new version of it: {"name", "graph", "parameters", "outputs", "description"}."""
    from agentflow.cli import workflow_commands

    workflow_commands.add(file, org, name)
