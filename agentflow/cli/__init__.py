"""The command line, `agentflow`: the one place that knows web, actors and scheduler together; nothing imports it.

agentflow.cli.commands       the table of contents, and how a command ends
agentflow.cli.groups         the commands and their options, by subject; each imports what it needs when it runs
agentflow.cli.serve          `up`: web, worker and schedule in one process
agentflow.cli.workers        `worker`: worker processes under a supervisor
agentflow.cli.video          `analyze`: a video, over the HTTP API (agentflow.cli.client)
agentflow.cli.job_commands   `jobs`, `queues`, `ping`
agentflow.cli.backup_commands  `backup`, `restore`
agentflow.cli.checkup        `doctor`
agentflow.cli.loading        `load`
agentflow.cli.proving        `prove`; agentflow.cli.prove_worker and prove_web are its processes' programs
"""

from agentflow.cli.commands import main

__all__ = ["main"]
