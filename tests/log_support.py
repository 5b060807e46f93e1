"""The log of this process as a process of the system has it."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import structlog

from agentflow import log
from agentflow.settings import Settings


@pytest.fixture
def configured_log(test_settings: Settings) -> Iterator[None]:
    root, before = logging.getLogger(), structlog.get_config()
    handlers, level = root.handlers[:], root.level
    log.configure(test_settings, "test")
    yield
    structlog.configure(**before)
    root.handlers[:] = handlers
    root.setLevel(level)
