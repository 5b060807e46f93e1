"""`rules`: pauses, limits and budgets."""

from __future__ import annotations

import click

from agentflow.cli.groups import options


@click.group(cls=options.Group)
def rules() -> None:
    """What is paused, how much runs at once, how often others are called, what a day may cost. In force within two seconds,
    everywhere."""


_OF = click.option("--org", metavar="SLUG", help="Of this organization alone.  [default: of each]")
_KIND = click.Choice(["queue", "type", "organization"])


@rules.command("list")
@options.AS_LINES
def list_rules(as_json: bool) -> None:
    """All rules that were set."""
    from agentflow.cli import rule_commands

    rule_commands.show(as_json)


@rules.command("pause")
@click.argument("kind", type=_KIND)
@click.argument("name")
@_OF
@click.option("--reason", help="Shown to whoever asks why.")
def pause(kind: str, name: str, org: str | None, reason: str | None) -> None:
    """Hold jobs back, such as: agentflow rules pause type analyze_video. What runs goes on to its end."""
    from agentflow.cli import rule_commands

    rule_commands.pause(kind, name, org, reason)


@rules.command("resume")
@click.argument("kind", type=_KIND)
@click.argument("name")
@_OF
def resume(kind: str, name: str, org: str | None) -> None:
    """End a pause: what it held back is due at once."""
    from agentflow.cli import rule_commands

    rule_commands.resume(kind, name, org)


@rules.command("cap")
@click.argument("running", metavar="N|off")
@click.option("--type", "type_", metavar="TYPE", help="Of this type.  [default: of all types together]")
@_OF
def cap(running: str, type_: str | None, org: str | None) -> None:
    """At most N jobs of an organization at once."""
    from agentflow.cli import rule_commands

    if running != "off" and not (running.isdecimal() and 1 <= int(running) <= 100_000):
        raise click.UsageError(f"{running!r} is neither a number from 1 to 100000 nor off")
    rule_commands.cap(None if running == "off" else int(running), type_, org)


@rules.command("limit")
@click.argument("provider")
@click.argument("windows", metavar="CALLS/SECONDS…", nargs=-1)
@_OF
def limit(provider: str, windows: tuple[str, ...], org: str | None) -> None:
    """How often a provider may be called, such as: agentflow rules limit type:analyze_video 10/60 100/3600

    `type:NAME` limits the starts of jobs of a type. Without windows the default counts again.
    """
    from agentflow.cli import rule_commands

    rule_commands.limit(provider, windows, org)


@rules.command("budget")
@click.argument("measure")
@click.argument("per_day", metavar="AMOUNT|off")
@_OF
def budget(measure: str, per_day: str, org: str | None) -> None:
    """What may be used up in a day (UTC), such as: agentflow rules budget usd 5 --org acme

    Measures are what attempts report: usd, tokens, tokens_in, tokens_out, model_calls, audio_s, gpu_s, video_min, crm_calls.
    """
    from agentflow.cli import rule_commands

    rule_commands.budget(measure, per_day, org)
