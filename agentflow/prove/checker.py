"""What must be true of a run, by its recorded history, its rows at the end, what callers were told, and what came out of it.

Written from the promises alone: nothing of the code that keeps them is imported here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

from agentflow.prove.history import Event, Row
from agentflow.prove.receiver import Delivery

EDGES: Final = frozenset(
    {
        ("queued", "running"),
        ("queued", "cancelled"),
        ("running", "queued"),
        ("running", "succeeded"),
        ("running", "failed"),
        ("running", "cancelled"),
    }
)
Wrong = Callable[..., None]

ENDS: Final = frozenset({"succeeded", "failed", "cancelled"})
#: A queued job is rung again at the latest so long after it is due.
RUNG_WITHIN: Final = timedelta(seconds=302)
#: Two looks at one clock in one transaction.
INSTANT: Final = timedelta(milliseconds=50)

#: Where in the report a broken rule is counted; what is not named here counts as `broken_rules`.
FIELDS: Final = {
    "lost": "lost",
    "not ended": "stuck",
    "ended twice": "recorded_twice",
    "accepted twice": "recorded_twice",
    "written by a process that does not hold it": "recorded_twice",
    "effect not applied once": "effects_not_applied_once",
    "callback not applied once": "effects_not_applied_once",
    "delivered after its successor finished": "stale_deliveries",
    "an attempt spent on waiting": "attempts_spent_on_waiting",
}


@dataclass(frozen=True, slots=True)
class Violation:
    rule: str
    job: UUID | None
    said: str

    @property
    def field(self) -> str:
        return FIELDS.get(self.rule, "broken_rules")


@dataclass(frozen=True, slots=True)
class Accepted:
    """What a caller was promised: the job's id, and how it may end."""

    id: UUID
    key: str
    kind: str
    ends: frozenset[str]
    effect: bool = False


@dataclass
class Evidence:
    """Everything a run leaves behind, but for the events, which are many."""

    rows: Mapping[UUID, Row]
    batches: Sequence[tuple[UUID, int, int, int, int]]
    limits: Mapping[str, int]
    accepted: Sequence[Accepted]
    deliveries: Sequence[Delivery]
    #: `accepted twice` and the like, seen while the load ran.
    seen: Sequence[Violation] = field(default_factory=list)


def check(
    evidence: Evidence, events: Iterable[Sequence[Event]], keyed: Iterable[tuple[str, Sequence[Event]]]
) -> list[Violation]:
    found = list(evidence.seen)
    recorded: dict[UUID, tuple[str | None, int]] = {}
    for story in events:
        found += check_story(story)
        recorded[story[-1].job] = (story[-1].now, story[-1].fence or 0)
    for key, changes in keyed:
        found += check_key(key, evidence.limits.get(key, 1), changes)
    found += _check_rows(evidence.rows, recorded)
    found += check_promises(evidence)
    found += _check_consequences(evidence)
    found += _check_outside(evidence)
    return found


# ---- one job's story ----


def check_story(story: Sequence[Event]) -> list[Violation]:
    """The changes of one job, from the first to the last."""
    found: list[Violation] = []

    def wrong(rule: str, event: Event, said: str = "") -> None:
        found.append(Violation(rule, event.job, f"{event.kind} by {event.writer or '?'}: {said}".rstrip(": ")))

    holder: str | None = None
    ended = 0
    before: Event | None = None
    for event in story:
        if before is None:
            if event.was is not None or event.now != "queued" or event.fence != 0 or event.attempt != 0:
                wrong("a beginning that is none", event, f"{event.was} → {event.now}, fence {event.fence}")
        elif (event.was, event.fence_was) != (before.now, before.fence):
            wrong(
                "a gap in the history", event, f"{before.now} {before.fence}, then from {event.was} {event.fence_was}"
            )
        before = event
        if event.now is None:
            if event.was not in ENDS:
                wrong("lost", event, f"deleted while {event.was}")
            continue
        if event.was is not None and event.was != event.now and (event.was, event.now) not in EDGES:
            wrong("an edge that does not exist", event, f"{event.was} → {event.now}")
        if event.now in ENDS and event.was != event.now:
            ended += 1
        if event.was in ENDS and (event.now != event.was or event.fence != event.fence_was):
            wrong("ended twice", event, f"{event.was} → {event.now}")
        _check_fence(event, wrong)
        _check_columns(event, wrong)
        if event.kind == "claimed":
            holder = event.writer
            _check_claim(event, wrong)
        elif event.was == "running":
            _check_hold(event, holder, wrong)
    if ended > 1:
        wrong("ended twice", story[-1], f"{ended} ends")
    return found


