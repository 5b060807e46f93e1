"""The table of contents of the command line, and how a command ends."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import click

import agentflow
from agentflow.cli import errors
from agentflow.cli.groups import (
    alerts,
    backups,
    callbacks,
    checks,
    crm,
    graph,
    jobs,
    knowledge,
    options,
    organizations,
    processes,
    rules,
    schedules,
    telegram,
    videos,
    webhooks,
    workflows,
)


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


@click.group(cls=options.Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(agentflow.__version__, message="agentflow %(version)s")
def cli() -> None:
    """Background jobs that cannot get lost: start AgentFlow, hand work in, look at it.

    Settings come from the environment (see README). Without any, everything runs on this machine in AGENTFLOW_HOME.
    """


for _command in (
    processes.up,
    processes.worker,
    videos.analyze,
    jobs.jobs,
    jobs.queues,
    jobs.ping,
    schedules.schedules,
    rules.rules,
    organizations.orgs,
    organizations.keys,
    callbacks.callbacks,
    webhooks.webhooks,
    webhooks.rotate_key,
    workflows.workflows,
    crm.crm,
    telegram.telegram,
    knowledge.knowledge,
    graph.graph,
    alerts.alerts,
    backups.backup,
    backups.restore,
    checks.doctor,
    checks.prove,
    checks.load,
):
    cli.add_command(_command)
