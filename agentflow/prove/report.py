"""The figures of a run.

Counts of what must not be: lost, stuck, recorded_twice, effects_not_applied_once, stale_deliveries, attempts_spent_on_waiting,
broken_rules, unexpected_errors, protocol_errors, slow_recoveries; all of them 0 when all is well. `weak` lists why a run says
too little to mean anything.
"""

from __future__ import annotations

import json
import os
import platform
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import agentflow
from agentflow.prove import history, plan
from agentflow.prove.checker import FIELDS, Evidence, Violation
from agentflow.prove.faults import Fault, Faults
from agentflow.prove.plan import Options

#: A killed worker's jobs run again within the lease and this; other parts are well again within the second.
RERUN_PAST_LEASE_S: Final = 5.0
RECOVERED_WITHIN_S: Final = 60.0
_EXAMPLES: Final = 20
#: Said at level error in the ordinary course of things under fire: a job that failed as asked, a broker that is away.
_EXPECTED_ERRORS: Final = ("out of attempts", "a job does not stop")

#: What was raised, in the text of a traceback; Postgres adds lines of its own below it.
_RAISED: Final = re.compile(r"^(?!DETAIL|CONTEXT|HINT|LINE)[A-Za-z_][\w.]*: .*$", re.MULTILINE)

OK, WRONG, WEAK = "ok", "wrong", "weak"


def make(
    options: Options,
    conn: history.Connection,
    *,
    began: datetime,
    ended: datetime,
    quiet_s: float,
    evidence: Evidence,
    violations: Sequence[Violation],
    faults: Faults,
    tier: str,
    unanswered: int,
    unsent: int,
    protocol_errors: Sequence[str],
) -> dict[str, Any]:
    start = began.timestamp()
    ends = [moment.timestamp() for moment in history.successes(conn)]
    hurts = sorted(faults.done, key=lambda fault: fault.began)
    broker = plan.LANES["rabbitmq" if tier == "RabbitMQ" else "redis"]
    recovered = [recovery(fault, hurts, broker, ends, _victims(conn, fault)) for fault in hurts]
    slow = [r for r in recovered if not in_time(r, options.lease_s)]
    errors = unexpected_errors(options.out / "logs")
    counted = Counter(violation.field for violation in violations)
    wrong = {name: counted[name] for name in dict.fromkeys([*FIELDS.values(), "broken_rules"])}
    wrong |= {
        "unexpected_errors": sum(errors.values()),
        "protocol_errors": len(protocol_errors),
        "slow_recoveries": len(slow),
    }
    states = Counter(row.state for row in evidence.rows.values())
    minutes = (ended - began).total_seconds() / 60
    per_minute = sum(1 for row in evidence.rows.values() if row.state != "queued") / max(minutes, 1e-9)
    kinds = Counter(fault.kind for fault in hurts if not _failed(fault))
    weak = weakness(options, per_minute, kinds, faults.kinds)
    verdict = WRONG if any(wrong.values()) else WEAK if weak else OK
    return {
        "verdict": verdict,
        "version": agentflow.__version__,
        "seed": options.seed,
        "minutes": options.minutes,
        "tier": tier + (" cluster of three" if options.cluster else ""),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "load_average": round(os.getloadavg()[1], 1),
        "lease_s": options.lease_s,
        "began": began.isoformat(timespec="seconds"),
        "accepted": len({promise.id for promise in evidence.accepted}),
        "requests_never_answered": unanswered,
        "requests_left_out": unsent,
        "jobs": len(evidence.rows),
        "jobs_per_minute": round(per_minute),
        "finished": {state: states[state] for state in ("succeeded", "failed", "cancelled")},
        "claims": sum(row.fence for row in evidence.rows.values()),
        "events": history.last_event(conn),
        "deliveries": len(evidence.deliveries),
        "applied": sum(delivery.applied for delivery in evidence.deliveries),
        "quiet_after_s": round(quiet_s, 1),
        "wrong": wrong,
        "violations": by_rule(violations),
        "unexpected_errors": dict(errors.most_common(_EXAMPLES)),
        "protocol_errors": list(protocol_errors[:_EXAMPLES]),
        "weak": weak,
        "faults": {kind: kinds[kind] for kind in plan.FAULTS if kind in faults.kinds},
        "faults_not_to_be_had": faults.unavailable,
        "slowest_recovery_s": _slowest(recovered),
        "kills": {
            "with_victims": sum(r["taken_s"] is not None for r in recovered),
            "taken_undisturbed": sum(r["taken_s"] is not None and "taken_s" not in r["disturbed"] for r in recovered),
            "rerun_undisturbed": sum(r["rerun_s"] is not None and "rerun_s" not in r["disturbed"] for r in recovered),
        },
        "slow_recoveries": [_from(r, start) for r in slow],
        "throughput_per_s": _throughput(ends, start),
        "history": [_from(r, start) for r in recovered],
    }


def _failed(fault: Fault) -> bool:
    """It could not be done; then it does not count as one that was."""
    return fault.note is not None and fault.note[0] not in "+-"


# ---- recoveries ----


