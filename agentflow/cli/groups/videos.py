"""`analyze`: one video."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("video", metavar="FILE|URL")
@click.option("--url", "base", envvar="AGENTFLOW_URL", help="A running AgentFlow (its key: ADMIN_API_KEY).")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the pictures.  [default: ./agentflow-NAME]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON; pictures are fetched only with --out.")
def analyze(video: str, base: str | None, out: Path | None, as_json: bool) -> None:
    """Find a video's shots, with a picture of each and a contact sheet.

    Uses the AgentFlow at --url, or the one that runs on this machine's home, or starts one for as long as it takes.
    """
    from agentflow.cli import video as videos

    videos.analyze(video, base, out, as_json)
