"""ops/runbook.md as a page: each paragraph with an address, to which what is wrong leads."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from flask import Response
from markupsafe import Markup

from web.dashboard.frame import Pages, Visit

pages = Pages()

FILE: Final = Path(__file__).parents[2] / "ops" / "runbook.md"


@dataclass(frozen=True, slots=True)
class Paragraph:
    anchor: str
    title: str
    html: Markup


@pages.get("/runbook")
def runbook(visit: Visit) -> Response:
    return visit.page("runbook.html", paragraphs=paragraphs())


def anchor_of(beginning: str) -> str | None:
    """Of the paragraph whose heading begins so."""
    return next((each.anchor for each in paragraphs() if each.title.replace("`", "").startswith(beginning)), None)


@cache
def paragraphs() -> list[Paragraph]:
    """Empty where the file is not installed along."""
    from markdown_it import MarkdownIt  # some MB: only where somebody reads

    if not FILE.exists():
        return []
    render = MarkdownIt("commonmark", {"html": False}).render
    found = []
    for section in re.split(r"^## ", FILE.read_text(), flags=re.MULTILINE)[1:]:
        title, _, text = section.partition("\n")
        # Safe: our own file, and markup in it is shown as text.
        found.append(Paragraph(_anchor(title), title.replace("`", ""), Markup(render(text))))  # noqa: S704
    return found


def _anchor(title: str) -> str:
    return "-".join(re.findall(r"[a-z0-9]+", title.lower()))[:60].strip("-")
