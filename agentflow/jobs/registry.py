"""The types of jobs: what the decorator of a job's function says about it.

`ls actors/` is the table of contents; importing `actors` fills this registry. The web process reads it to check payloads,
the worker to find the function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar
from uuid import UUID

from pydantic import BaseModel

from agentflow.jobs.model import HEAD_STARTS, HeadStart, Job, Priority
from agentflow.jobs.unique import Unique
from agentflow.settings import Settings


@dataclass(frozen=True, slots=True)
class RetryClass:
    """How often an attempt may fail. Back-off is 2, 4, 8, 16, 32 s … up to `cap_s`, with jitter; or a ladder of its own."""

    name: str
    max_attempts: int
    cap_s: float = 300.0
    ladder_s: tuple[float, ...] = ()

    def delay_s(self, attempt: int, jitter: float) -> float:
        """Seconds until the next try after try number `attempt` (from 1); `jitter` is 0 to 1 and takes off up to a quarter.

        A ladder's steps are promised to others: there it adds up to a tenth.
        """
        if self.ladder_s:
            return float(self.ladder_s[min(attempt, len(self.ladder_s)) - 1] * (1 + jitter / 10))
        return float(min(self.cap_s, 2.0 ** min(attempt, 16)) * (1 - jitter / 4))


STANDARD: Final = RetryClass("standard", 5)
CRITICAL: Final = RetryClass("critical", 10)  # CRM, sending messages
QUICK: Final = RetryClass("quick", 3)  # status updates


@dataclass(frozen=True, slots=True)
class Rate:
    """At most `amount` starts within `per_s` seconds, over all workers; beyond it jobs are parked, no attempt spent."""

    amount: int
    per_s: int


@dataclass(frozen=True, slots=True)
class Memory:
    """What a type takes before that was measured. `guess` gives bytes by the size of the input, or of one whose size nobody knows
    (None); `input_bytes` looks that up, before anything else is done for the job: by system and job."""

    guess: Callable[[int | None], int]
    input_bytes: Callable[[Any, Job], int | None] = lambda _system, _job: None


class Payload(BaseModel):
    """A job's arguments: ids and small JSON. Unknown fields and wrong types are refused, so that a mistake is not a silent
    default. Checked as JSON (`model_validate_json`), where a string may be an id or a time."""

    model_config = {"extra": "forbid", "frozen": True, "strict": True}


P = TypeVar("P", bound=Payload)


class JobFunction(Protocol):
    def __call__(self, context: Any, payload: Any, /) -> Any: ...


@dataclass(frozen=True, slots=True)
class JobType:
    """One kind of work. `concurrency` gives a scarce resource's key and its slots (None: others count them), or None;
    `process_limit` the most of this type that one worker process runs at once; `head_start_s` by how much it comes before
    others of its class. Work that is not `repeatable` is stopped when the worker's lease runs out by its own clock; other work
    goes on, since its finish is fenced."""

    name: str
    function: JobFunction
    payload: type[Payload]
    queue: str
    retry: RetryClass
    time_limit_s: float
    priority: Priority
    head_start_s: HeadStart
    concurrency: Callable[[Any], tuple[str, int | None] | None]
    process_limit: Callable[[Settings], int] | None
    memory: Memory | None
    rate: Rate | None
    unique: Callable[[Any], Unique | None]
    repeatable: bool
    public: bool
    files: Callable[[int, UUID, Any], str] | None
    description: str


_types: dict[str, JobType] = {}


class UnknownType(LookupError):
    """No job type of this name."""

    def __init__(self, name: str) -> None:
        super().__init__(f"unknown job type {name!r}; known: {', '.join(sorted(t.name for t in public())) or 'none'}")
        self.name = name


def no_concurrency(_: Any) -> None:
    """Of a type whose jobs may all run at once."""


def job(
    name: str,
    *,
    payload: type[P],
    queue: str = "default",
    retry: RetryClass = STANDARD,
    time_limit_s: float = 600.0,
    priority: Priority = "default",
    head_start_s: HeadStart = 0,
    concurrency: Callable[[P], tuple[str, int | None] | None] = no_concurrency,
    process_limit: Callable[[Settings], int] | None = None,
    memory: Memory | None = None,
    rate: Rate | None = None,
    unique: Callable[[P], Unique | None] = lambda _: None,
    repeatable: bool = True,
    public: bool = True,
    files: Callable[[int, UUID, P], str] | None = None,
) -> Callable[[Callable[[Any, P], Any]], Callable[[Any, P], Any]]:
    """Declare a function `(context, payload) -> result` as a job type. `public` types may be submitted over the API.

    `files` gives the folder in storage that is the job's alone, by organization, job and payload: it goes when the job is
    forgotten.
    """

    def declare(function: Callable[[Any, P], Any]) -> Callable[[Any, P], Any]:
        if name in _types and _types[name].function is not function:
            raise ValueError(f"job type {name!r} is declared twice")
        if head_start_s not in HEAD_STARTS:
            raise ValueError(f"job type {name!r}: head_start_s is one of {HEAD_STARTS}")
        _types[name] = JobType(
            name=name,
            function=function,
            payload=payload,
            queue=queue,
            retry=retry,
            time_limit_s=time_limit_s,
            priority=priority,
            head_start_s=head_start_s,
            concurrency=concurrency,
            process_limit=process_limit,
            memory=memory,
            rate=rate,
            unique=unique,
            repeatable=repeatable,
            public=public,
            files=files,
            description=(function.__doc__ or "").strip().split("\n")[0],
        )
        return function

    return declare


def get(name: str) -> JobType:
    """Raises UnknownType."""
    try:
        return _types[name]
    except KeyError:
        raise UnknownType(name) from None


def known(name: str) -> bool:
    return name in _types


def every() -> list[JobType]:
    return list(_types.values())


def public() -> list[JobType]:
    return [t for t in _types.values() if t.public]
