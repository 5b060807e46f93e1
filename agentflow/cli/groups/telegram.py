"""`telegram`: the bot's updates, sent to us or asked for."""

from __future__ import annotations

import click

from agentflow.cli.groups import options


@click.group(cls=options.Group)
def telegram() -> None:
    """The Telegram bot of TELEGRAM_BOT_TOKEN."""


@telegram.command("set-webhook")
@click.argument("url")
@options.ORGANIZATION
@click.option("--drop-pending", is_flag=True, help="Forget what people wrote while nobody listened.")
def set_webhook(url: str, org: str, drop_pending: bool) -> None:
    """Have Telegram send the bot's updates to the server at URL, the public https address of your web process.

    The endpoint is made at the first call; each call makes a new address and a new secret, and tells Telegram.
    """
    from agentflow.cli import telegram_commands

    telegram_commands.set_webhook(url, org, drop_pending)


@telegram.command("delete-webhook")
def delete_webhook() -> None:
    """Have Telegram send nothing: the updates wait, for a day, until they are polled or a webhook is set."""
    from agentflow.cli import telegram_commands

    telegram_commands.delete_webhook()


@telegram.command("poll")
@options.ORGANIZATION
def poll(org: str) -> None:
    """Ask Telegram for the bot's updates, where nobody can reach this machine. Runs until it is stopped."""
    from agentflow.cli import telegram_commands

    telegram_commands.poll(org)
