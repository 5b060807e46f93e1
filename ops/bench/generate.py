"""A large installation's rows: ended jobs, waiting jobs and webhooks of many organizations, as if they had come over days.

    .venv/bin/python ops/bench/generate.py DATABASE_URL [--finished 10000000] [--waiting 1000000] [--events 1000000]
                                                        [--organizations 200] [--days 30]

For a database of its own, whose schema it brings up to date; what is there is kept, and the rows come on top. Organizations are
of very different sizes (nearly half of the rows belong to the largest tenth). Of the ended jobs 3 % failed, after attempts with
errors of a few kinds, and 1 % were cancelled; of the waiting ones half are due, a third wait for their time, the others are
parked. The dashboard's history is rolled up, the tables are vacuumed and analyzed. Prints seconds for a million of each kind.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from agentflow import schema  # noqa: E402
from agentflow.jobs import history  # noqa: E402

Connection = psycopg.Connection[Any]
#: Rows of one statement: its transaction is short, and what it has done is seen.
CHUNK = 100_000
FIRST_ORGANIZATION = 1000


@dataclass(frozen=True)
class Amounts:
    finished: int = 10_000_000
    waiting: int = 1_000_000
    events: int = 1_000_000
    organizations: int = 200
    days: float = 30.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("database_url")
    for name in ("finished", "waiting", "events", "organizations"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Amounts, name))
    parser.add_argument("--days", type=float, default=Amounts.days)
    options = vars(parser.parse_args())
    with psycopg.connect(options.pop("database_url"), autocommit=True) as conn:
        schema.migrate(conn)
        print(json.dumps(generate(conn, Amounts(**options), say=print), indent=1))


def generate(
    conn: Connection, amounts: Amounts, *, say: Callable[[str], object] = lambda _said: None
) -> dict[str, float]:
    """Returns seconds for a million rows of each kind, and for what is done afterwards. The connection is in autocommit."""
    conn.execute(_ORGANIZATIONS, {"first": FIRST_ORGANIZATION, "count": amounts.organizations})
    conn.execute(_ENDPOINTS, {"first": FIRST_ORGANIZATION, "count": amounts.organizations})
    figures: dict[str, float] = {}
    for name, statement, count in (
        ("finished", _FINISHED, amounts.finished),
        ("waiting", _WAITING, amounts.waiting),
        ("events", _EVENTS, amounts.events),
    ):
        began = time.monotonic()
        for start in range(0, count, CHUNK):
            size = min(CHUNK, count - start)
            conn.execute(statement, {"start": start, "size": size, "total": count, **_common(amounts)})
            say(f"{name}: {start + size:,} of {count:,} after {time.monotonic() - began:.0f} s")
        if count:
            figures[f"{name}_s_per_million"] = (time.monotonic() - began) * 1e6 / count
    for name, doing in (
        ("attempts_s", lambda: conn.execute(_ATTEMPTS)),
        ("history_s", lambda: history.roll_up(conn)),
        ("vacuum_s", lambda: conn.execute(f"vacuum analyze {_TABLES}")),
    ):
        began = time.monotonic()
        doing()
        figures[name] = time.monotonic() - began
    return figures


def _common(amounts: Amounts) -> dict[str, Any]:
    return {"first": FIRST_ORGANIZATION, "organizations": amounts.organizations, "span_s": amounts.days * 86_400}


_TABLES = "agentflow.jobs, agentflow.attempts, agentflow.webhook_events, agentflow.job_history"

_ORGANIZATIONS = """
insert into agentflow.organizations (id, slug, name)
select %(first)s + n, 'bench-' || n, 'Bench ' || n from generate_series(0, %(count)s - 1) n on conflict do nothing
"""

_ENDPOINTS = """
insert into agentflow.webhook_endpoints (id, organization_id, source, name)
select md5('endpoint ' || n)::uuid, %(first)s + n, 'github', 'bench' from generate_series(0, %(count)s - 1) n
on conflict do nothing
"""

# The cube of an even share: half of the rows go to the first eighth of the organizations. Ids as they are made at `at`.
_NUMBERED = """
    select n, p.at,
        %(first)s + least(%(organizations)s - 1, floor(%(organizations)s * power(h.share, 3)))::bigint as organization,
        (lpad(to_hex((extract(epoch from p.at) * 1000)::bigint), 12, '0') || '7'
            || substr(md5(n || '{salt}'), 1, 19))::uuid as id,
        h.share, (n * 7919) %% 100 as percent
    from generate_series(%(start)s::bigint, %(start)s + %(size)s - 1) n
    cross join lateral (select ((n * 2654435761) %% 4294967296) / 4294967296.0::float8 as share) h
    cross join lateral (select clock_timestamp() - make_interval(secs => {age})) p(at)
