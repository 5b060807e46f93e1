"""`agentflow prove` finds what it is there to find: with one safeguard taken out of the private copy, it says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest

from agentflow.prove import run
from tests.mutations import mutate_function
from tests.test_prove import options

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

#: What stands after the condition, in the lock and in the update.
CLAIM = ("j.run_at <= clock_timestamp() and j.concurrency_key is null", "j.attempt < j.max_attempts")
FENCE = ("v.id = j.id and v.fence = j.fence", "v.id = j.id")


def proven(
    out: Path, *faults: str, without: Callable[[psycopg.Connection[Any]], None] | None = None, **more: Any
) -> dict[str, Any]:
    given: dict[str, Any] = {"minutes": 0.75, "jobs_per_minute": 1500.0, "quiet_s": 25.0, **more}
    made = run.prove(options(out, faults=faults, prepared=without, **given))
    assert made["verdict"] == "wrong", made
    return made


def unlocked(conn: psycopg.Connection[Any]) -> None:
    """Keys are not locked, and claims under them stay open for so long that some meet."""
    mutate_function(conn, "lock_keys_1", ("perform pg_advisory_xact_lock(h);", "null;"))
    last = "and k.look_again_s is not null;"
    mutate_function(conn, "claim_keyed_2", (last, f"{last} perform pg_sleep(0.02);"))


def test_without_the_claims_condition(tmp_path: Path) -> None:
    def greedy(conn: psycopg.Connection[Any]) -> None:  # what has ended is refused by the table's own constraints
        mutate_function(
            conn,
            "claim_1",
            *((f"j.state || '' = 'queued' and {and_}", f"j.finished_at is null and {and_}") for and_ in CLAIM),
        )

    made = proven(tmp_path, "stray_messages", "cut_rabbitmq", without=greedy)

    assert made["violations"]["a holder that changes without a claim"]["count"] > 0


def test_without_the_fence(tmp_path: Path) -> None:
    def unfenced(conn: psycopg.Connection[Any]) -> None:
        mutate_function(conn, "settle_1", FENCE, ("else j.worker = p_worker end", "else true end"))

    made = proven(tmp_path, "freeze_worker", without=unfenced, minutes=1.5)

    assert made["wrong"]["recorded_twice"] > 0
    assert made["violations"]["written by a process that does not hold it"]["count"] > 0


def test_without_the_relay(tmp_path: Path) -> None:
    made = proven(
        tmp_path,
        "wipe_redis",
        without=lambda conn: mutate_function(conn, "relay_5", ("if room > 0 then", "if false then")),
    )

    assert made["wrong"]["stuck"] > 0


def test_without_the_rescue(tmp_path: Path) -> None:
    made = proven(
        tmp_path,
        "kill_worker",
        without=lambda conn: mutate_function(conn, "rescue_2", ("if ids is null then", "if true then")),
    )

    assert made["wrong"]["stuck"] > 0


def test_without_the_lock_of_a_key(tmp_path: Path) -> None:
    """The index on slots, the second line of defence, refuses the claims that the lock would have kept apart."""

    made = proven(tmp_path, "kill_child", without=unlocked, jobs_per_minute=3000.0, crowds=0.3)

    assert any("jobs_slot" in error for error in made["unexpected_errors"]), made["unexpected_errors"]


def test_without_the_lock_of_a_key_and_the_index_behind_it(tmp_path: Path) -> None:
    def unguarded(conn: psycopg.Connection[Any]) -> None:
        unlocked(conn)
        conn.execute("drop index agentflow.jobs_slot")

    made = proven(tmp_path, "kill_child", without=unguarded, jobs_per_minute=3000.0, crowds=0.3)

    assert {"more jobs of a key at once than allowed", "two jobs in one slot"} & set(made["violations"])


def test_without_the_check_of_an_acknowledgements_origin(tmp_path: Path) -> None:
    made = proven(tmp_path, "cut_rabbitmq", worker="tests.prove_mutations:origin", minutes=1.0, jobs_per_minute=2400.0)

    assert made["wrong"]["protocol_errors"] > 0


def test_without_the_callback_in_settle(tmp_path: Path) -> None:
    made = proven(
        tmp_path,
        "kill_child",
        without=lambda conn: mutate_function(
            conn, "follow_up_1", ("and j.finished_at is not null and j.callback_url is not null", "and false")
        ),
    )

    assert made["violations"]["a callback missing or too much"]["count"] > 0
