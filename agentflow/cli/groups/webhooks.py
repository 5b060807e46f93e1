"""`webhooks`, and `rotate-key` for the key of stored credentials."""

from __future__ import annotations

import click

from agentflow.cli.groups import options

_SOURCES = ["standard", "github", "stripe", "slack", "telegram", "kommo", "kommo_chats", "generic"]
_ENDPOINT = click.argument("endpoint", metavar="ID", type=click.UUID)
_SECRET = click.option(
    "--secret-file", metavar="FILE|-", help="The vendor's secret, from a file or stdin.  [default: one is made]"
)


@click.group(cls=options.Group)
def webhooks() -> None:
    """Webhooks in: endpoints, what came to them, and handling it once more."""


@webhooks.command("create")
@click.argument("source", type=click.Choice(_SOURCES))
@click.option("--org", metavar="SLUG", default="default", show_default=True, help="By slug or number.")
@click.option("--name", required=True, help="For people.")
@click.option(
    "--config", "config_text", metavar="JSON", default="{}", help="What becomes of its events, as the API takes it."
)
@_SECRET
@click.option("--silence-after", "silence_after_s", type=click.FloatRange(60), help="Alarm after so many seconds.")
def create(
    source: str, org: str, name: str, config_text: str, secret_file: str | None, silence_after_s: float | None
) -> None:
    """Make an endpoint; print its path and, where it was made here, its secret: the only lines on stdout."""
    from agentflow.cli import webhook_commands

    webhook_commands.create(org, source, name, config_text, secret_file, silence_after_s)


@webhooks.command("list")
@options.OF_ORGANIZATION
@options.AS_LINES
def list_endpoints(org: str | None, as_json: bool) -> None:
    """Endpoints, the newest first."""
    from agentflow.cli import webhook_commands

    webhook_commands.list_all(org, as_json)


@webhooks.command("rotate")
@_ENDPOINT
@click.option("--kind", type=click.Choice(["secret", "token"]), default="secret", show_default=True)
@_SECRET
@options.grace("Hours.")
def rotate(endpoint: object, kind: str, secret_file: str | None, grace_h: float) -> None:
    """Make a new secret, or a new token; the one before works for the grace."""
    from agentflow.cli import webhook_commands

    webhook_commands.rotate(str(endpoint), kind, secret_file, grace_h)


@webhooks.command("disable")
@_ENDPOINT
def disable(endpoint: object) -> None:
    """Take nothing more in."""
    from agentflow.cli import webhook_commands

    webhook_commands.disable(str(endpoint), enable=False)


@webhooks.command("enable")
@_ENDPOINT
def enable(endpoint: object) -> None:
    """Take webhooks in again."""
    from agentflow.cli import webhook_commands

    webhook_commands.disable(str(endpoint), enable=True)


@webhooks.command("events")
@click.option("--endpoint", metavar="ID", type=click.UUID)
@click.option("--outcome", type=click.Choice(["pending", "done", "stale", "ignored", "failed"]))
@click.option("--verdict", type=click.Choice(["verified", "by_token", "conflict", "refused"]))
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True)
@options.AS_LINES
def list_events(endpoint: object, outcome: str | None, verdict: str | None, limit: int, as_json: bool) -> None:
    """What came, the newest first."""
    from agentflow.cli import webhook_commands

    webhook_commands.list_events(str(endpoint) if endpoint else None, outcome, verdict, limit, as_json)


@webhooks.command("replay")
@click.argument("event", metavar="ID", type=click.UUID)
@click.option("--even-if-stale", is_flag=True, help="Also where a newer state of its entity was handled.")
def replay(event: object, even_if_stale: bool) -> None:
    """Handle an event once more; print the job. Many at once: `POST /api/webhook-events/replay`."""
    from agentflow.cli import webhook_commands

    webhook_commands.replay(str(event), even_if_stale)


@click.command("rotate-key")
def rotate_key() -> None:
    """Encrypt stored credentials anew, under ENCRYPTION_KEY.

    Set ENCRYPTION_KEY_OLD to the key before it in all processes, run this, then take ENCRYPTION_KEY_OLD away. May be stopped
    and started again.
    """
    from agentflow.cli import webhook_commands

    webhook_commands.rotate_key()
