"""Jobs that ask models keep to the limits of their organization and of the vendor, over all workers: whoever has to wait is
parked, and pays nothing twice."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from agentflow.calls import Service
from agentflow.errors import Wait
from agentflow.jobs import records, rules
from agentflow.jobs.model import Job
from agentflow.jobs.requests import NewJob
from agentflow.limits import Window
from agentflow.models import failures
from agentflow.system import System
from tests import job_types  # noqa: F401 - registers the tests' job types
from tests import openrouter_server as faults
from tests.core_support import rows
from tests.http_server import Reply
from tests.openrouter_server import KEY, Asked, ModelServer, completion, model_server
from tests.processes import eventually, worker

Connection = psycopg.Connection
ONE, TWO = 1, 2
PATIENCE_S = 90.0


@pytest.fixture
def vendor() -> Iterator[ModelServer]:
    with model_server() as server:
        yield server


@pytest.fixture(params=["redis", pytest.param("postgres alone", marks=pytest.mark.long)])
def tier(request: pytest.FixtureRequest, environment: dict[str, str]) -> None:
    """With limits shared in Redis, and with those of the one process."""
    if request.param == "postgres alone":
        del environment["REDIS_URL"]


@pytest.fixture
def asking(environment: dict[str, str], vendor: ModelServer, conn: Connection) -> dict[str, str]:
    conn.execute("insert into agentflow.organizations (id, slug, name) values (2, 'two', 'Two')")
    environment |= {"OPENROUTER_API_KEY": KEY, "OPENROUTER_BASE_URL": vendor.url}
    return environment


def ask(system: System, about: str, *, organization: int = ONE, questions: int = 1) -> Job:
    return system.submit(organization, NewJob("test_asker", {"about": about, "questions": questions})).job


def state(conn: Connection, job: Job) -> tuple[str, str | None, int]:
    found = records.get(conn, None, job.id)
    assert found is not None
    return found.state, found.wait_reason, found.attempt


def all_are(conn: Connection, jobs: list[Job], *wanted: tuple[str, str | None, int]) -> Callable[[], bool]:
    return lambda: Counter(state(conn, job) for job in jobs) == Counter(wanted)


DONE, PARKED = ("succeeded", None, 1), ("queued", "limit", 0)


@pytest.mark.usefixtures("tier")
def test_what_is_over_an_organizations_limit_is_parked_until_its_place_and_nobody_else(
    system: System, conn: Connection, asking: dict[str, str], vendor: ModelServer, tmp_path: Path
) -> None:
    asking["OPENROUTER_RATE_PER_MINUTE"] = "3"
    jobs = [ask(system, f"question {n}") for n in range(7)]
    with worker(asking, tmp_path / "worker.log"):
        eventually(all_are(conn, jobs, *[DONE] * 3, *[PARKED] * 4), within_s=PATIENCE_S)
        other = ask(system, "of another organization", organization=TWO)
        eventually(all_are(conn, [other], DONE), within_s=PATIENCE_S)

        parked = rows(conn, "select wake_at, sent_at from agentflow.jobs where wait_reason = 'limit' order by wake_at")
        assert all(
            (later.wake_at - sooner.wake_at).total_seconds() > 15 for sooner, later in itertools.pairwise(parked)
        )
        assert {row.sent_at for row in parked} == {None}  # no message anywhere
        assert len(vendor.asked) == 4

        # A larger limit, set while they wait, gives them new places.
        with system.database.transaction() as pooled:
            rules.set_limit(pooled, rules.EVERY, "openrouter", [Window(100, 60)])
        eventually(all_are(conn, jobs, *[DONE] * 7), within_s=PATIENCE_S)
    assert len(vendor.asked) == 8


def test_two_workers_share_one_limit(
    system: System, conn: Connection, asking: dict[str, str], vendor: ModelServer, tmp_path: Path
) -> None:
    rules.set_limit(conn, ONE, "openrouter", [Window(4, 3600)])
    with worker(asking, tmp_path / "a.log"), worker(asking, tmp_path / "b.log"):
        jobs = [ask(system, f"question {n}") for n in range(12)]
        eventually(all_are(conn, jobs, *[DONE] * 4, *[PARKED] * 8), within_s=PATIENCE_S)

    assert len(vendor.asked) == 4


def test_a_job_with_many_questions_goes_on_after_each_wait_and_pays_none_twice(
    system: System, conn: Connection, asking: dict[str, str], vendor: ModelServer, tmp_path: Path
) -> None:
    rules.set_limit(conn, rules.EVERY, "openrouter", [Window(2, 1)])
    job = ask(system, "a long story", questions=7)

    with worker(asking, tmp_path / "worker.log"):
        eventually(all_are(conn, [job], DONE), within_s=PATIENCE_S)

    assert len(vendor.asked) == 7
    assert "wait" in {attempt.outcome for attempt in records.attempts(conn, job.id)}


def test_a_refusal_of_the_vendor_holds_back_whoever_uses_the_same_key(
    system: System, conn: Connection, asking: dict[str, str], vendor: ModelServer, tmp_path: Path
) -> None:
    vendor.fault(faults.busy("600"))
    with worker(asking, tmp_path / "a.log"), worker(asking, tmp_path / "b.log"):
        refused = ask(system, "first")
        eventually(all_are(conn, [refused], ("queued", failures.LIMIT, 0)), within_s=PATIENCE_S)

        others = [ask(system, f"other {n}", organization=TWO) for n in range(4)]

        eventually(all_are(conn, others, *[PARKED] * 4), within_s=PATIENCE_S)
    assert len(vendor.asked) == 1


def test_an_answer_that_names_itself_the_last_one_is_believed(
    system: System, conn: Connection, asking: dict[str, str], vendor: ModelServer, tmp_path: Path
) -> None:
    def the_last(asked: Asked) -> Reply:
        answer = completion("pong")
        answer.headers.update({"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": f"{(time.time() + 600) * 1000:.0f}"})
        return answer

    vendor.fault(the_last)
    with worker(asking, tmp_path / "worker.log"):
        first = ask(system, "first")
        eventually(all_are(conn, [first], DONE), within_s=PATIENCE_S)
        second = ask(system, "second")
        eventually(all_are(conn, [second], PARKED), within_s=PATIENCE_S)

    (row,) = rows(
        conn, "select extract(epoch from wake_at - clock_timestamp()) as s from agentflow.jobs where id = %s", second.id
    )
    assert 400 < row.s < 700
    assert len(vendor.asked) == 1


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"x-ratelimit-remaining": "0", "x-ratelimit-reset": "30"}, 30.0),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "6m0s"}, 360.0),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1h2m3.5s"}, 3723.5),
        ({"x-ratelimit-remaining": "0", "x-ratelimit-reset": "250ms"}, 0.25),
        ({"x-ratelimit-remaining": "0", "x-ratelimit-reset": str(2_000_000_000)}, 20.0),
        ({"x-ratelimit-remaining": "0", "x-ratelimit-reset": str(2_000_000_000_000)}, 20.0),
        ({"x-ratelimit-remaining": "0", "x-ratelimit-reset": "9" * 40}, 25 * 3600.0),
        ({"x-ratelimit-remaining": "1", "x-ratelimit-reset": "30"}, None),
        ({"x-ratelimit-remaining": "0", "x-ratelimit-reset": "soon"}, None),
        ({"x-ratelimit-remaining": "0", "x-ratelimit-reset": "nan"}, None),
        ({"x-ratelimit-remaining": "0"}, None),
        ({}, None),
    ],
)
def test_every_way_in_which_vendors_say_until_when(
    monkeypatch: pytest.MonkeyPatch, headers: dict[str, str], seconds: float | None
) -> None:
    monkeypatch.setattr(failures.time, "time", lambda: 1_999_999_980.0)

    assert failures.exhausted_s(headers) == (pytest.approx(seconds) if seconds is not None else None)


def test_a_429_is_waited_out_as_its_headers_say() -> None:
    error = failures.of_answer(429, {"x-ratelimit-remaining": "0", "x-ratelimit-reset": "40"}, b"{}")

    assert isinstance(error, Wait)
    assert 40 < error.seconds < 42


def test_an_own_limit_holds_beside_the_operators_and_never_instead_of_it(conn: Connection) -> None:
    default, operators, own = (Window(100, 60),), [Window(50, 60)], [Window(1000, 60), Window(7, 1)]

    def limits() -> tuple[Any, Any]:
        known = rules.read(conn)
        return known.limit_of(ONE, "openrouter", default), known.limit_of(TWO, "openrouter", default)

    rules.set_limit(conn, ONE, "openrouter", own, own=True)
    beside_the_default = limits()
    rules.set_limit(conn, rules.EVERY, "openrouter", operators)
    beside_the_operators = limits()
    rules.set_limit(conn, ONE, "openrouter", [Window(80, 60)])
    operators_for_one = limits()

    assert beside_the_default == ((*default, *own[::-1]), default)
    assert beside_the_operators == ((*operators, *own[::-1]), tuple(operators))
    assert operators_for_one == ((Window(80, 60),), tuple(operators))
    with pytest.raises(rules.OperatorsRule):
        rules.set_limit(conn, ONE, "openrouter", [], own=True)


def test_a_moment_is_waited_out_and_who_waits_longer_comes_a_little_early(system: System) -> None:
    at_once, later = Service("test", "one", (Window(1, 0.05),)), Service("test", "two", (Window(1, 60),))

    for n in range(5):
        system.calls.permit(at_once, ONE, f"call {n}")  # parking would take longer than the wait
    system.calls.permit(later, TWO, "call")
    with pytest.raises(Wait) as parked:
        system.calls.permit(later, TWO, "another")

    assert parked.value.reason == "limit"
    assert parked.value.seconds < 60.05 - 0.03
