"""English and Russian. English is what stands in the pages and is the key; ru.json has the Russian for each.

Own, since it is sixty lines: Babel brings 30 MB of locales, and gettext's own tools a step between a text and its page.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, Final

from flask import has_request_context
from markupsafe import Markup, escape

LANGUAGES: Final = {"en": "English", "ru": "Русский"}
#: As CLDR has them: one, few, many.
RUSSIAN_FORMS: Final = 3


def say(text: str, **values: Any) -> str:
    """The text in the language of the request, with `{name}` filled in."""
    found = text
    if _russian_is_asked_for():
        translated = _russian().get(text, text)
        assert isinstance(translated, str)  # noqa: S101 - a test reads the catalogue
        found = translated
    if any(isinstance(each, Markup) for each in values.values()):
        return escape(found).format(**values)
    return found.format(**values) if values else found


def plural(number: int, one: str, many: str, **values: Any) -> str:
    """`{n}` is the number. The key of the forms is the English plural."""
    form = one if number == 1 else many
    if _russian_is_asked_for():
        forms = _russian().get(many)
        if isinstance(forms, list):
            form = forms[_russian_form(number)]
    return form.format(n=grouped(number), **values)


def grouped(number: int) -> str:
    """With narrow spaces between thousands, as both languages read it."""
    return f"{number:,}".replace(",", "\u202f")


def _russian_form(number: int) -> int:
    last, two = abs(number) % 10, abs(number) % 100
    if last == 1 and two != 11:
        return 0
    return 1 if 2 <= last <= 4 and not 12 <= two <= 14 else 2


def _russian_is_asked_for() -> bool:
    from web.dashboard import frame  # which says things itself

    return has_request_context() and frame.language() == "ru"


@cache
def _russian() -> dict[str, str | list[str]]:
    found: dict[str, str | list[str]] = json.loads((Path(__file__).parent / "ru.json").read_text())
    return found
