"""What a waiting job waits for: a thread of the queue, its organization's share of them, caps, its key's slots. Each is computed
by itself from the picture of the queue; the last one to come decides when it starts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from datetime import UTC, timedelta
from typing import Final

from agentflow.jobs import callbacks, registry, rules
from agentflow.jobs.estimates import RESOLUTION_S, Durations, Lane, free_after, turns_before
from agentflow.jobs.model import PRIORITIES, Job
from agentflow.jobs.standing import LATELY_S, KeyLine, Picture, Place, RunningJob
from agentflow.settings import Settings

#: The least that a job is taken to cost: a lane's cost divides.
_LEAST_COST_S: Final = 0.0001
#: Of adding those that come during the wait, which makes the wait longer: where more come than go it has no end.
_ROUNDS: Final = 8


class Waits:
    """Of one job, in the order of the methods. `busy`: something beside the queue's threads holds it now."""

    def __init__(self, picture: Picture, durations: Mapping[str, Durations], job: Job, place: Place) -> None:
        self._picture = picture
        self._durations = durations
        self._job = job
        self._place = place
        self._priority = PRIORITIES.index(job.priority)
        self._waits_s: list[float | None] = []
        self.busy = False
        self.before = self._for_a_thread()

    def start_s(self) -> float | None:
        """Seconds until it starts. None: nobody serves its queue, or nothing is known of how long those before it take."""
        if any(wait_s is None for wait_s in self._waits_s):
            return None
        return max(self._place.due_in_s, *(wait_s or 0.0 for wait_s in self._waits_s))

    def for_share(self) -> None:
        """Where several organizations share the threads, none gets all."""
        if self._picture.share < 1:
            allowed = max(1, math.floor(self._picture.share * self._picture.threads[1]))
            self._for_slots(allowed, lambda r: r.here and r.organization_id == self._job.organization_id)

    def for_rules(self, now: rules.Rules) -> None:
        """The caps of running jobs, of the organization and of the type."""
        job = self._job
        if (cap := now.cap_of(job.organization_id, "")) is not None:
            self._for_slots(cap, lambda r: r.organization_id == job.organization_id)
        if (cap := now.cap_of(job.organization_id, job.type)) is not None:
            self._for_slots(cap, lambda r: (r.organization_id, r.type) == (job.organization_id, job.type), job.type)

    def for_budget(self, now: rules.Rules) -> None:
        """Of the organization, until midnight UTC."""
        if over_budget(self._job, now, self._place):
            midnight = (self._place.at.astimezone(UTC) + timedelta(days=1)).replace(
                hour=0, minute=0, second=0, microsecond=0
            )
            self._waits_s.append((midnight - self._place.at).total_seconds())

    def for_processes(self, settings: Settings) -> None:
        """A type of which a process runs only so many at once."""
        limit = registry.get(self._job.type).process_limit if registry.known(self._job.type) else None
        if limit is not None and self._picture.workers:
            slots = self._picture.workers * limit(settings)
            self._for_slots(slots, lambda r: r.here and r.type == self._job.type, self._job.type)

    def for_key(self, line: KeyLine) -> None:
        key = self._job.concurrency_key
        held = [r for r in self._picture.running if r.concurrency_key == key]
        if not line.slots:  # for now, and nobody knows until when
            self.busy = True
            self._waits_s.append(None)
            return
        self._add(line.slots, held, line.ahead, self._work_s(line.ahead, line.types))

    def _for_a_thread(self) -> float | None:
        """Until a thread of the queue is free for it. Returns how many jobs of all organizations go first."""
        picture, place = self._picture, self._place
        threads = picture.threads[self._priority] * (picture.in_use or 1.0)
        work_s = self._work_s(place.ahead, place.types)
        lanes = None if place.sent else self._lanes(work_s)
        sent = 0 if place.sent else sum(picture.sent.values())
        sent_s = self._work_s(sent, picture.sent)
        left_s = [self._left_s(r) for r in picture.running if r.here]
        ahead, wait_s = float(place.ahead), 0.0
        # While it waits more come, whose turn may be before its own: as many as came lately, in as long a time, and beyond that
        # nothing is known.
        for _ in range(_ROUNDS):
            if lanes is not None:
                mine, others = lanes
                ahead, work_s = turns_before(mine, place.ahead, [lane.after(min(wait_s, LATELY_S)) for lane in others])
            before, before_s = ahead + sent, None if work_s is None or sent_s is None else work_s + sent_s
            if not threads or (before and before_s is None):
                self._waits_s.append(None)
                return before
            earlier_s, wait_s = wait_s, free_after(threads, left_s, before, before_s or 0.0)
            if lanes is None or wait_s - earlier_s < RESOLUTION_S:
                break
        self._waits_s.append(wait_s)
        return before

    def _lanes(self, work_s: float | None) -> tuple[Lane, list[Lane]] | None:
        """This job's own and the others'. None: nothing is known of what their jobs take."""
        here = (self._priority, self._job.organization_id)
        own = next((w for w in self._picture.lanes if (w.priority, w.organization_id) == here), None)
        cost_s = work_s / self._place.ahead if work_s and self._place.ahead else own.cost_s if own else None
        cost_s = cost_s or self._usual_s()
        if cost_s is None:
            return None
        others = [
            Lane(
                w.organization_id,
                w.priority,
                w.jobs,
                max(_LEAST_COST_S, w.cost_s or cost_s),
                w.virtual_s,
                w.weight,
                w.per_s,
            )
            for w in self._picture.lanes
            if (w.priority, w.organization_id) != here
        ]
        virtual_s = own.virtual_s if own else min((lane.virtual_s for lane in others), default=0.0)
        mine = Lane(
            here[1], here[0], self._place.ahead, max(_LEAST_COST_S, cost_s), virtual_s, own.weight if own else 1.0
        )
        return mine, others

    def _for_slots(self, slots: int, holds: Callable[[RunningJob], bool], type_: str | None = None) -> None:
        """Until fewer than `slots` of those run that it shares them with; before it in its line are more of them."""
        place = self._place
        known = sum(place.types.values())
        types = {t: n for t, n in place.types.items() if type_ is None or t == type_}
        ahead = place.ahead * sum(types.values()) / known if known else 0.0
        if place.sent:
            ahead = 0.0  # those that were sent are of all organizations
        self._add(slots, [r for r in self._picture.running if holds(r)], ahead, self._work_s(ahead, types))

    def _add(self, slots: int, held: list[RunningJob], ahead: float, work_s: float | None) -> None:
        self.busy = self.busy or len(held) >= slots
        if ahead and work_s is None:
            self._waits_s.append(None)
        else:
            self._waits_s.append(free_after(slots, [self._left_s(r) for r in held], ahead, work_s or 0.0))

    def _left_s(self, running: RunningJob) -> float:
        known = self._durations.get(running.type)
        # A type that never ended yet has, for all that is known, as long to go again.
        return known.left(running.elapsed_s, running.progress) if known else max(0.0, running.elapsed_s)

    def _work_s(self, jobs: float, types: Mapping[str, int]) -> float | None:
        """Of so many jobs, of which the first are of these types. None: nothing is known of any of them."""
        if not jobs:
            return 0.0
        usual_s = self._usual_s()
        known = [(n, self._durations[t].mean if t in self._durations else usual_s) for t, n in types.items()]
        of_all = [(n, mean) for n, mean in known if mean is not None]
        if not of_all:
            return None
        return jobs * sum(n * mean for n, mean in of_all) / sum(n for n, _ in of_all)

    def _usual_s(self) -> float | None:
        means = [known.mean for known in self._durations.values()]
        return sum(means) / len(means) if means else None


def over_budget(job: Job, now: rules.Rules, place: Place) -> bool:
    """Who is told of an end waits for no budget, once somebody was rung for it."""
    return job.organization_id in now.over_budget and not (place.sent and job.type == callbacks.TYPE)


def reason_of(job: Job, now: rules.Rules, place: Place, picture: Picture, *, busy: bool) -> str:
    """Why a queued job waits: what is in force now comes before what its row says it was parked for."""
    if now.pause_of(job.organization_id, job.queue, job.type) is not None:
        return "paused"
    if place.due_in_s > 0:
        return job.wait_reason or "scheduled"
    if job.wait_reason is not None and not place.sent and place.rung_in_s > 0:
        return job.wait_reason
    if over_budget(job, now, place):
        return "budget"
    if not picture.workers:
        return "unserved"
    return "busy" if busy else "due"
