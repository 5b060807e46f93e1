"""`dramatiq tests.watched_worker`: a worker whose jobs have something to say."""

from __future__ import annotations

import logging

import actors
from agentflow import log
from agentflow.jobs.registry import Payload, job
from agentflow.worker.running import JobContext
from tests import job_types  # noqa: F401 - registers the others

logger = log.get(__name__)


class Leak(Payload):
    url: str
    password: str


@job("watch_leak", payload=Leak)
def leak(context: JobContext, payload: Leak) -> None:
    """Fails with its secrets in its mouth."""
    opened_with = payload.password
    logger.info("opening", order=17, api_key=opened_with, at=payload.url)
    raise LookupError(f"cannot open {payload.url} with {opened_with}")


class Talk(Payload):
    lines: int = 1
    width: int = 10
    child: bool = False


@job("watch_talk", payload=Talk)
def talk(context: JobContext, payload: Talk) -> None:
    """Says a few things at each level, then lines of a certain width, and has its child say something."""
    logger.debug("not worth keeping")
    logger.warning("careful", of="heights", token="token-of-a-field")
    logging.getLogger("some.library").error("it said %s", "Bearer abcdefghijklmnop0123")
    for number in range(payload.lines):
        logger.info(f"line {number} " + "x" * payload.width)
    if payload.child:
        context.run_child("tests.watched_child:talk")


actors.worker.declare_actors()
