"""Ids that are made in a process: in order, near its clock, never the same."""

from __future__ import annotations

import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

from agentflow.ids import new_id


def ms_of(made: uuid.UUID) -> int:
    return made.int >> 80


def test_it_is_a_uuid_of_version_7_with_the_time_in_front() -> None:
    before = time.time_ns() // 1_000_000
    made = new_id()

    assert type(made) is uuid.UUID and (made.version, made.variant) == (7, uuid.RFC_4122)
    assert before <= ms_of(made) <= time.time_ns() // 1_000_000 + 1


def test_a_hundred_thousand_at_once_are_in_order_and_not_ahead_of_the_clock() -> None:
    made = [new_id() for _ in range(100_000)]

    assert made == sorted(made) and len(set(made)) == len(made)
    assert ms_of(made[-1]) <= time.time_ns() // 1_000_000 + 1


def test_threads_make_no_two_alike_each_in_order() -> None:
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda _: [new_id() for _ in range(2_000)], range(8)))

    assert len({each for some in made for each in some}) == 16_000
    assert all(some == sorted(some) for some in made)


def test_processes_forked_from_one_make_different_ones() -> None:
    """As gunicorn's and Dramatiq's are: with one state of random numbers they would make the same."""
    code = """
import os
from agentflow.ids import new_id
new_id()
for _ in range(4):
    if not os.fork():
        os.write(1, "".join(f"{new_id()}\\n" for _ in range(200)).encode())
        os._exit(0)
for _ in range(4):
    os.wait()
"""
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()

    assert len(made) == len(set(made)) == 800
    assert len({each[19:] for each in made}) == 800  # nor by the time alone
