"""`write_crm`: creates and changes things in a CRM account. A creation whose answer is lost makes one, not two."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal
from uuid import UUID

from pydantic import Field

from agentflow import log
from agentflow.connections import NoAnswer
from agentflow.errors import JobError, Permanent, Transient, Wait
from agentflow.jobs.registry import CRITICAL, Payload, job
from agentflow.kommo import accounts, mirror, touched, writes
from agentflow.kommo.client import Client, Refused
from agentflow.kommo.entities import BY_NAME, TOUCHABLE, Stream
from agentflow.kommo.walking import walk
from agentflow.worker.running import JobContext

logger = log.get(__name__)

MAX_ITEMS: Final = 50  # what Kommo recommends; 250 is the most it takes
#: After a lost answer the request may still be at work over there. Gateways give up after a minute at most.
SETTLE_S: Final = 60.0
_CLOCKS_S: Final = 2

Kind = Literal["leads", "contacts", "companies", "tasks", "lead_notes", "contact_notes", "company_notes"]


class WriteCrm(Payload):
    """`items` as Kommo's API takes them: with an `id` a thing is changed, without one it is made."""

    account_id: UUID
    kind: Kind
    items: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MAX_ITEMS)]


# One at a time, so that two equal creations that were lost do not both find the first one.
@job(
    "write_crm",
    payload=WriteCrm,
    retry=CRITICAL,
    time_limit_s=600.0,
    concurrency=lambda payload: (f"kommo-write:{payload.account_id}", 1),
    public=False,
)
def write_crm(context: JobContext, payload: WriteCrm) -> dict[str, Any]:
    """Create and change leads, contacts, companies, notes or tasks of a CRM account."""
    system, organization_id = context.system, context.job.organization_id
    with system.database.connection() as conn:
        account = accounts.get(conn, organization_id, payload.account_id)
    if account is None:
        raise Permanent("the account was removed", code="crm_account_removed")
    if account.state not in ("connecting", "connected"):
        raise Permanent(f"the account is {account.state}: {account.state_reason}", code=f"crm_{account.state}")
    client = Client(system, context, account, str(context.job.id))
    writing = _Writing(context, payload, client)
    client.account()  # it answers, and Kommo's time is known
    writing.look_for_lost()
    for batch in writing.batches():
        writing.send(batch)
    return writing.result()


