"""What a job is, as the rest of the system sees it."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, Literal
from uuid import UUID

State = Literal["queued", "running", "succeeded", "failed", "cancelled"]
Priority = Literal["critical", "default", "low"]
HeadStart = Literal[0, 5, 15, 30, 60, 120, 300, 600]
Outcome = Literal["succeeded", "failed", "cancelled", "retry", "wait", "handback", "crashed"]

STATES: Final[tuple[State, ...]] = ("queued", "running", "succeeded", "failed", "cancelled")
TERMINAL: Final = frozenset[State]({"succeeded", "failed", "cancelled"})
PRIORITIES: Final[tuple[Priority, ...]] = ("critical", "default", "low")
#: By so many seconds a job may come before others of its class and organization. Few, because each is a range of an index to the
#: relay; the table's CHECK has the same.
HEAD_STARTS: Final[tuple[HeadStart, ...]] = (0, 5, 15, 30, 60, 120, 300, 600)
#: One short queue at the broker for each kind of worker.
QUEUES: Final = ("default", "heavy", "gpu", "large")
#: For jobs that need more memory than other workers have: served by those that are told to, no type's own.
LARGE: Final = "large"
USUAL_QUEUES: Final = tuple(queue for queue in QUEUES if queue != LARGE)


@dataclass(frozen=True, slots=True)
class Job:
    """One row of agentflow.jobs. Times are aware datetimes by the database's clock; `progress` is 0 to 1."""

    id: UUID
    organization_id: int
    type: str
    queue: str
    priority: Priority
    head_start_s: HeadStart
    state: State
    payload: dict[str, Any]
    attempt: int
    max_attempts: int
    crashes: int
    fence: int
    time_limit_s: float
    run_at: datetime
    wake_at: datetime | None
    wait_reason: str | None
    cancel_requested: bool
    progress: float | None
    stage: str | None
    result: Any
    error: dict[str, Any] | None
    concurrency_key: str | None
    slot: int | None
    worker: UUID | None
    callback_url: str | None
    correlation_id: str | None
    idempotency_key: str | None
    parent_id: UUID | None
    retry_of: UUID | None
    batch_id: UUID | None
    trace: str | None  # see agentflow/traces.py
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None

    @property
    def terminal(self) -> bool:
        return self.state in TERMINAL


#: The columns that a Job is made of, in its order, for SELECT and RETURNING; `j` is the table's alias.
JOB_COLUMNS: Final = ", ".join(f"j.{name}" for name in Job.__dataclass_fields__)
_PRIORITY_AT: Final = list(Job.__dataclass_fields__).index("priority")


def job_from_row(row: tuple[Any, ...]) -> Job:
    values = list(row)
    values[_PRIORITY_AT] = PRIORITIES[values[_PRIORITY_AT]]
    return Job(*values)


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt that ended: which claim it was (`fence`), which try, by whom, how it went, and what it used up (totals
    by name)."""

    fence: int
    attempt: int
    worker: UUID | None
    started_at: datetime | None
    ended_at: datetime
    outcome: str
    error: dict[str, Any] | None
    usage: dict[str, float] | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """How an attempt ended, as its worker says it: the one thing that `settlement.settle` takes."""

    job_id: UUID
    fence: int
    outcome: Outcome
    delay_s: float = 0.0
    reason: str | None = None
    result: str | None = None  # JSON text
    error: str | None = None  # JSON text


@dataclass(frozen=True, slots=True)
class Ring:
    """What is said to the broker for one job: which queue, and hints that spare the worker a look (never the truth)."""

    job_id: UUID
    queue: str
    type: str
    priority: int = 1


@dataclass(frozen=True, slots=True)
class Settled:
    """What was written for a batch of verdicts: (id, fence) -> the state of the row now; and who is to be rung."""

    states: dict[tuple[UUID, int], State]
    finished: list[tuple[UUID, str, str, State]] = field(default_factory=list)  # id, queue, type, terminal state
    rings: list[Ring] = field(default_factory=list)
