"""A Kommo account on this machine: its API v4 with its habits, its OAuth, and its faults.

    with kommo() as account:
        account.add("leads", name="L1", price=5)
        account.faults.append(lose("POST", "/api/v4/leads"))

Habits: 204 for what is empty or missing, pages by number over whatever there is at that moment, 429 beyond the rate and 403
after too many of these, refresh tokens that work once, and one wrong item refuses a whole batch.
"""

from __future__ import annotations

import base64
import copy
import itertools
import json
import random
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlencode

from tests.http_server import Reply, Request, Server, serve

HAL = {"Content-Type": "application/hal+json"}
PROBLEM = {"Content-Type": "application/problem+json"}
ACCOUNT_ID = 31_361_463
USER_ID = 8_375_357

#: Where a thing lives, and what the list there is called. Notes live under what they are about.
PATHS = {
    "leads": "leads",
    "contacts": "contacts",
    "companies": "companies",
    "tasks": "tasks",
    "events": "events",
    "users": "users",
    "leads/pipelines": "pipelines",
    "leads/notes": "notes",
    "contacts/notes": "notes",
    "companies/notes": "notes",
    "leads/custom_fields": "custom_fields",
    "contacts/custom_fields": "custom_fields",
    "companies/custom_fields": "custom_fields",
}
_ORDERS = {
    "leads": {"created_at", "updated_at", "id"},
    "contacts": {"updated_at", "id"},
    "companies": {"updated_at", "id"},
    "tasks": {"complete_till", "created_at", "id"},
    "notes": {"updated_at", "id"},
}
_SINGULAR = {"leads": "lead", "contacts": "contact", "companies": "company", "tasks": "task"}
_REQUIRED = {"tasks": ("text", "complete_till"), "notes": ("entity_id", "note_type")}

Fault = Callable[[Request], Reply | None]


@dataclass
class Grant:
    refresh: str
    used: bool = False


