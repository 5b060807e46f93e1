"""How the dashboard's pages are visited in tests: at which widths, with counted clicks, and with names that would run."""

from __future__ import annotations

import re
from typing import Any

import pytest
from playwright.sync_api import Locator, Page

from tests.dashboard_support import DESKTOP, PHONE

#: What somebody may have called a thing: a page that lets it through as it is sets `window.ran`, or shows 49.
SCRIPT = "<script>window.ran = true</script><img src=x onerror='window.ran = true'>{{ 7*7 }}"
WIDTHS = pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])


class Clicks:
    """Counts what a person does with a finger; keys are no clicks."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.number = 0

    def on(self, target: Locator) -> None:
        target.click()
        self.number += 1

    def on_role(self, role: Any, name: str | re.Pattern[str]) -> None:
        self.on(self.page.get_by_role(role, name=name, exact=isinstance(name, str)))
