"""`agentflow jobs …`, `queues`, `ping`: on the database itself, so that they work without a web process."""

from __future__ import annotations

import dataclasses
import json
import statistics as numbers
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final, cast
from uuid import UUID

from rich.markup import escape

from agentflow import traces
from agentflow.cli import output
from agentflow.cli.direct import connected
from agentflow.cli.errors import USAGE, Failure, one_line
from agentflow.jobs import lines, records, registry, requests, statistics
from agentflow.jobs.estimates import Estimate
from agentflow.jobs.model import Attempt, Job, State
from agentflow.jobs.requests import NewJob
from agentflow.outlook import Outlook
from agentflow.system import System

#: Whose jobs are submitted and cancelled here. The operator's organization, as over HTTP with the operator's key.
_ORGANIZATION: Final = 1
_SHOWN_CHARACTERS: Final = 2000
_REASONS: Final = {
    "due": "its turn",
    "busy": "others that may not run with it to end",
    "scheduled": "its time",
    "retry": "its next try",
    "limit": "a limit of calls",
    "budget": "the next day's budget",
    "paused": "somebody to resume it (`agentflow rules`)",
    "memory": "room in a worker's memory",
    "large": "a worker with more memory (`agentflow worker -Q large`)",
    "unserved": "a worker: none serves its queue",
}


def list_jobs(state: str | None, type_: str | None, limit: int, as_json: bool) -> None:
    with connected() as system, system.database.connection() as conn:
        wanted = records.Filter(state=cast(State, state) if state else None, type=type_)
        found = records.search(conn, records.EVERY_ORGANIZATION, wanted, limit=limit)
    if as_json:
        for job in found:
            print(json.dumps(_plain(job), default=str))
        return
    rows = [
        (job.id, job.type, _state(job), f"{job.attempt}/{job.max_attempts}", output.ago(job.created_at), _note(job))
        for job in found
    ]
    if rows:
        output.console().print(output.table(("id", "type", "state", "attempt", "created", ""), rows))
    else:
        print("no jobs" + (" like that" if state or type_ else " yet"))


def show(job_id: str, as_json: bool) -> None:
    with connected() as system, system.database.connection() as conn:
        job = _find(system, job_id)
        outlook = system.outlooks.of(job)
        attempts = records.attempts(conn, job.id, job.organization_id)
        children = records.children(conn, job.id, job.organization_id)
        parent = records.get(conn, None, job.parent_id) if job.parent_id else None
    if as_json:
        document = _plain(job) | {
            "attempts": [dataclasses.asdict(a) for a in attempts],
            "children": [{"id": c.id, "type": c.type, "state": c.state} for c in children],
            "outlook": dataclasses.asdict(outlook) if outlook is not None else None,
        }
        output.print_json(document)
        return
    console = output.console()
    console.print(f"[bold]{escape(job.type)}[/bold] {job.id}: {_state(job)}")
    for name, value in _facts(job, outlook, parent, children):
        console.print(f"  {name:<12} {escape(str(value))}", soft_wrap=True)
    if attempts:
        console.print("\n[bold]attempts[/bold]")
        rows = [
            (a.attempt, a.outcome, output.ago(a.started_at), _took(a), _used(a), _message(a.error)) for a in attempts
        ]
        console.print(output.table(("attempt", "outcome", "started", "took", "used", ""), rows))
    for name, content in (("payload", job.payload), ("result", job.result), ("error", job.error)):
        if content:
            console.print(f"\n[bold]{name}[/bold]")
            console.print(_shortened(content), markup=False, soft_wrap=True)


def logs(job_id: str, level: str, as_json: bool) -> None:
    with connected() as system, system.database.connection() as conn:
        found = lines.of(conn, _find(system, job_id), least=cast(lines.Level, level))
    if as_json:
        for line in found:
            said = {**dataclasses.asdict(line), "level": line.level_name}
            print(json.dumps({name: said[name] for name in said if name not in ("place", "bytes")}, default=str))
        return
    console = output.console()
    for line in found:
        fields = " ".join(f"{name}={value}" for name, value in line.fields.items() if name != "exception")
        text = f"{line.at:%Y-%m-%d %H:%M:%S} {line.level_name:<8} {line.attempt}  {line.message}  {fields}".rstrip()
        console.print(text, markup=False, soft_wrap=True)
        if "exception" in line.fields:
            console.print(str(line.fields["exception"]).rstrip(), markup=False, soft_wrap=True)
    if not found:
        print("its code has logged nothing" + (f" of level {level} or above" if level != "info" else ""))


def cancel(job_id: str) -> None:
    with connected() as system:
        job = _find(system, job_id)
        state = system.cancel(job.organization_id, job.id)
    if state in ("succeeded", "failed"):
        raise Failure(f"job {job_id} has ended already: it {state}")
    print("cancelled" if state == "cancelled" else "it is running and was told to stop")


