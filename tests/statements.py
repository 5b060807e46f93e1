"""Every statement that the product sends to Postgres in a test, and whether one on a tenant's table names its organization.

Listens at the product's own connections, so that what the tests ask themselves is not meant. Processes that a test starts from
`tests.job_types` write theirs to the folder that FOLDER names.
"""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final

from psycopg import sql

from agentflow.database import BoundedConnection

FOLDER: Final = "AGENTFLOW_TEST_STATEMENTS"

#: What belongs to no organization, or says itself whose it is.
SHARED: Final = frozenset(
    {
        "organizations",
        "installation",
        "migrations",
        "workers",
        "concurrency_keys",
        "window_1",
        "share_1",
        "durations",
        "memory_peaks",
        "paces",
        "embedding_models",
        "prepare_vectors_1",
        "comfyui_servers",
        "render_times",
        "count_gpus_1",
        "alerts",
        "alert_watch",
    }
)

#: Statements for all organizations at once, by a piece of their text (of functions without their version), each with its reason.
SYSTEM_WIDE: Final[Mapping[str, str]] = {
    "from agentflow.claim_": "the claim: a message names a job's id, and a worker works for all",
    "from agentflow.jobs j where j.id = any (%s) and j.worker = %s": "whether a claim whose COMMIT was lost was done",
    "select * from agentflow.settle_": "the end of an attempt: by id, fence and worker, which only the claim's holder has",
    "select a.job_id, a.fence from agentflow.job_attempts a join unnest": "whether a finish whose COMMIT was lost was done",
    "select * from agentflow.heartbeat_": "the leases of a worker's jobs, by worker, id and fence",
    "select * from agentflow.rescue_": "rescue: leases that ran out, whoever's they are",
    "select * from agentflow.relay_": "the relay: fair among all organizations",
    "from agentflow.pauses order by": "the rules of the installation, which every process knows",
    "from agentflow.caps order by": "caps are rules of the installation, too",
    "from agentflow.rate_limits order by": "and so are limits",
    "select exists (select from agentflow.budgets)": "whether there are budgets at all",
    "from agentflow.budgets_reached order by": "who has used up a budget: every worker knows, of all",
    "update agentflow.caps set running = least": "the operator's cap for each organization, which no own one exceeds",
    "with old as materialized (select day, organization_id": "retention of the totals of days",
    "select agentflow.record_usage_": "what attempts used up, by job and fence; the organization comes from the job's row",
    "with old as materialized (select organization_id, key from agentflow.model_answers": "retention of models' answers",
    "select agentflow.charge_": "what was done, for whose turn it is: by organization inside",
    "from agentflow.poll_": "polling without a broker: the relay and the claim in one, for all",
    "with locked as materialized (select id from agentflow.jobs where id = any (": "a ring that is taken back, by ids",
    "with picked as materialized (select id from agentflow.jobs where state = 'queued' and sent_at": "a broker was emptied",
    "with recursive organizations as (": "retention of jobs, by organization inside",
    "with old as materialized (select organization_id, key from agentflow.idempotency_keys": "retention of idempotency keys",
    "with old as materialized (select u.organization_id, u.type": "retention of unique keys",
    "with old as materialized (select id from agentflow.batches": "retention of batches",
    "delete from agentflow.jobs j using old where j.id = old.id": "retention of jobs, by organization inside",
    "from agentflow.videos v where v.created_at": "retention of videos",
    "delete from agentflow.videos v using unnest": "the same: each by id and organization",
    "with due as materialized (select key from agentflow.doomed_files": "files whose rows are gone, whoever's they were",
    "delete from agentflow.doomed_files where key": "the same, removed: a key says itself whose it was",
    "update agentflow.doomed_files set tries = 0": "the same, kept for now",
    "select count(*) from agentflow.doomed_files where tries": "how many cannot be removed",
    "join unnest(%s::bigint[], %s::uuid[]) w(organization_id, id)": "what is in storage: each with its organization",
    "select exists (select from agentflow.schedules where wake_at": "the calendar: whether anything is due",
    "from agentflow.schedules where wake_at": "the calendar: what is due, whoever's it is",
    "with recursive schedules as (": "the last tick of each entry of the calendar, for the operator and the metrics",
    "select schedule, subject, at from agentflow.ticks where": "which ticks are claimed already",
    "with old as materialized (select t.schedule": "retention of ticks",
    "from ( select queue, organization_id, count(*) filter (where due)": "metrics: what waits and runs, by organization",
    "select queue, count(*) from agentflow.jobs where state = 'running' and statement_timestamp()": "metrics: what is stuck",
    "select queue, count(*) from agentflow.jobs where state = 'failed' and finished_at >": "metrics: what failed lately",
    "as per_day from agentflow.usage_days d": "metrics: the budgets of which most is used up",
    "- a.sync_every_s *": "metrics: how far the mirrors of each organization are behind",
    "select extract(epoch from expires_at - clock_timestamp())": "metrics: when the next key ends",
    "select extract(epoch from min(access_expires_at)": "metrics: when the next token ends",
    "delete from agentflow.workers w": "retention of workers' rows, not while one holds a job",
    "select count(*) filter (where id >= ": "what was done lately, for the operator and the metrics",
    "select q, x.type, x.slots, count(*) from unnest": "how many workers are wanted, for all that is due",
    "select queue, type, count(*) from agentflow.jobs where state = 'running'": "the same, for all that runs",
    "from agentflow.jobs j where true": "the operator's list of all jobs",
    "select count(*) from agentflow.attempts where job_id = %s and outcome": "how often the kernel killed a job that is run here",
    "insert into agentflow.durations": "how long jobs of a type take, whoever's they are",
    "with open as materialized ( select f.job_id": "what became of forecasts, by the jobs' ids",
    "delete from agentflow.forecasts where queue": "retention of forecasts",
    "delete from agentflow.sync_runs where ctid": "retention of the log of syncs",
    "delete from agentflow.crm_writes where ctid": "retention of what was written back",
    "from agentflow.crm_accounts where state in ('connecting', 'connected') and next_sync_at <=": (
        "the schedule: whose account is due is the answer"
    ),
    "with old as materialized (select e.id from agentflow.webhook_events": "retention of webhooks",
    "with old as materialized (select endpoint_id, entity from": "retention of the states of their entities",
    "insert into agentflow.job_logs (job_id, organization_id": "lines of a process's jobs: the organization is the job's row's",
    "with placed as (select job_id, fence, n, row_number() over newest": "the cap of each of those jobs' lines",
    "from agentflow.telegram_bots where bot_id = %s": "whose bot this is: the organization is the answer",
    "select id from agentflow.telegram_requests where created_at <": "retention of what the bot was asked for",
    "delete from agentflow.telegram_pictures where request_id = any": "the same: its pictures",
    "delete from agentflow.telegram_requests where id = any": "the same: the rows themselves",
    "from agentflow.telegram_pictures join unnest": "the same: what a newer request repeats, each with its organization",
    "from agentflow.webhook_endpoints e left join lateral": "the alarm for silent endpoints, and its metrics",
    "with old as materialized (select id from agentflow.flight_log": "retention of what is remembered",
    "select id, organization_id, sealed from agentflow.": "rotate-key: every sealed value, whoever's it is",
    "_sealed from agentflow.crm_accounts where id >": "rotate-key: every sealed value of accounts",
    'create index concurrently "vectors_near_': "an index over one organization's vectors, whose number is its condition",
    "from (select distinct on (organization_id, key) tokens from agentflow.chunks": "what another embedding model would cost",
    "from agentflow.vectors v where v.model_id = %s and v.vector is not null": "how far the embedding models are filled",
    "select agentflow.leave_key_": "a running job's key, by id, fence and worker, which only the claim's holder has",
    "select agentflow.enter_key_": "the line of a pool of GPUs, which all organizations share",
    "from agentflow.renders r join agentflow.jobs j": "what is left on a server, whoever's it was",
    "(select count(*) from agentflow.renders r where r.server": "how many renders each server has, whoever's they are",
    "select count(*) from agentflow.jobs where state in": "a restore: how many jobs are open, whoever's they are",
    "select storage_key from agentflow.videos union": "a backup: which files have to be there, whoever's they are",
    "end as sealed_under, count(*) from agentflow.": "a backup: which keys it needs, whoever's values are under them",
    "select j.id, i.n - 1, j.organization_id": "a restore: each job's writes with the job's own organization",
    "from agentflow.api_keys where id::text = %s or prefix = %s": "the operator's look for a key, on the command line",
    "delete from agentflow.dashboard_sessions where expires_at": "retention of sessions that are over",
    "select organization_id, count(*) from agentflow.jobs where state = 'running' and organization_id = any": (
        "how many run of each organization, on the operator's page"
    ),
    "select j.id from agentflow.jobs j order by j.id limit 1": "from where on the history is written",
    "insert into agentflow.job_history as h": "the history of jobs, by organization inside",
    "from agentflow.job_history f where f.seconds": "the same, folded into longer times",
    "insert into agentflow.depth_history as h": "how much waits, by organization inside",
    "delete from agentflow.job_history where ctid": "retention of the history",
    "delete from agentflow.depth_history where ctid": "retention of how much waited",
}

