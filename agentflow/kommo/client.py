"""Calls to one account's API: within the limit that all workers share, with a token that works, each answer understood once.

https://developers.kommo.com/docs/limitations and /docs/http-codes: 7 calls a second; 429 names in its body how long to wait; a
403 that is no JSON means that the account or our address is blocked, which does not end by itself; 204 is an empty list.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol
from urllib.parse import urlencode

from agentflow.errors import Permanent, Transient, Wait
from agentflow.kommo import accounts, tokens
from agentflow.kommo.accounts import Account
from agentflow.kommo.entities import Stream
from agentflow.kommo.tokens import Access, NeedsReauth
from agentflow.limits import Bucket, Window

if TYPE_CHECKING:
    from agentflow.system import System

PAGE: Final = 250
#: Ids in one question: with 250 of them the address would be longer than proxies take.
IDS_AT_ONCE: Final = 100
_ANSWER_S: Final = 60.0
#: Our second and Kommo's are not the same: a call may be held up on its way, and those behind it not.
_WINDOW_S: Final = 1.1
#: A longer wait for a place is spent parked.
_PATIENCE_S: Final = 5.0
_TOKEN_KNOWN_S: Final = 60.0
_MOST_WAIT_S: Final = 3600.0

Params = Sequence[tuple[str, str]]


class Caller(Protocol):
    """Who asks: the context of a job."""

    def check(self) -> None:
        """Raises, when the job has to end."""

    def sleep(self, seconds: float) -> None: ...

    def spent(self, **measures: float) -> None: ...


class Forbidden(Permanent):
    """The token lacks a right (users are for administrators alone)."""


class Refused(Permanent):
    """The whole request was refused since something in it is wrong; `errors` by `request_id`, empty where none is named."""

    def __init__(self, message: str, errors: Mapping[str, list[dict[str, Any]]]) -> None:
        super().__init__(message, code="crm_refused")
        self.errors = errors


class TooSlow(Transient):
    """504: Kommo asks for a smaller batch."""


@dataclass(frozen=True, slots=True)
class Page:
    """`more`: there is a next page, however short this one is."""

    documents: list[Any]
    more: bool


class Client:
    """For one job, in its thread. `calls` counts what was sent."""

    def __init__(self, system: System, caller: Caller, account: Account, holder: str) -> None:
        self._system = system
        self._caller = caller
        self._account = account
        self._holder = holder
        self._access: Access | None = None
        self._access_at = 0.0
        self._clock_behind_s = 0.0
        self.calls = 0

    def now_s(self) -> int:
        """Kommo's time in Unix seconds, as its last answer had it."""
        return int(time.time() - self._clock_behind_s)

    def account(self) -> dict[str, Any]:
        return self._ask("GET", "account") or {}

    def page(self, stream: Stream, params: Params = (), *, number: int = 1) -> Page:
        more = [("with", stream.more)] if stream.more else []
        paging = [("page", str(number)), ("limit", str(PAGE))] if stream.path != "leads/pipelines" else []
        document = self._ask("GET", stream.path, [*paging, *more, *params])
        if document is None:
            return Page([], more=False)
        embedded = document.get("_embedded")
        documents = embedded.get(stream.embedded) if isinstance(embedded, dict) else None
        if not isinstance(documents, list):
            raise Transient(f"Kommo's answer has no {stream.embedded}", code="crm_bad_answer")
        links = document.get("_links")
        return Page(documents, more=isinstance(links, dict) and bool(links.get("next")))

    def by_ids(self, stream: Stream, ids: Sequence[int]) -> list[Any]:
        """Those that are there, of up to IDS_AT_ONCE."""
        return self.page(stream, [(f"filter[id][{n}]", str(each)) for n, each in enumerate(ids)]).documents

    def write(self, method: Literal["POST", "PATCH"], path: str, body: Any) -> Any:
        """Raises Refused, TooSlow; NoAnswer where it may have been done."""
        return self._ask(method, path, body=body)

    # ---- one call ----

    def _ask(self, method: str, path: str, params: Params = (), body: Any = None) -> Any:
        for is_last in (False, True):
            access = self._current()
            status, headers, text = self._send(access, method, path, params, body)
            if status != 401:
                return self._understood(method, status, headers, text)
            self._access = None
            if is_last:
                raise self._stopped("needs_reauth", NeedsReauth("Kommo refuses a token that is new"))
            self._access = tokens.access(self._system, self._account, self._caller.check, refused=access.token)
            self._access_at = time.monotonic()
        raise AssertionError("unreachable")

    def _current(self) -> Access:
        if self._access is None or time.monotonic() - self._access_at > _TOKEN_KNOWN_S:
            self._access = tokens.access(self._system, self._account, self._caller.check)
            self._access_at = time.monotonic()
        return self._access

    def _send(
        self, access: Access, method: str, path: str, params: Params, body: Any
    ) -> tuple[int, Mapping[str, str], bytes]:
        self._wait_for_a_place()
        query = f"?{urlencode(params)}" if params else ""
        self.calls += 1
        self._caller.spent(crm_calls=1)
        with self._system.crm_connections.send(
            method,
            f"{access.base_url}/api/v4/{path}{query}",
            total_s=_ANSWER_S,
            check=self._caller.check,
            headers={"Authorization": f"Bearer {access.token}"},
            **({"json": body} if body is not None else {}),
        ) as head:
            self._note_clock(head.headers)
            return head.status, head.headers, head.read()

    def _wait_for_a_place(self) -> None:
        bucket = self._bucket()
        while (seconds := self._system.limits.take([bucket], self._holder)) > 0:
            if seconds > _PATIENCE_S:
                raise Wait(seconds, "rate_limit", message="the account's calls are used up for now")
            self._caller.sleep(seconds)

    def _bucket(self) -> Bucket:
        windows = self._system.rules.now().limit_of(self._account.organization_id, "kommo")
        usual = (Window(self._system.settings.kommo_calls_per_second, _WINDOW_S),)
        return Bucket(f"kommo:{self._account.id}", windows or usual)

    def _note_clock(self, headers: Mapping[str, str]) -> None:
        try:
            theirs = parsedate_to_datetime(headers["date"]).timestamp()
        except (KeyError, ValueError):
            return
        self._clock_behind_s = time.time() - theirs

    def _understood(self, method: str, status: int, headers: Mapping[str, str], text: bytes) -> Any:
        if status == 204 or (status == 404 and method == "GET"):
            return None
        document = _parsed(text)
        if 200 <= status < 300:
            if document is None:
                raise Transient("Kommo's answer is not JSON", code="crm_bad_answer")
            return document
        detail = str(document.get("detail") or "")[:300] if isinstance(document, dict) else ""
        match status:
            case 429:
                raise self._limited(document, headers)
            case 403 if not isinstance(document, dict):
                why = "Kommo has blocked this account or our address, which only its support can undo"
                raise self._stopped("blocked", Permanent(why, code="crm_blocked"))
            case 403:
                raise Forbidden(f"Kommo does not allow it: {detail}", code="crm_forbidden")
            case 402:
                error = Permanent(f"Kommo asks for payment: {detail}", code="crm_payment")
                raise self._stopped("blocked", error)
            case 504:
                raise TooSlow("Kommo took too long", code="crm_busy")
            case 400 | 422:
                raise Refused(f"Kommo refused the request: {detail}", _errors_of(document))
        if status >= 500 or status in (408, 425):
            raise Transient(f"Kommo answered {status}", code="crm_busy")
        raise Permanent(f"Kommo answered {status}: {detail}", code="crm_refused")

    def _limited(self, document: Any, headers: Mapping[str, str]) -> Wait:
        named = document.get("retry_after") if isinstance(document, dict) else None
        for each in (named, headers.get("retry-after")):
            try:
                seconds = min(max(float(each), 0.1), _MOST_WAIT_S)  # type: ignore[arg-type]
                break
            except (TypeError, ValueError):
                continue
        else:
            seconds = 1.0
        self._system.limits.refused(self._bucket(), seconds)
        return Wait(seconds, "rate_limit", message=f"Kommo asks to wait {seconds:g} s")

    def _stopped(self, state: Literal["needs_reauth", "blocked"], error: Permanent) -> Permanent:
        with self._system.database.connection() as conn:
            accounts.stop(conn, self._account.organization_id, self._account.id, state, str(error))
        return error


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _errors_of(document: Any) -> dict[str, list[dict[str, Any]]]:
    listed = document.get("validation-errors") if isinstance(document, dict) else None
    found: dict[str, list[dict[str, Any]]] = {}
    for each in listed if isinstance(listed, list) else []:
        if isinstance(each, dict):
            errors = [e for e in each.get("errors") or () if isinstance(e, dict)]
            found.setdefault(str(each.get("request_id")), []).extend(errors)
    return found
