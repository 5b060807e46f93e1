"""What became of everything that was accepted, and whether the targets were kept."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import psycopg

from ops.bench.mixing import letters

#: Of jobs that wait for nothing but a thread, p99 of the time from handing in to the beginning; and of the answer to who hands
#: in. Kommo takes a webhook for lost after 2 s.
PICKUP_P99_MS: Final = 1000.0
ACCEPT_P99_MS: Final = 1000.0
#: Whoever hands in may be this late itself, or it is not the system that is measured.
BEHIND_P99_MS: Final = 100.0
WARM_UP_MINUTES: Final = 5
SPAN_MINUTES: Final = 10
MEMORY_SLACK: Final = 0.03
#: Letters come by chance: in three minutes a few percent more or fewer.
_PLANNED: Final = 0.93

_MISSING: Final = """
select kind, count(*) from accepted a where what = '{what}' and not exists (select from agentflow.{table} t where t.id = a.id)
group by 1"""
_JOBS: Final = """
select a.kind, j.type, j.state, count(*) from accepted a join agentflow.jobs j on j.id = a.id where a.what = 'job'
group by 1, 2, 3"""
_EVENTS: Final = """
select a.kind, coalesce(e.outcome, 'none'), coalesce(h.state, 'no job'), count(*) from accepted a
join agentflow.webhook_events e on e.id = a.id left join agentflow.jobs h on h.id = e.job_id
where a.what = 'event' group by 1, 2, 3"""
_ACTIONS: Final = """
select a.kind, coalesce(j.type, 'none'), coalesce(j.state, 'no job'), count(*) from accepted a
join agentflow.webhook_events e on e.id = a.id left join agentflow.jobs j on j.id = e.action_job_id
where a.what = 'event' and a.kind = any (%s) group by 1, 2, 3"""
_GRAPHS: Final = """
select count(*), count(*) filter (where c.state = 'succeeded') from accepted a
left join agentflow.jobs c on c.parent_id = a.id and c.type = 'extract_graph' where a.kind = 'document with graph'"""
_HANDLED_TWICE: Final = """
select count(*) from (select payload ->> 'event_id' from agentflow.jobs where type = 'handle_webhook'
group by 1 having count(*) > 1) twice"""
#: Each claim of a job has one end, and one of these is its success.
_ENDS: Final = """
select count(*) from agentflow.jobs j left join (
    select job_id, count(*) as ends, count(*) filter (where outcome = 'failed') as failed from agentflow.attempts group by 1
) a on a.job_id = j.id
where j.state = 'succeeded' and (coalesce(a.ends, 0) + 1 <> j.fence or coalesce(a.failed, 0) > 0)"""
_BY_TYPE: Final = "select type, state, count(*) from agentflow.jobs group by 1, 2 order by 1, 2"
_FAILURES: Final = """
select type, coalesce(error ->> 'code', ''), left(max(error ->> 'message'), 200), count(*) from agentflow.jobs
where state = 'failed' group by 1, 2"""
_OUTCOMES: Final = """
select j.type, a.outcome, coalesce(a.error ->> 'code', ''), count(*) from agentflow.attempts a
join agentflow.jobs j on j.id = a.job_id group by 1, 2, 3 order by 4 desc limit 30"""
_RESCUED: Final = "select count(*) from agentflow.jobs where crashes > 0"


def audit(conn: psycopg.Connection[Any], journal: Path, done: Mapping[str, Any]) -> dict[str, Any]:
    """`lost`: every fault in a sentence. `done`: what the outside services counted."""
    conn.execute("create temp table accepted (kind text, what text, id uuid)")
    with conn.cursor() as cursor, cursor.copy("copy accepted from stdin") as copy, journal.open("rb") as lines:
        while block := lines.read(1 << 20):
            copy.write(block)
    conn.execute("create index on accepted (id)")
    conn.execute("analyze accepted")
    lost: list[str] = []
    accepted = dict(conn.execute("select kind, count(*) from accepted group by 1").fetchall())
    doubled = conn.execute("select count(*) - count(distinct id) from accepted").fetchone()
    if doubled and doubled[0]:
        lost.append(f"{doubled[0]} letters were answered with an id that another had")
    for what, table in (("job", "jobs"), ("event", "webhook_events")):
        for kind, count in conn.execute(_MISSING.format(what=what, table=table).encode()).fetchall():
            lost.append(f"{kind}: {count} of {accepted[kind]} were accepted and are not there")
    ended = {kind: {"accepted": count, "succeeded": 0} for kind, count in accepted.items()}
    for kind, type_, state, count in conn.execute(_JOBS).fetchall():
        ended[kind][state] = ended[kind].get(state, 0) + count
        if state in ("queued", "running"):
            lost.append(f"{kind}: {count} jobs ({type_}) are {state} still")
    lost += _events(conn, ended)
    lost += _graphs(conn)
    lost += _effects(accepted, ended, done)
    twice, ends = (conn.execute(query).fetchone() for query in (_HANDLED_TWICE, _ENDS))
    if twice and twice[0]:
        lost.append(f"{twice[0]} events have two jobs that handle them")
    if ends and ends[0]:
        lost.append(f"of {ends[0]} jobs not each claim has one end, or they ended twice")
    rescued = conn.execute(_RESCUED).fetchone()
    rows: dict[str, dict[str, int]] = {}
    for type_, state, count in conn.execute(_BY_TYPE).fetchall():
        rows.setdefault(type_, {})[state] = count
    return {
        "lost": lost,
        "accepted": ended,
        "rows": rows,
        "outside services": dict(done),
        "failures": [list(row) for row in conn.execute(_FAILURES).fetchall()],
        "attempts that did not succeed": [list(row) for row in conn.execute(_OUTCOMES).fetchall()],
        "rescued from dead workers": rescued[0] if rescued else 0,
    }


def _events(conn: psycopg.Connection[Any], ended: dict[str, dict[str, int]]) -> list[str]:
    faults = []
    for kind, outcome, state, count in conn.execute(_EVENTS).fetchall():
        if (outcome, state) == ("done", "succeeded"):
            ended[kind]["succeeded"] += count
        else:
            faults.append(f"{kind}: {count} events have the outcome {outcome}, and their job is {state}")
    for kind, type_, state, count in conn.execute(_ACTIONS, (["bot message", "forwarded event"],)).fetchall():
        ended[kind][f"{type_} {state}"] = count
        if state not in ("succeeded", "failed"):
            faults.append(f"{kind}: {count} events led to {type_} that is {state}")
    return faults


def _effects(accepted: Mapping[str, int], ended: Mapping[str, Mapping[str, int]], done: Mapping[str, Any]) -> list[str]:
    """What was to be done outside was done, and once. A forwarded event may come twice where its answer was lost: it is said."""
    faults = []
    for kind, what in (("note", "notes"), ("render", "renders"), ("forwarded event", "forwarded")):
        wanted = ended.get(kind, {}).get("succeeded", 0)
        if done.get(what, 0) < wanted:
            faults.append(
                f"{kind}: {wanted} of {accepted.get(kind)} are done by their rows, and {done.get(what)} outside"
            )
    faults += [
        f"{what.partition('_')[0]}: {done[what]} were done twice"
        for what in ("notes_twice", "renders_twice")
        if done.get(what)
    ]
    return faults


def _graphs(conn: psycopg.Connection[Any]) -> list[str]:
    """Documents whose graph was asked for have a job that extracted it."""
    row = conn.execute(_GRAPHS).fetchone()
    missing = row[0] - row[1] if row else 0
    return [f"document with graph: {missing} of {row[0]} graphs were not made"] if row and missing else []


# ---- targets ----


def verdict(figures: Mapping[str, Any]) -> dict[str, Any]:
    """`kept`: by target. `grown`: what is larger in the end, with its medians; None where the run was too short for that."""
    samples, load = figures["samples"], figures["load"]
    audit_ = figures.get("audit") or {}
    pickups = {each["minute"]: each["jobs"]["short_pickup_ms"] for each in samples if "jobs" in each}
    accepts = {each["minute"]: each["accept_ms"] for each in load}
    unsent = sum(each["unsent"] + sum(each["given_up"].values()) for each in load)
    behind = [each["minute"] for each in load if each["behind_ms"] and each["behind_ms"]["p99"] > BEHIND_P99_MS]
    grown = memory(samples)
    failed = {type_: states["failed"] for type_, states in audit_.get("rows", {}).items() if states.get("failed")}
    return {
        "kept": {
            "nothing lost": bool(audit_ and audit_["accepted"]) and not audit_["lost"],
            "as much was handed in as was planned": sum(each["jobs"] for each in load) >= _PLANNED * figures["planned"],
            "no job failed": bool(audit_) and not failed,
            "memory is flat": None if grown is None else not any(each["grown"] for each in grown.values()),
            f"pick-up of short jobs, p99 below {PICKUP_P99_MS:g} ms in every minute": _all_below(
                pickups, PICKUP_P99_MS
            ),
            f"answer to who hands in, p99 below {ACCEPT_P99_MS:g} ms in every minute": _all_below(
                accepts, ACCEPT_P99_MS
            ),
            "who hands in was on time": not behind,
            "every letter was taken in": not unsent,
        },
        "worst": {"pick-up": _worst(pickups), "answer": _worst(accepts)},
        "minutes in which the load was late by itself": behind,
        "memory": grown,
    }


def memory(samples: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]] | None:
    """The first ten minutes after the warm-up beside the last ten, of the product's own processes that last. Grown is what has
    grown by both measures: shares of libraries' pages rise when a neighbour goes."""
    warm = [each for each in samples if each["minute"] >= WARM_UP_MINUTES and "processes" in each]
    if len(warm) < 2 * SPAN_MINUTES:
        return None
    found = {}
    for role in warm[-1]["processes"]:
        if not role.startswith(("web", "scheduler", "worker")) or "children" in role or "encoder" in role:
            continue
        one: dict[str, Any] = {}
        for measure in ("pss_mb", "filled_mb"):
            values = [each["processes"][role][measure] for each in warm if role in each["processes"]]
            start, end = statistics.median(values[:SPAN_MINUTES]), statistics.median(values[-SPAN_MINUTES:])
            one[measure] = {"start": start, "end": end, "most": max(values)}
        one["grown"] = all(part["end"] > part["start"] * (1 + MEMORY_SLACK) for part in one.values())
        found[role] = one
    return found