#: The same, and needed while a request of an organization's key is answered.
IN_REQUESTS: Final[Mapping[str, str]] = {
    "select kind, name, organization_id, reason, created_at, own from agentflow.pauses": "all rules, known for 2 s",
    "select organization_id, type, running, own from agentflow.caps": "all rules, known for 2 s",
    "select organization_id, provider, amount, per_s, own from agentflow.rate_limits": "all rules, known for 2 s",
    "select exists (select from agentflow.budgets), agentflow.share_": "all rules, known for 2 s",
    "select distinct organization_id from agentflow.budgets_reached": "all rules, known for 2 s",
    "select * from agentflow.cancel_": "takes the organization as its first argument",
    "select id, queue, type, priority from agentflow.jobs where id = any (%s)": (
        "whom to ring after a transition: the next in line of a type's key may be another's job"
    ),
    "select j.organization_id, j.type, j.concurrency_key, extract(": "estimates: how long threads will be taken",
    "with recursive lanes as (": "estimates: how many wait in each lane",
    "select type, count(*) from (select j.type": "estimates: how many were sent",
    "select x.type, count(*) from (select j.type": "estimates: how many are before one, of a line that several may share",
    "from agentflow.forecasts where queue": "estimates: how wrong the last ones of the queue were",
    "select agentflow.graph_lock_": "a lock on the graph of the organization that is its argument",
    "select agentflow.graph_recount_": "takes the organization as its first argument",
    "select k.hash, k.id, k.organization_id": "whose key this is: the organization is the answer",
    "from agentflow.webhook_credentials c join agentflow.webhook_endpoints e": "whose webhook token this is: the same",
    "from agentflow.dashboard_sessions s left join": "whose session this is: the same",
    "delete from agentflow.dashboard_sessions s where s.hash": "the end of one's own session, by its token",
}


