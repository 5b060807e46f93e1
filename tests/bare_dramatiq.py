"""Bare Dramatiq on RabbitMQ, set up as its guide says, to see what it does with a job: `dramatiq tests.bare_dramatiq`.

Each actor writes to BARE_FOLDER/log what happens to it.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import dramatiq
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.middleware import Middleware

FOLDER = Path(os.environ["BARE_FOLDER"])
QUEUE = os.environ["BARE_QUEUE"]

broker = RabbitmqBroker(url=os.environ["BARE_URL"], confirm_delivery=True)
dramatiq.set_broker(broker)


def say(what: str, name: str) -> int:
    """Returns how often it was said before."""
    with (FOLDER / "log").open("a+") as log:
        log.seek(0)
        before = log.read().splitlines().count(f"{what} {name}")
        log.write(f"{what} {name}\n")
    return before


class SlowRecord(Middleware):
    """As a hook that writes to a slow database does."""

    def after_process_message(self, broker: Any, message: Any, *, result: Any = None, exception: Any = None) -> None:
        for _ in range(300):
            time.sleep(0.01)


if "BARE_SLOW_RECORD" in os.environ:
    broker.add_middleware(SlowRecord())


@dramatiq.actor(queue_name=QUEUE)
def gate(name: str) -> None:
    """Waits at its first run until the test opens; returns at once when it is run again."""
    if say("start", name) == 0:
        while not (FOLDER / f"{name}.go").exists():
            time.sleep(0.02)
        say("end", name)


@dramatiq.actor(queue_name=QUEUE)
def quick(name: str) -> None:
    say("start", name)


@dramatiq.actor(queue_name=QUEUE, max_retries=5, min_backoff=100, max_backoff=200)
def fails_once(name: str) -> None:
    if say("start", name) == 0:
        raise RuntimeError("as asked")


@dramatiq.actor(queue_name=QUEUE, max_retries=5, min_backoff=100, max_backoff=200, time_limit=1000)
def fails_within_its_limit(name: str) -> None:
    if say("start", name) == 0:
        time.sleep(0.5)
        raise RuntimeError("as asked")


@dramatiq.actor(queue_name=QUEUE)
def takes(name: str, seconds: float) -> None:
    say("start", name)
    time.sleep(seconds)