def _all_below(by_minute: Mapping[int, Mapping[str, float] | None], most: float) -> bool:
    return bool(by_minute) and all(each is None or each["p99"] <= most for each in by_minute.values())


def _worst(by_minute: Mapping[int, Mapping[str, float] | None]) -> dict[str, Any] | None:
    found = [(each["p99"], minute) for minute, each in by_minute.items() if each is not None]
    return {"minute": max(found)[1], "p99_ms": max(found)[0]} if found else None


def table(figures: Mapping[str, Any]) -> list[str]:
    """Lines for people."""
    said = [f"{'kind':22} {'accepted':>9}  ended"]
    for kind in letters.KINDS:
        if (each := (figures.get("audit") or {}).get("accepted", {}).get(kind.name)) is not None:
            ends = ", ".join(f"{count} {state}" for state, count in each.items() if state != "accepted")
            said.append(f"{kind.name:22} {each['accepted']:>9}  {ends}")
    for name, value in figures["verdict"]["kept"].items():
        said.append(f"{name:66} {'too short to tell' if value is None else 'kept' if value else 'NOT KEPT'}")
    said += [f"LOST: {each}" for each in (figures.get("audit") or {}).get("lost", ["the run did not come to its end"])]
    for name, each in figures["verdict"]["worst"].items():
        said.append(f"worst p99 of {name}: {each}")
    for role, each in (figures["verdict"]["memory"] or {}).items():
        parts = [
            f"{m} {each[m]['start']:.1f} → {each[m]['end']:.1f}, most {each[m]['most']:.1f}"
            for m in ("pss_mb", "filled_mb")
        ]
        said.append(f"{role:22} {'; '.join(parts)}{'  GREW' if each['grown'] else ''}")
    return said
