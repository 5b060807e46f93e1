"""What the commands of several subjects share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click


class Group(click.Group):
    """Called without a command, it shows its help."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args or ["--help"])


AS_LINES = click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
AS_OBJECT = click.option("--json", "as_json", is_flag=True, help="As one JSON object.")
OF_ORGANIZATION = click.option("--org", metavar="SLUG", help="Of one organization.  [default: of all]")
ORGANIZATION = click.option(
    "--org", metavar="SLUG", default="default", show_default=True, help="The organization, by slug or number."
)


def grace(meaning: str) -> Callable[[Any], Any]:
    """For how many hours what is replaced works on."""
    return click.option(
        "--grace", "grace_h", type=click.FloatRange(0, 720), default=24.0, show_default=True, help=meaning
    )