"""

_KINDS = """
    cross join lateral (select (array['ping', 'generate_embeddings', 'sync_crm', 'handle_webhook', 'analyze_video',
        'extract_graph', 'comfy_render', 'deliver_callback'])[1 + (n / 3) %% 8]) k(type)
    cross join lateral (select case when k.type in ('analyze_video', 'generate_embeddings') then 'heavy'
        when k.type = 'comfy_render' then 'gpu' else 'default' end) q(queue)
"""

_FINISHED = f"""
insert into agentflow.jobs (id, organization_id, type, queue, priority, payload, state, attempt, max_attempts, fence,
    time_limit_s, run_at, result, error, correlation_id, finished_by, created_at, started_at, finished_at)
select r.id, r.organization, k.type, q.queue, case when r.percent < 10 then 0 when r.percent < 90 then 1 else 2 end,
    jsonb_build_object('number', r.n, 'text', repeat('x', 80)), s.state, s.spent, 5, s.spent, 60, r.at,
    case when s.state = 'succeeded' then jsonb_build_object('number', r.n, 'ok', true, 'text', repeat('y', 60)) end,
    case when s.state = 'failed' then jsonb_build_object('code', (array['timeout', 'refused', 'unexpected'])[1 + r.n %% 3],
        'message', (array['openrouter.ai did not answer within 30 s (request ', 'the vendor refused the call (request ',
        'ValueError: there is no contact (lead '])[1 + r.n %% 3] || r.n || ')') end,
    case when r.percent < 20 then 'order-' || r.n end, md5('worker ' || r.n %% 8)::uuid, r.at,
    r.at + interval '20 ms', r.at + interval '20 ms' + make_interval(secs => 0.05 + 4 * r.share * r.share)
from ({_NUMBERED.format(salt="f", age="120 + %(span_s)s * (1 - n / %(total)s::float8)")}) r {_KINDS}
cross join lateral (select case when r.percent < 96 then 'succeeded' when r.percent < 99 then 'failed' else 'cancelled' end,
    case when r.percent < 96 then 1 when r.percent < 99 then 5 else 0 end) s(state, spent)
"""  # noqa: S608 - constants

_ATTEMPTS = """
insert into agentflow.attempts (job_id, fence, attempt, worker, started_at, ended_at, outcome, error)
select j.id, f, f, j.finished_by, j.started_at, j.finished_at, case when f = 5 then 'failed' else 'retry' end, j.error
from agentflow.jobs j cross join generate_series(1, 5) f where j.state = 'failed' on conflict do nothing
"""

# Due for some minutes; in the next days; parked for some minutes by a limit.
_WAITING = f"""
insert into agentflow.jobs (id, organization_id, type, queue, priority, payload, max_attempts, time_limit_s, run_at, wake_at,
    wait_reason, created_at)
select r.id, r.organization, k.type, q.queue, case when r.percent < 10 then 0 when r.percent < 90 then 1 else 2 end,
    jsonb_build_object('number', r.n, 'text', repeat('x', 80)), 5, 60, w.wake_at, w.wake_at,
    case when r.percent >= 83 then 'limit' end, r.at
from ({_NUMBERED.format(salt="w", age="3600 * (1 - n / %(total)s::float8)")}) r {_KINDS}
cross join lateral (select case when r.percent < 50 then r.at
    when r.percent < 83 then clock_timestamp() + interval '1 hour' + make_interval(secs => 600000 * r.share)
    else clock_timestamp() + interval '10 min' + make_interval(secs => 3600 * r.share) end) w(wake_at)
"""  # noqa: S608 - constants

_EVENTS = f"""
insert into agentflow.webhook_events (id, organization_id, endpoint_id, received_at, verdict, delivery_id, delivery_key,
    body_hash, type, entity, headers, body, size_bytes, outcome, handled_at)
select r.id, r.organization, md5('endpoint ' || r.organization - %(first)s)::uuid, r.at, 'verified', 'delivery-' || r.n,
    sha256(convert_to('key ' || r.n, 'UTF8')), sha256(convert_to('body ' || r.n, 'UTF8')), 'issues', 'issue-' || r.n %% 1000,
    '{{"Content-Type": "application/json"}}',
    convert_to('{{"number": ' || r.n || ', "text": "' || repeat('z', 200) || '"}}', 'UTF8'),
    230, case when r.percent < 98 then 'done' else 'ignored' end, r.at + interval '100 ms'
from ({_NUMBERED.format(salt="e", age="60 + %(span_s)s * (1 - n / %(total)s::float8)")}) r
"""  # noqa: S608 - constants

if __name__ == "__main__":
    main()