def _check_fence(event: Event, wrong: Wrong) -> None:
    if event.was is None or event.fence is None or event.fence_was is None:
        return
    rise = event.fence - event.fence_was
    if event.kind == "claimed" and rise != 1:
        wrong("a claim that does not raise the fence by one", event, f"{event.fence_was} → {event.fence}")
    if event.kind != "claimed" and rise:
        wrong("a fence that moves without a claim", event, f"{event.fence_was} → {event.fence}")


def _check_columns(event: Event, wrong: Wrong) -> None:
    if (event.now == "running") != (event.worker is not None) or (event.now == "running") != (event.lease is not None):
        wrong("running without holder or lease, or the reverse", event)
    if (event.now == "queued") != (event.wake_at is not None):
        wrong("waiting without an end, or the reverse", event)
    if (event.now in ENDS) != bool(event.finished):
        wrong("ended without a time, or the reverse", event)
    if (
        event.now == "queued"
        and event.wake_at
        and event.run_at
        and event.wake_at > max(event.run_at, event.at) + RUNG_WITHIN
    ):
        wrong("not to be rung for too long", event, f"until {event.wake_at:%T}")
    if event.now == "queued" and event.was == "running" and event.cancel:
        wrong("cancelled, and waits again", event)
    if (event.now == "running" and event.key is not None) != (event.slot is not None):
        wrong("a key without a slot, or the reverse", event)


def _check_claim(event: Event, wrong: Wrong) -> None:
    if event.attempt != (event.attempt_was or 0) + 1:
        wrong("a claim that does not count as an attempt", event, f"{event.attempt_was} → {event.attempt}")
    if event.run_at and event.run_at > event.at + INSTANT:
        wrong("claimed before its time", event, f"{(event.run_at - event.at).total_seconds():.3f} s early")
    if event.cancel:
        wrong("claimed after it was cancelled", event)


def _check_hold(event: Event, holder: str | None, wrong: Wrong) -> None:
    crashed = event.crashes != event.crashes_was
    if crashed:
        # A lease that reaches far into the future is one of another clock: over, too.
        if (
            event.lease_was is not None
            and event.lease_was > event.at
            and event.lease_was - event.at < timedelta(minutes=1)
        ):
            wrong(
                "taken from a holder whose lease is not over",
                event,
                f"{(event.lease_was - event.at).total_seconds():.2f} s left",
            )
    elif event.writer != holder and (event.now != "running" or event.lease != event.lease_was):
        wrong("written by a process that does not hold it", event, f"held by {holder}")
    if event.now == "running" and event.worker != event.worker_was:
        wrong("a holder that changes without a claim", event)
    if event.now == "queued":
        given_back = (event.attempt_was or 0) - (event.attempt or 0)
        if event.reason == "retry" and given_back != 0:
            wrong("a failed attempt that does not count", event, f"{event.attempt_was} → {event.attempt}")
        if event.reason != "retry" and given_back != 1:
            wrong("an attempt spent on waiting", event, f"{event.reason}: {event.attempt_was} → {event.attempt}")


# ---- one key's line ----


def check_key(key: str, limit: int, changes: Sequence[Event]) -> list[Violation]:
    """Claims and ends of all jobs with a key, in the order in which they were made under its lock."""
    found = []
    slots: dict[int, UUID] = {}
    running: set[UUID] = set()
    for event in changes:
        if event.now == "running" and event.was != "running":
            if event.slot is not None and event.slot in slots:
                found.append(Violation("two jobs in one slot", event.job, f"{key}: slot {event.slot}"))
            running.add(event.job)
            if event.slot is not None:
                slots[event.slot] = event.job
            if len(running) > limit:
                found.append(
                    Violation("more jobs of a key at once than allowed", event.job, f"{key}: {len(running)} of {limit}")
                )
        elif event.was == "running":
            running.discard(event.job)
            slots = {slot: job for slot, job in slots.items() if job != event.job}
    return found


# ---- the rows at the end ----