class _Writing:
    def __init__(self, context: JobContext, payload: WriteCrm, client: Client) -> None:
        self._context = context
        self._system = context.system
        self._account_id = payload.account_id
        self._items = payload.items
        self._stream: Stream = BY_NAME[payload.kind]
        self._client = client

    @property
    def _job(self) -> tuple[int, UUID]:
        return self._context.job.organization_id, self._context.job.id

    def look_for_lost(self) -> None:
        """What an earlier attempt sent without hearing the answer: found, it is done; else it is sent again."""
        known = self._known()
        lost = {n: known[n] for n in known if known[n].state == "sent" and "id" not in self._items[n]}
        if not lost:
            return
        if (youngest := min(each.age_s for each in lost.values())) < SETTLE_S:
            raise Wait(SETTLE_S - youngest, "crm_settling", message="an answer was lost: looking what became of it")
        since = min(each.sent_s for each in lost.values()) - _CLOCKS_S
        found: dict[int, int] = {}
        for batch in walk(self._client, self._stream, since, self._client.now_s(), self._clock):
            made = {d["id"]: d for d in batch.documents if d.get("created_at", 0) >= since}
            with self._system.database.connection() as conn:
                others = writes.taken(conn, self._job[0], self._account_id, self._stream.name, list(made))
            for id_, document in sorted(made.items()):
                for n in lost:
                    free = n not in found and id_ not in others and id_ not in found.values()
                    if free and writes.is_made_from(document, self._items[n]):
                        found[n] = id_
        logger.warning("answers to creations were lost", lost=len(lost), found=len(found), job_id=str(self._job[1]))
        self._done(found)

    def batches(self) -> list[list[int]]:
        """What is still to be sent. After a 504 Kommo asks for smaller batches: each attempt halves them."""
        known = self._known()
        size = max(1, MAX_ITEMS >> (self._context.job.attempt - 1))
        todo = [n for n in range(len(self._items)) if n not in known or known[n].state == "sent"]
        kinds = ([n for n in todo if "id" not in self._items[n]], [n for n in todo if "id" in self._items[n]])
        return [of_kind[first : first + size] for of_kind in kinds for first in range(0, len(of_kind), size)]

    def send(self, batch: list[int]) -> None:
        """One request. Kommo refuses all for one that is wrong: without that one the others are sent again."""
        while batch:
            method: Literal["POST", "PATCH"] = "PATCH" if "id" in self._items[batch[0]] else "POST"
            with self._system.database.connection() as conn:
                ids = self._job[0], self._account_id, self._job[1]
                writes.intend(conn, *ids, self._stream.name, batch, self._client.now_s())
            body = [{**self._items[n], "request_id": str(n)} for n in batch]
            try:
                answer = self._client.write(method, self._stream.path, body)
            except Refused as error:
                batch = self._without_refused(batch, error)
            except JobError as error:
                if not _may_be_done(error):
                    with self._system.database.connection() as conn:
                        writes.take_back(conn, *self._job, batch)
                raise
            else:
                self._done(self._made(batch, answer))
                return

    def result(self) -> dict[str, Any]:
        known = self._known()
        items = [
            {
                "state": "refused" if each.state == "refused" else "updated" if "id" in self._items[n] else "created",
                "id": self._items[n].get("id", each.entity_id),
                **({"errors": each.errors} if each.errors else {}),
            }
            for n, each in sorted(known.items())
        ]
        return {"items": items, "refused": sum(each["state"] == "refused" for each in items)}

    def _without_refused(self, batch: list[int], error: Refused) -> list[int]:
        wrong = {n: error.errors[str(n)] for n in batch if str(n) in error.errors}
        if not wrong and len(batch) > 1:  # it does not say which: one by one
            for n in batch:
                self.send([n])
            return []
        wrong = wrong or {batch[0]: [{"detail": str(error)}]}
        with self._system.database.connection() as conn:
            writes.refused(conn, *self._job, wrong)
        return [n for n in batch if n not in wrong]

    def _made(self, batch: list[int], answer: Any) -> dict[int, int]:
        """The ids, by `request_id`; an update's answer may come without it, and then in the order of the request."""
        embedded = answer.get("_embedded") if isinstance(answer, dict) else None
        listed = embedded.get(self._stream.embedded) if isinstance(embedded, dict) else None
        given = [each for each in listed or () if isinstance(each, dict) and type(each.get("id")) is int]
        named = {int(each["request_id"]): each["id"] for each in given if str(each.get("request_id")).isdecimal()}
        made = {n: named[n] for n in batch if n in named}
        if not made and len(given) == len(batch):
            made = {n: each["id"] for n, each in zip(batch, given, strict=True)}
        if len(made) < len(batch):
            raise Transient("Kommo's answer does not name all that it made", code="crm_bad_answer")
        return made

    def _done(self, made: Mapping[int, int]) -> None:
        """Written down, and read into the mirror soon."""
        if not made:
            return
        organization_id, job_id = self._job
        with self._system.transaction() as transaction:
            new = {n: id_ for n, id_ in made.items() if "id" not in self._items[n]}
            writes.done(transaction.conn, organization_id, job_id, new)
            writes.changed(transaction.conn, organization_id, job_id, [n for n in made if n not in new])
            if self._stream.name in TOUCHABLE:
                named = [(self._stream.name, id_) for id_ in made.values()]
                touched.read_again(transaction, organization_id, self._account_id, named)

    def _known(self) -> dict[int, writes.Write]:
        with self._system.database.connection() as conn:
            return writes.of_job(conn, *self._job)

    def _clock(self) -> Any:
        with self._system.database.connection() as conn:
            return mirror.clock(conn)


def _may_be_done(error: JobError) -> bool:
    if isinstance(error, NoAnswer):
        return error.sent
    return isinstance(error, Transient)