def retry(job_id: str) -> None:
    import actors  # noqa: F401 - fills the registry, by which the payload is checked again

    with connected() as system:
        job = _find(system, job_id)
        try:
            with system.transaction() as transaction:
                submitted = records.retry(transaction.conn, job, max_payload_bytes=system.settings.job_payload_bytes)
                transaction.rings.extend(submitted.rings)
        except (records.NotRetryable, requests.InvalidJob, registry.UnknownType) as error:
            raise Failure(str(error)) from None
        print(submitted.job.id)


def submit(type_: str, payload: str, wait: bool) -> None:
    import actors  # noqa: F401 - fills the registry

    try:
        value = json.loads(payload)
    except ValueError as error:
        raise Failure(f"the payload is not JSON: {error}", USAGE) from None
    if not isinstance(value, dict):
        raise Failure('the payload must be a JSON object, such as {"sleep_ms": 100}', USAGE)
    with connected() as system:
        try:
            job = system.submit(_ORGANIZATION, NewJob(type_, value), public_only=True).job
        except (requests.InvalidJob, registry.UnknownType) as error:
            raise Failure(str(error), USAGE) from None
        print(job.id)
        if not wait:
            return
        ended = _ended(system, job)
    print(ended.state)
    if ended.result is not None:
        print(_shortened(ended.result))
    if ended.state != "succeeded":
        raise Failure(_message(ended.error) or f"the job was {ended.state}")


def queues(as_json: bool) -> None:
    with connected() as system, system.database.connection() as conn:
        found, workers, lately = statistics.queues(conn), statistics.workers(conn), statistics.lately(conn)
    if as_json:
        output.print_json(
            {
                "queues": [dataclasses.asdict(q) for q in found],
                "workers": [dataclasses.asdict(w) for w in workers],
                "lately": dataclasses.asdict(lately),
            }
        )
        return
    console = output.console()
    rows = [
        (
            q.name,
            q.due,
            ", ".join(f"{number} {reason}" for reason, number in q.parked.items()) or 0,
            q.running,
            output.duration(q.oldest_due_age_s) if q.oldest_due_age_s is not None else None,
            q.workers,
            q.threads,
        )
        for q in found
    ]
    right = ("due", "running", "oldest due", "workers", "threads")
    console.print(
        output.table(("queue", "due", "parked", "running", "oldest due", "workers", "threads"), rows, right=right)
    )
    if workers:
        staff = [
            (
                w.kind,
                f"{w.host}:{w.pid}",
                f"{w.busy}/{w.threads}",
                output.size(w.memory_bytes) if w.memory_bytes else None,
                ",".join(w.queues),
                output.ago(w.seen_at),
            )
            for w in workers
        ]
        console.print()
        console.print(output.table(("worker", "process", "busy", "memory", "queues", "seen"), staff))
        if missing := unserved(found):
            console.print(f"\nno worker serves {missing}")
    else:
        console.print("\nno worker runs: jobs wait until `agentflow up` or `dramatiq actors` does")
    ended = ", ".join(f"{number} {state}" for state, number in lately.ended.items() if number) or "none ended"
    console.print(f"\nin the last {lately.seconds // 60} minutes: {lately.created} handed in, {ended}")


def unserved(queues: Sequence[statistics.Queue]) -> str:
    """The queues that have a type of job, or hold one, and no worker; empty when there is none."""
    import actors  # noqa: F401 - fills the registry

    said = []
    for queue in queues:
        types = sorted(t.name for t in registry.every() if t.queue == queue.name)
        waiting = queue.due + sum(queue.parked.values())
        if queue.workers == 0 and (types or waiting):
            said.append(f"{queue.name} ({', '.join([*types, f'{waiting} waiting'])})")
    return ", ".join(said)


def ping(count: int, timeout_s: float) -> None:
    import actors  # noqa: F401 - fills the registry

    took_ms: list[float] = []
    with connected() as system:
        for number in range(1, count + 1):
            began = time.monotonic()
            job = system.submit(_ORGANIZATION, NewJob("ping", {})).job
            ended: Job | None = job
            while ended is not None and not ended.terminal and (left := began + timeout_s - time.monotonic()) > 0:
                ended = system.wait_finished(ended, left)
            if ended is None or not ended.terminal:
                raise Failure(_no_answer(system, job, timeout_s))
            if ended.state != "succeeded":
                raise Failure(f"ping {number} {ended.state}: {_message(ended.error)}")
            took_ms.append((time.monotonic() - began) * 1000)
            print(f"ping {number}: {took_ms[-1]:.1f} ms", flush=True)
    print(f"{count} of {count} answered; median {numbers.median(took_ms):.1f} ms, longest {max(took_ms):.1f} ms")