@dataclass(frozen=True, slots=True)
class Statement:
    text: str
    values: tuple[Any, ...]
    named: Mapping[str, Any]
    acting_for: int | None  # the organization of the request's key; None: the operator, or no request


def normalized(query: Any) -> str:
    if isinstance(query, sql.Composable):
        query = query.as_string()
    text = query.decode() if isinstance(query, bytes) else str(query)
    return re.sub(r"\s+", " ", text).strip()


def tables_of(text: str) -> set[str]:
    """Tenants' tables, and functions on them, that a statement names."""
    return set(re.findall(r"agentflow\.(\w+)", text)) - SHARED


_TESTS: Final = Path(__file__).parent
_GIVEN: Final = re.compile(r"(organization_id =|p_organization =>) (%\(\w+\)s|%s)")
_WRITTEN: Final = re.compile(r"insert into agentflow\.\w+( as \w+)? \([^)]*\borganization_id\b")


def reason_of(text: str, *, in_request: bool) -> str | None:
    """Why a statement may be for all; None: it may not."""
    allowed = IN_REQUESTS if in_request else {**SYSTEM_WIDE, **IN_REQUESTS}
    return next((reason for piece, reason in allowed.items() if piece in text), None)


def problem_of(statement: Statement) -> str | None:
    """What is wrong with a statement; None: nothing."""
    text = statement.text
    if not tables_of(text):
        return None
    acting_for = statement.acting_for
    if not (_GIVEN.search(text) or _WRITTEN.search(text)):
        if reason_of(text, in_request=acting_for is not None) is None:
            return f"names no organization, nor does tests/statements.py say why it needs none: {text[:400]}"
        return None
    given = [value for name, value in statement.named.items() if name == "organization"] or statement.values
    if acting_for is not None and acting_for not in given:
        return f"is not for organization {acting_for}, whose key came with the request: {text[:400]}"
    return None


class Recorder:
    """Remembers each text once, and every problem."""

    def __init__(self, folder: Path | None = None) -> None:
        self.texts: set[str] = set()
        self.problems: list[str] = []
        self._folder = folder
        self._lock = threading.Lock()

    def note(self, query: Any, parameters: Any) -> None:
        text = normalized(query)
        named = parameters if isinstance(parameters, Mapping) else {}
        values = tuple(parameters) if isinstance(parameters, Sequence) and not isinstance(parameters, str) else ()
        problem = problem_of(Statement(text, values, named, _acting_for()))
        with self._lock:
            self.texts.add(text)
            if problem is not None:
                self.problems.append(problem)
                if self._folder is not None:
                    with (self._folder / f"{os.getpid()}.txt").open("a") as file:
                        file.write(problem + "\n")


def _acting_for() -> int | None:
    flask = sys.modules.get("flask")  # a worker has none, and should not grow by being listened to
    if flask is None or not flask.has_request_context():
        return None
    caller = flask.g.get("caller")
    return caller.sees if caller is not None and "admin" not in caller.scopes else None


def _asked_by_a_test(frame: FrameType) -> bool:
    """A test looks at whatever it likes, and migrations make the tables: only the product's own questions count."""
    return Path(frame.f_code.co_filename).parent == _TESTS or frame.f_globals.get("__name__") == "agentflow.schema"


def install(recorder: Recorder) -> None:
    """From now on the product's connections in this process tell the recorder."""
    original = BoundedConnection.execute

    def execute(self: BoundedConnection, query: Any, params: Any = None, **more: Any) -> Any:
        if not _asked_by_a_test(sys._getframe(1)):
            recorder.note(query, params)
        return original(self, query, params, **more)

    BoundedConnection.execute = execute  # type: ignore[method-assign]


def install_in_a_process_of_a_test() -> None:
    if folder := os.environ.get(FOLDER):
        Path(folder).mkdir(exist_ok=True)
        install(Recorder(Path(folder)))
