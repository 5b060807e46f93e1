"""`alerts`: the rules for Prometheus, what is up, and whether it would be heard of."""

from __future__ import annotations

import click

from agentflow.cli.groups import options


@click.group(cls=options.Group)
def alerts() -> None:
    """What an operator should hear of: as rules for Prometheus, and as the scheduler raises it by itself."""


@alerts.command("rules")
def print_rules() -> None:
    """Print the rules for Prometheus, with the thresholds of ALERT_THRESHOLDS; ops/monitoring/alerts.yml is that with none."""
    from agentflow.cli import alert_commands

    alert_commands.print_rules()


@alerts.command("list")
@options.AS_LINES
def list_alerts(as_json: bool) -> None:
    """What the scheduler has raised, and who was told."""
    from agentflow.cli import alert_commands

    alert_commands.show(as_json)


@alerts.command("test")
def tell_a_test() -> None:
    """Tell ALERT_TELEGRAM_CHAT and ALERT_WEBHOOK_URL of an alert that is none, and say whether they took it."""
    from agentflow.cli import alert_commands

    alert_commands.tell_a_test()