def _no_answer(system: System, job: Job, timeout_s: float) -> str:
    system.cancel(job.organization_id, job.id)
    with system.database.connection() as conn:
        threads = sum(q.threads for q in statistics.queues(conn) if q.name == job.queue)
    why = "its workers are busy: see `agentflow queues`" if threads else "no worker runs: start `agentflow up`"
    return f"no answer within {output.duration(timeout_s)}; {why}"


def _find(system: System, job_id: str) -> Job:
    with system.database.connection() as conn:
        job = records.get(conn, records.EVERY_ORGANIZATION, UUID(job_id))
    if job is None:
        raise Failure(f"there is no job {job_id}")
    return job


def _ended(system: System, job: Job) -> Job:
    while not job.terminal:
        current = system.wait_finished(job, 5.0)
        if current is None:
            raise Failure(f"job {job.id} was cleaned up")
        job = current
    return job


def _plain(job: Job) -> dict[str, Any]:
    hidden = ("fence", "slot", "wake_at")
    shown = {name: value for name, value in dataclasses.asdict(job).items() if name not in hidden}
    return {**shown, "trace": traces.id_of(traces.of_job(job.id, job.trace))}


def _state(job: Job) -> str:
    if job.state == "running" and job.progress is not None:
        return f"running, {job.progress:.0%}" + (f" {job.stage}" if job.stage else "")
    return "running, told to stop" if job.state == "running" and job.cancel_requested else job.state


def _note(job: Job) -> str:
    if job.state == "queued" and job.wait_reason:
        return f"waits: {job.wait_reason}"
    return _message(job.error, 80)


def _message(error: dict[str, Any] | None, most: int = 200) -> str:
    text = one_line((error or {}).get("message", ""))
    return text if len(text) <= most else text[: most - 1] + "…"


def _facts(job: Job, outlook: Outlook | None, parent: Job | None, children: list[Job]) -> Iterator[tuple[str, object]]:
    ahead = f", {job.head_start_s} s ahead" if job.head_start_s else ""
    yield "queue", f"{job.queue}, priority {job.priority}{ahead}"
    yield "attempt", f"{job.attempt} of {job.max_attempts}" + (f", {job.crashes} crashes" if job.crashes else "")
    if job.state == "queued":
        yield "next", output.ago(job.run_at)
        if outlook is not None and outlook.reason is not None:
            yield "waits for", _wait(outlook)
    if outlook is not None:
        for name, estimate in (("starts", outlook.start), ("ends", outlook.end)):
            if estimate is not None:
                yield name, _estimated(estimate)
    yield "created", f"{job.created_at:%Y-%m-%d %H:%M:%S %Z} ({output.ago(job.created_at)})"
    if job.started_at:
        yield "started", f"{job.started_at:%Y-%m-%d %H:%M:%S %Z}"
    if job.started_at and job.finished_at:
        yield "took", output.duration((job.finished_at - job.started_at).total_seconds())
    for name, value in (
        ("retry of", job.retry_of),
        ("batch", job.batch_id),
        ("key", job.concurrency_key),
        ("correlation", job.correlation_id),
        ("callback", job.callback_url),
        ("trace", traces.id_of(traces.of_job(job.id, job.trace))),
    ):
        if value is not None:
            yield name, value
    if parent is not None:
        yield "after", f"{parent.type} {parent.id} ({parent.state})"
    for child in children:
        yield "then", f"{child.type} {child.id} ({child.state})"


def _wait(outlook: Outlook) -> str:
    reason = _REASONS.get(outlook.reason or "", outlook.reason or "")
    if outlook.position is None:
        return reason
    said = f"{reason}; {'behind more than' if outlook.beyond else 'number'} {outlook.position - outlook.beyond} in its line"
    return said + (f", some {outlook.before} of all before it" if outlook.before else "")


def _estimated(estimate: Estimate) -> str:
    said = f"in about {output.duration(estimate.middle)}"
    if estimate.low is None or estimate.high is None:
        return said + "; too little was measured for a range"
    return said + f" (9 times in 10: in {output.duration(estimate.low)} to {output.duration(estimate.high)})"


def _used(attempt: Attempt) -> str | None:
    return ", ".join(f"{value:g} {name}" for name, value in sorted((attempt.usage or {}).items())) or None


def _took(attempt: Attempt) -> str | None:
    if attempt.started_at is None:
        return None
    return output.duration(max(0.0, (attempt.ended_at - attempt.started_at).total_seconds()))


def _shortened(content: Any) -> str:
    text = json.dumps(content, indent=2, ensure_ascii=False, default=str)
    if len(text) <= _SHOWN_CHARACTERS:
        return text
    return f"{text[:_SHOWN_CHARACTERS]}\n… {len(text) - _SHOWN_CHARACTERS} characters more (--json shows all)"
