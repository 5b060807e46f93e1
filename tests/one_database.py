"""`from tests.one_database import database_url, original`: one database for all tests of the module, put in order after each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from agentflow import embedded
from tests import core_support
from tests.core_support import Original

__all__ = ["database_url", "original"]


@pytest.fixture(scope="module")
def original(stack: embedded.Embedded) -> Iterator[tuple[str, Original]]:
    with core_support.database(stack) as url:
        yield url, Original(url)


@pytest.fixture
def database_url(original: tuple[str, Original]) -> Iterator[str]:
    url, before = original
    yield url
    before.restore()
