"""The log of this process as a process of the system has it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

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


@contextmanager
def unseen(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Past pytest's own handlers: what its workers send to their master has to be text that can be encoded."""
    root = logging.getLogger()
    before = root.handlers[:]
    root.handlers[:] = [handler for handler in before if not isinstance(handler, type(caplog.handler))]
    yield
    root.handlers[:] = before
