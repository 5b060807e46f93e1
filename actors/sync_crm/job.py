"""`sync_crm`: brings the mirror of one account up to date, one job of an account at a time."""

from __future__ import annotations

import time
from typing import Any, Literal
from uuid import UUID

from actors.sync_crm.recording import Planning, Recording, Writing
from actors.sync_crm.syncing import Run
from agentflow import log
from agentflow.errors import JobError, Permanent, Transient, Wait
from agentflow.jobs.registry import CRITICAL, Payload, job
from agentflow.kommo import accounts, cursors, runs, syncing
from agentflow.kommo.accounts import Account
from agentflow.kommo.client import Client
from agentflow.kommo.runs import Counts
from agentflow.worker.running import JobContext

logger = log.get(__name__)


class SyncCrm(Payload):
    """`incremental`: what has changed. `backfill`: everything, in slices. `reconcile`: the same, and what is gone is deleted.

    `touched`: only what webhooks have named. `plan`: a dry run that changes nothing, and says what the run would do.
    """

    account_id: UUID
    mode: Literal["incremental", "backfill", "reconcile"] = "incremental"
    touched: bool = False
    plan: bool = False


def _one_at_a_time(payload: SyncCrm) -> tuple[str, int] | None:
    return None if payload.plan else (f"kommo:{payload.account_id}", 1)


@job(
    "sync_crm",
    payload=SyncCrm,
    retry=CRITICAL,
    time_limit_s=3600.0,
    concurrency=_one_at_a_time,
    public=False,
)
def sync_crm(context: JobContext, payload: SyncCrm) -> dict[str, Any]:
    """Bring the mirror of a CRM account up to date, or plan it."""
    system, organization_id = context.system, context.job.organization_id
    with system.database.connection() as conn:
        account = accounts.get(conn, organization_id, payload.account_id)
    if account is None:
        return {"skipped": "the account was removed", "rows": _purge(context, payload.account_id)}
    if account.state not in ("connecting", "connected"):
        return {"skipped": f"the account is {account.state}"}
    mode: runs.Mode = "touched" if payload.touched else payload.mode
    with system.database.connection() as conn:
        run = runs.open_run(conn, organization_id, account.id, context.job.id, mode, plan=payload.plan)
    client = Client(system, context, account, str(context.job.id))
    recording = (Planning if payload.plan else Writing)(system, account, client, run.id)
    began = time.monotonic()
    try:
        account = recording.account = _checked(context, client, account)
        _work(Run(context, recording), mode)
    except JobError as error:
        with system.database.connection() as conn:
            recording.count(conn, {})
            if isinstance(error, Wait):
                raise
            if isinstance(error, Permanent) or context.job.attempt >= context.job.max_attempts:
                runs.close(conn, organization_id, run.id, "failed", str(error))
            else:
                runs.note_error(conn, organization_id, run.id, str(error))
        raise
    return _ended(recording, run, mode, time.monotonic() - began)


def _checked(context: JobContext, client: Client, account: Account) -> Account:
    """The account answers, and is the one it was. A new one is followed from now on, and what is in it already is fetched."""
    number = client.account().get("id")
    if type(number) is not int:
        raise Transient("Kommo's answer about the account has no number", code="crm_bad_answer")
    if account.remote_id not in (None, number):
        why = "the credentials are those of another Kommo account"
        with context.system.database.connection() as conn:
            accounts.stop(conn, account.organization_id, account.id, "needs_reauth", why)
        raise Permanent(why, code="crm_other_account")
    with context.system.transaction() as transaction:
        ids = account.organization_id, account.id
        if account.state == "connecting":
            accounts.connected(transaction.conn, *ids, number)
        if cursors.start(transaction.conn, *ids, client.now_s()):
            syncing.submit(transaction, *ids, "backfill")
        return accounts.get(transaction.conn, *ids) or account


def _work(run: Run, mode: runs.Mode) -> None:
    match mode:
        case "touched":
            run.drain_touched()
        case "incremental":
            run.drain_touched()
            run.short_lists()
            run.changes()
            run.drain_touched()
        case "backfill" | "reconcile":
            run.sweep()
            run.end_sweep(deleting=mode == "reconcile")


def _ended(recording: Recording, run: runs.Run, mode: runs.Mode, took_s: float) -> dict[str, Any]:
    system, account = recording.system, recording.account
    held = sum(recording.held.values())
    counts: Counts = {}
    if isinstance(recording, Planning):
        counts = {name: dict(of_kind) for name, of_kind in recording.counts.items() if of_kind}
    for name, number in recording.held.items():
        counts = {**counts, name: {**counts.get(name, {}), "held": number}}
    with system.database.transaction() as conn:
        recording.count(conn, counts)
        if not run.plan and (held or mode == "reconcile"):
            accounts.hold_deletions(conn, account.organization_id, account.id, held or None)
        ended = runs.close(conn, account.organization_id, run.id, "held" if held else "succeeded")
    if held:
        logger.error(
            "more is gone from a CRM account than may be deleted unasked: confirm it, or look what happened there",
            account_id=str(account.id),
            held=held,
        )
    return {
        "run_id": str(ended.id),
        "mode": mode,
        "plan": ended.plan,
        "state": ended.state,
        "calls": ended.calls,
        "seconds": round(took_s, 1),
        "counts": ended.counts,
    }


def _purge(context: JobContext, account_id: UUID) -> int:
    """What a removed account left behind, in batches."""
    total = 0
    while True:
        with context.system.database.transaction() as conn:
            deleted = accounts.purge(conn, context.job.organization_id, account_id)
        if not deleted:
            return total
        total += deleted
        context.check()