def _check_rows(rows: Mapping[UUID, Row], recorded: Mapping[UUID, tuple[str | None, int]]) -> Iterable[Violation]:
    for row in rows.values():
        if recorded.get(row.id) != (row.state, row.fence):
            yield Violation(
                "a row that its history does not lead to", row.id, f"{recorded.get(row.id)}, but {row.state}"
            )
        if row.state not in ENDS:
            yield Violation("not ended", row.id, f"{row.type} is {row.state}")
            continue
        if row.attempts_recorded != row.fence:
            yield Violation("attempts that do not count the claims", row.id, f"{row.attempts_recorded} of {row.fence}")
        if row.state == "succeeded" and row.attempt != row.retries + 1:
            yield Violation(
                "an attempt spent on waiting", row.id, f"{row.attempt} attempts, {row.retries} of them failed"
            )


def check_promises(evidence: Evidence) -> Iterable[Violation]:
    """What callers were told at the door."""
    ids: dict[str, set[UUID]] = {}
    for promise in evidence.accepted:
        ids.setdefault(promise.key, set()).add(promise.id)
        row = evidence.rows.get(promise.id)
        if row is None:
            yield Violation("lost", promise.id, f"{promise.kind} was accepted, and there is no such job")
        elif row.state in ENDS and row.state not in promise.ends:
            yield Violation("ended otherwise than asked", promise.id, f"{promise.kind} {row.state}: {row.error}")
    for key, same in ids.items():
        if len(same) > 1:
            yield Violation("accepted twice", None, f"{key}: {len(same)} jobs")
    keys = Counter(row.idempotency_key for row in evidence.rows.values() if row.idempotency_key)
    for key, count in keys.items():
        if count > 1:
            yield Violation("accepted twice", None, f"{key}: {count} rows")


def _check_consequences(evidence: Evidence) -> Iterable[Violation]:
    """`then` jobs exactly after success, one callback for each end, batches that count right."""
    children: Counter[UUID] = Counter()
    callbacks: Counter[UUID] = Counter()
    ends: dict[UUID, Counter[str]] = {}
    for row in evidence.rows.values():
        if row.parent_id is not None:
            (callbacks if row.type == "deliver_callback" else children)[row.parent_id] += 1
        if row.batch_id is not None:
            ends.setdefault(row.batch_id, Counter())[row.state] += 1
    for row in evidence.rows.values():
        wanted = row.then_jobs if row.state == "succeeded" else 0
        if children[row.id] != wanted:
            yield Violation(
                "a next job missing or too much", row.id, f"{children[row.id]} of {wanted} after it {row.state}"
            )
        wanted = int(row.has_callback and row.state in ENDS)
        if callbacks[row.id] != wanted:
            yield Violation("a callback missing or too much", row.id, f"{callbacks[row.id]} of {wanted}")
    for id_, total, *counts in evidence.batches:
        count = ends.get(id_, Counter())
        if [count["succeeded"], count["failed"], count["cancelled"]] != counts or count.total() != total:
            yield Violation("a batch that miscounts", id_, f"{dict(count)} of {total}, and it says {counts}")


def _check_outside(evidence: Evidence) -> Iterable[Violation]:
    """Effects and callbacks: each applied once, none delivered by an attempt whose successor had finished."""
    applied: Counter[tuple[str, str]] = Counter()
    jobs: dict[str, set[str]] = {}
    for delivery in evidence.deliveries:
        applied[delivery.what, delivery.key] += delivery.applied
        jobs.setdefault(delivery.key, set()).add(delivery.job)
        row = evidence.rows.get(UUID(delivery.key))
        if row is not None and row.finished_at is not None and _is_stale(delivery, row.finished_at, row.fence):
            late = delivery.at - row.finished_at.timestamp()
            yield Violation("delivered after its successor finished", row.id, f"{delivery.what}, {late:.3f} s late")
    for promise in evidence.accepted:
        row = evidence.rows.get(promise.id)
        if promise.effect and row is not None and row.state == "succeeded" and applied["effects", str(row.id)] != 1:
            yield Violation("effect not applied once", row.id, f"{applied['effects', str(row.id)]} times")
    for row in evidence.rows.values():
        if row.type == "deliver_callback" and row.state == "succeeded":
            if applied["callbacks", str(row.id)] != 1:
                yield Violation("callback not applied once", row.id, f"{applied['callbacks', str(row.id)]} times")
            if jobs.get(str(row.id), set()) != {str(row.parent_id)}:
                yield Violation("a callback about another job", row.id, f"{jobs.get(str(row.id))}")


def _is_stale(delivery: Delivery, finished_at: datetime, fence: int) -> bool:
    """A delivery comes before its own attempt's end: what comes after the job's end is an earlier attempt's."""
    return delivery.at > finished_at.timestamp() and (delivery.fence is None or delivery.fence < fence)