def _victims(conn: history.Connection, fault: Fault) -> tuple[dict[UUID, float], dict[UUID, float]]:
    """When (Unix time) the jobs that ran in what was killed were taken from it, and when they ran again. A job whose end was
    on its way needed neither, and is not named."""
    if not fault.victims:
        return {}, {}
    found = conn.execute(
        "select v.id, extract(epoch from t.at)::float8, extract(epoch from r.at)::float8"
        " from unnest(%s::uuid[], %s::integer[]) v(id, fence)"
        " join lateral (select min(at) as at from prove.events e where e.job = v.id and e.fence = v.fence and e.was = 'running'"
        "  and e.now = 'queued' and e.crashes > e.crashes_was) t on t.at is not null"
        " left join lateral (select min(at) as at from prove.events e where e.job = v.id and e.fence = v.fence + 1"
        "  and e.was = 'queued' and e.now = 'running') r on true",
        ([id_ for id_, _ in fault.victims], [fence for _, fence in fault.victims]),
    ).fetchall()
    return {row[0]: row[1] for row in found}, {row[0]: row[2] for row in found if row[2] is not None}


def recovery(
    fault: Fault,
    others: Sequence[Fault],
    broker: Sequence[str],
    ends: Sequence[float],
    victims: tuple[Mapping[UUID, float], Mapping[UUID, float]] = ({}, {}),
) -> dict[str, Any]:
    """How long a fault was felt.

    `recovered_s`: from the part's return to the first success. `taken_s`, `rerun_s`: from a worker's death until the last of
    its jobs was taken from it, and ran again. Where a part that this needs (the table for all; for a rerun the `broker`, too)
    was away meanwhile, by another fault, it is counted from that part's return, and `disturbed` names what it was.
    """
    back = fault.back or fault.began
    others = [other for other in others if other is not fault]
    table = [other for other in others if other.kind in plan.STOPS_THE_TABLE]
    needed = [*table, *(other for other in others if other.kind in broker and other not in table)]
    first = next((moment for moment in ends if moment >= back), None)
    taken, rerun = (max(moments.values(), default=None) for moments in victims)
    disturbed = []
    found: dict[str, Any] = {
        "kind": fault.kind,
        "began": fault.began,
        "back": back,
        "down_s": round(back - fault.began, 2),
        "victims": len(fault.victims) or None,
        "note": fault.note,
    }
    for name, since, end, need in (
        ("recovered_s", back, first, needed),
        ("taken_s", fault.began, taken, table),
        ("rerun_s", fault.began, rerun, needed),
    ):
        away = [o for o in need if end is not None and o.began <= end and (o.back or o.began) >= since]
        if away:
            disturbed.append(name)
        since = max([since, *(o.back for o in away if o.back and end and o.back <= end)])
        found[name] = round(end - since, 2) if end is not None else None
    return {**found, "disturbed": disturbed}


def in_time(recovery: Mapping[str, Any], lease_s: float) -> bool:
    # None: nothing was left to do by then, or nothing was done, which is counted as stuck.
    if recovery["recovered_s"] is not None and recovery["recovered_s"] > RECOVERED_WITHIN_S:
        return False
    for name in ("taken_s", "rerun_s"):
        most_s = RECOVERED_WITHIN_S if name in recovery["disturbed"] else RERUN_PAST_LEASE_S
        if recovery[name] is not None and recovery[name] > lease_s + most_s:
            return False
    return True


def _slowest(recovered: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for name in ("recovered_s", "taken_s", "rerun_s"):
        for recovery in recovered:
            if recovery[name] is not None:
                kind = found.setdefault(recovery["kind"], {})
                kind[name] = max(kind.get(name, 0.0), recovery[name])
    return dict(sorted(found.items()))


def _from(recovery: Mapping[str, Any], start: float) -> dict[str, Any]:
    """With its times in seconds from the beginning."""
    return {**recovery, "began": round(recovery["began"] - start, 2), "back": round(recovery["back"] - start, 2)}


def _throughput(ends: Sequence[float], start: float) -> list[int]:
    """Jobs that succeeded in each second from the beginning."""
    counts = Counter(int(moment - start) for moment in ends if moment >= start)
    return [counts[second] for second in range(max(counts, default=-1) + 1)]


# ---- what else is counted ----


def weakness(options: Options, per_minute: float, kinds: Mapping[str, int], possible: Sequence[str]) -> list[str]:
    found = []
    if per_minute < plan.ENOUGH_JOBS_PER_MINUTE:
        found.append(f"{per_minute:.0f} jobs a minute; {plan.ENOUGH_JOBS_PER_MINUTE} are needed")
    enough = int(plan.ENOUGH_OF_A_KIND_IN_10_MIN * options.minutes / 10)
    found += [
        f"{kind} only {kinds.get(kind, 0)} times; {enough} are needed"
        for kind in possible
        if kinds.get(kind, 0) < enough
    ]
    return found


def by_rule(violations: Sequence[Violation]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for violation in violations:
        rule = found.setdefault(violation.rule, {"count": 0, "counted_as": violation.field, "examples": []})
        rule["count"] += 1
        if len(rule["examples"]) < _EXAMPLES:
            rule["examples"].append({"job": str(violation.job) if violation.job else None, "said": violation.said})
    return found


def unexpected_errors(logs: Path) -> Counter[str]:
    """What the processes logged at level error or critical, by its text."""
    found: Counter[str] = Counter()
    for path in logs.glob("*.log"):
        with path.open(errors="replace") as lines:
            for line in lines:
                if '"level": "error"' not in line and '"level": "critical"' not in line:
                    continue
                try:
                    record = json.loads(line)
                except ValueError:
                    continue  # cut off by its writer's death
                event = str(record.get("event", ""))
                if not event.startswith(_EXPECTED_ERRORS):
                    said = _RAISED.findall(str(record.get("exception", "")))[-1:]
                    found[" – ".join([path.stem, event[:200], *(text[:200] for text in said)])] += 1
    return found