@dataclass
class Account:
    """`rate` calls a second are let through; `most_violations` beyond them, and the account is blocked."""

    server: Server
    rate: int = 1000
    retry_after: float = 1
    most_violations: int = 1000
    page_cap: int = 250
    clock: Callable[[], float] = time.time
    things: dict[str, dict[Any, dict[str, Any]]] = field(default_factory=lambda: {path: {} for path in PATHS})
    tokens: dict[str, float] = field(default_factory=dict)  # access tokens, and when they end
    grants: dict[str, Grant] = field(default_factory=dict)
    codes: set[str] = field(default_factory=set)
    token_lifetime_s: int = 86_400
    moved_to: str | None = None  # the host at which the account lives now
    is_admin: bool = True
    requests: Counter[str] = field(default_factory=Counter)
    limited: list[float] = field(default_factory=list)  # when 429 was answered
    blocked: bool = False
    faults: list[Fault] = field(default_factory=list)
    client: ClassVar[dict[str, str]] = {
        "client_id": "c-1",
        "client_secret": "s-1",
        "redirect_uri": "https://app.example/cb",
    }

    def __post_init__(self) -> None:
        self.lock = threading.RLock()
        self._ids = itertools.count(1000)
        self._times: deque[float] = deque()
        self.server.on("/", self.answer)
        self.token = self.new_token()
        self.put("users", id=USER_ID, name="Ann", email="a@b.c", lang="en", rights={})
        self.put("leads/pipelines", id=7, name="Pipeline", sort=1, is_main=True, account_id=ACCOUNT_ID)
        self.put("leads/custom_fields", id=900, name="Source", type="text", sort=1, entity_type="leads")

    # ---- what happens in the account ----

    @property
    def host(self) -> str:
        return self.server.netloc

    def put(self, path: str, **fields: Any) -> dict[str, Any]:
        with self.lock:
            thing = {"id": next(self._ids), **fields}
            self.things[path][thing["id"]] = thing
            return thing

    def add(self, path: str, *, at: int | None = None, **fields: Any) -> int:
        with self.lock:
            now = int(self.clock()) if at is None else at
            made = {"created_at": now, "updated_at": now, "created_by": USER_ID, "updated_by": USER_ID}
            personal = {"responsible_user_id": USER_ID, "group_id": 0, "account_id": ACCOUNT_ID}
            if path in ("leads", "contacts", "companies"):
                personal |= {"is_deleted": False, "custom_fields_values": None, "_embedded": {"tags": []}}
            return int(self.put(path, **{**made, **personal, **fields})["id"])

    def change(self, path: str, id_: int, **fields: Any) -> None:
        with self.lock:
            thing = self.things[path][id_]
            thing |= {**fields, "updated_at": max(int(self.clock()), thing["updated_at"])}

    def remove(self, path: str, id_: int, *, event: bool = True) -> None:
        with self.lock:
            del self.things[path][id_]
            if event and path in _SINGULAR:
                self.note_event(f"{_SINGULAR[path]}_deleted", _SINGULAR[path], id_)

    def note_event(self, type_: str, entity_type: str, entity_id: int) -> None:
        with self.lock:
            number = next(self._ids)
            self.things["events"][f"e{number}"] = {
                "id": f"e{number}",
                "type": type_,
                "entity_id": entity_id,
                "entity_type": entity_type,
                "created_by": USER_ID,
                "created_at": int(self.clock()),
                "value_after": [],
                "value_before": [],
                "account_id": ACCOUNT_ID,
            }

    def new_token(self, *, lifetime_s: float = 10**9) -> str:
        claims = base64.urlsafe_b64encode(json.dumps({"api_domain": self.host}).encode()).rstrip(b"=").decode()
        token = f"head{next(self._ids)}.{claims}.sign"
        self.tokens[token] = time.time() + lifetime_s
        return token

    def new_code(self) -> str:
        code = f"code-{next(self._ids)}"
        self.codes.add(code)
        return code

    def shown(self, path: str) -> dict[Any, dict[str, Any]]:
        """The list as the mirror should have it."""
        with self.lock:
            return copy.deepcopy(self.things[path])

    # ---- the wire ----

    def answer(self, request: Request) -> Reply:
        for fault in list(self.faults):
            if (reply := fault(request)) is not None:
                return reply
        return self.process(request)

    def process(self, request: Request) -> Reply:
        with self.lock:
            self.requests[f"{request.method} {request.path}"] += 1
            if self.blocked:
                return Reply(403, b"403 Forbidden", {"Content-Type": "text/plain"})
            if request.path == "/oauth2/access_token":
                return self._token(request)
            if request.path == "/oauth2/account/current/subdomain":
                return document({"domain": self.moved_to or self.host})
            if not request.path.startswith("/api/v4/"):
                return _error(404, "Not Found", f"Cannot GET {request.path}")
            if (refusal := self._limit()) is not None:
                return refusal
            bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
            if self.moved_to or self.tokens.get(bearer, 0) <= time.time():
                return _error(401, "Unauthorized", "Invalid user name or password")
            return self._api(request, request.path.removeprefix("/api/v4/"))

    def _limit(self) -> Reply | None:
        now = time.time()
        while self._times and self._times[0] <= now - 1:
            self._times.popleft()
        self._times.append(now)
        if len(self._times) <= self.rate:
            return None
        self.limited.append(now)
        if len(self.limited) > self.most_violations:
            self.blocked = True
            return Reply(403, b"403 Forbidden", {"Content-Type": "text/plain"})
        return _error(429, "Too Many Requests", "You have sent too many requests", retry_after=self.retry_after)

    def _token(self, request: Request) -> Reply:
        if request.headers.get("content-type", "").startswith("application/json"):
            asked = json.loads(request.body)
        else:
            asked = {name: values[0] for name, values in parse_qs(request.body.decode()).items()}
        if self.moved_to:
            return _error(401, "Unauthorized", "the account has moved", hint="Account not found")
        if any(asked.get(name) != value for name, value in self.client.items()):
            return _error(400, "Bad Request", "Client authentication failed", hint="Check the client")
        if asked["grant_type"] == "authorization_code":
            if asked["code"] not in self.codes:
                return _error(400, "Bad Request", "Invalid code", hint="Authorization code has been revoked")
            self.codes.remove(asked["code"])
        else:
            grant = self.grants.get(asked["refresh_token"])
            if grant is None or grant.used:
                return _error(401, "Unauthorized", "The refresh token is invalid.", hint="Token has been revoked")
            grant.used = True
        refresh = f"def50200{next(self._ids)}"
        self.grants[refresh] = Grant(refresh)
        return document(
            {
                "token_type": "Bearer",
                "expires_in": self.token_lifetime_s,
                "server_time": int(time.time()),
                "access_token": self.new_token(lifetime_s=self.token_lifetime_s),
                "refresh_token": refresh,
            }
        )

    def _api(self, request: Request, path: str) -> Reply:
        if path == "account":
            return document({"id": ACCOUNT_ID, "name": "Example", "subdomain": "example", "current_user_id": USER_ID})
        if path == "users" and not self.is_admin:
            return _error(403, "Forbidden", "Client doesn't have the required scope")
        single = re.fullmatch(r"(.+)/(\d+)", path)
        if path in PATHS and request.method == "GET":
            return self._list(path, request.pairs)
        if single and single[1] in PATHS and request.method == "GET":
            thing = self.things[single[1]].get(int(single[2]))
            return Reply(204) if thing is None else document(self._linked(single[1], thing))
        if path in PATHS and request.method in ("POST", "PATCH") and path not in ("events", "users"):
            return self._write(path, request.method, json.loads(request.body or b"null"))
        return _error(404, "Not Found", f"Cannot {request.method} {path}")

    def _list(self, path: str, pairs: Any) -> Reply:
        one = dict(pairs)
        limit, number = int(one.get("limit", 50)), int(one.get("page", 1))
        if limit > 250:
            return _error(422, "Unprocessable Entity", "Limit 250 per page")
        limit = min(limit, self.page_cap)
        found = list(self.things[path].values())
        if ids := {value for name, value in pairs if name.startswith("filter[id]")}:
            found = [each for each in found if str(each["id"]) in ids]
        for name in ("updated_at", "created_at"):
            since, to = (
                int(one.get(f"filter[{name}][{end}]", default)) for end, default in (("from", 0), ("to", 1 << 62))
            )
            if f"filter[{name}][from]" in one or f"filter[{name}][to]" in one:
                found = [each for each in found if since <= each.get(name, 0) <= to]
        order = next((name[6:-1] for name in one if name.startswith("order[")), "id")
        if order != "id" and order not in _ORDERS.get(PATHS[path], ()):
            return _error(400, "Bad Request", f"order by {order} is not supported")
        if path == "events":  # the newest first, and no order can be asked for
            found.sort(key=lambda each: (each["created_at"], each["id"]), reverse=True)
        else:  # what was changed in one second comes in any order
            found.sort(key=lambda each: (each.get(order, 0), random.random()))
        page = found if path == "leads/pipelines" else found[(number - 1) * limit : number * limit]
        if not page:
            return Reply(204)
        links = {"self": {"href": f"{self.server.url('/api/v4/')}{path}?{urlencode({'page': number, 'limit': limit})}"}}
        if path != "leads/pipelines" and len(found) > number * limit:
            links["next"] = {
                "href": f"{self.server.url('/api/v4/')}{path}?{urlencode({'page': number + 1, 'limit': limit})}"
            }
        listed = [self._linked(path, each) for each in page]
        return document({"_page": number, "_links": links, "_embedded": {PATHS[path]: listed}})

    def _linked(self, path: str, thing: dict[str, Any]) -> dict[str, Any]:
        return {
            **thing,
            "_links": {"self": {"href": f"{self.server.url('/api/v4/')}{path}/{thing['id']}?page=1&limit=50"}},
        }

    def _write(self, path: str, method: str, body: Any) -> Reply:
        if not isinstance(body, list):
            return _error(400, "Bad Request", "This value should be of type array.")
        if not body:
            return _error(400, "Bad Request", "Request data can not be empty")
        wrong = []
        for n, item in enumerate(body):
            request_id = str(item.get("request_id", n))
            if faults := self._faults_of(path, method, item):
                wrong.append({"request_id": request_id, "errors": faults})
        if wrong:
            return _error(400, "Bad Request", "Request validation failed", **{"validation-errors": wrong})
        answered = []
        for n, item in enumerate(body):
            fields = {name: value for name, value in item.items() if name not in ("id", "request_id")}
            if method == "POST":
                id_ = self.add(path, **fields)
                answered.append({"id": id_, "request_id": str(item.get("request_id", n))})
            else:
                self.change(path, item["id"], **fields)
                answered.append({"id": item["id"], "updated_at": self.things[path][item["id"]]["updated_at"]})
        return document({"_links": {}, "_embedded": {PATHS[path]: answered}})

    def _faults_of(self, path: str, method: str, item: dict[str, Any]) -> list[dict[str, str]]:
        found = []
        if method == "PATCH" and item.get("id") not in self.things[path]:
            found.append({"code": "NotFound", "path": "id", "detail": "Element not found"})
        needed = _REQUIRED.get(PATHS[path], ()) if method == "POST" else ()
        found += [{"code": "FieldMissing", "path": name, "detail": "Missing."} for name in needed if name not in item]
        known = {each["id"] for each in self.things.get(f"{path}/custom_fields", {}).values()}
        for n, value in enumerate(item.get("custom_fields_values") or []):
            if value.get("field_id") not in known:
                where = f"custom_fields_values.{n}.field_id"
                detail = "The value you selected is not a valid choice."
                found.append({"code": "NotSupportedChoice", "path": where, "detail": detail})
        if not isinstance(item.get("price", 0), int):
            found.append({"code": "InvalidType", "path": "price", "detail": "This value should be of type int."})
        return found


@contextmanager
def kommo(**habits: Any) -> Iterator[Account]:
    with serve() as server:
        yield Account(server, **habits)


# ---- faults ----


def lose(account: Account, method: str, path: str, *, times: int = 1, done: bool = True) -> Fault:
    """The answer gets lost, after what was asked for was done (or before). Then all is well."""
    left = itertools.count(times, -1)

    def fault(request: Request) -> Reply | None:
        if (request.method, request.path) != (method, path) or next(left) <= 0:
            return None
        if done:
            account.process(request)
        return Reply(raw=[], reset=True)

    return fault


def answers(method: str, path: str, reply: Reply, *, times: int = 1) -> Fault:
    left = itertools.count(times, -1)
    return lambda request: reply if (request.method, request.path) == (method, path) and next(left) > 0 else None


def document(value: Any) -> Reply:
    return Reply(200, json.dumps(value).encode(), HAL)


def _error(status: int, title: str, detail: str, **more: Any) -> Reply:
    body = {"title": title, "type": f"https://httpstatus.es/{status}", "status": status, "detail": detail, **more}
    return Reply(status, json.dumps(body).encode(), PROBLEM)
