"""Who is asking: the bearer key of a request, the organization it acts for, and what it may do."""

from __future__ import annotations

import hashlib
import hmac
import math
import time
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Literal
from uuid import UUID

import redis
from flask import Request
from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage, RedisStorage
from limits.strategies import FixedWindowRateLimiter

from agentflow import log, metrics, organizations, redis_client
from agentflow.organizations import DEFAULT_ORGANIZATION, SCOPES, Presented
from agentflow.system import System
from web.address import Proxies
from web.problems import Refused, invalid

logger = log.get(__name__)

#: What an operation asks for. `admin` is the operator's key alone.
Needed = Literal["submit", "read", "manage", "webhooks", "admin"]

ORGANIZATION_HEADER: Final = "X-Organization"
#: A key that was good is not looked up again for so long: within these seconds a revoked one stops working, in every process.
REMEMBERED_S: Final = 3.0
_MOST_REMEMBERED: Final = 10_000
_REDIS_PAUSE_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Caller:
    """`organization_id` is what new rows belong to; `sees` whose rows may be found (None: everybody's)."""

    organization_id: int
    sees: int | None
    scopes: frozenset[Needed]


class Access:
    """The one place that looks at keys."""

    def __init__(self, system: System) -> None:
        self._system = system
        self._proxies = Proxies(system.settings.trusted_proxies)
        self._failures = Failures(system)
        self._remembered: dict[bytes, tuple[Caller, str, float]] = {}

    def caller(self, request: Request, needed: Needed) -> Caller:
        """Raises Refused with 401, 403, 429, or 422 for an unknown organization. Nothing of the body has been read by then."""
        authorization = request.headers.get("Authorization")
        if not authorization:
            raise _unauthorized("a key is needed: Authorization: Bearer <key>")
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer":
            raise _unauthorized("the scheme must be Bearer: Authorization: Bearer <key>")
        named = request.headers.get(ORGANIZATION_HEADER)
        if hmac.compare_digest(key.strip().encode(), self._admin_key):
            caller = self._operator(named)
        else:
            caller, slug = self._customer(key.strip(), request)
            if named is not None and named not in (slug, str(caller.organization_id)):
                raise Refused(403, f"this key belongs to another organization than {ORGANIZATION_HEADER} names")
        if needed not in caller.scopes:
            if needed == "admin":
                raise Refused(403, "only the operator's key (ADMIN_API_KEY) may do this", headers=_challenge("admin"))
            raise Refused(403, f"this key lacks the scope `{needed}`", headers=_challenge(needed))
        return caller

    def holder(self, key: str, request: Request) -> UUID | None:
        """The id of a good key that somebody signs in with; None: it is the operator's. Raises Refused with 401, 429."""
        if hmac.compare_digest(key.encode(), self._admin_key):
            return None
        return self._presented(key, request).id

    @property
    def operator_key(self) -> bytes:
        return self._admin_key

    def _operator(self, named: str | None) -> Caller:
        scopes: frozenset[Needed] = frozenset((*SCOPES, "admin"))
        if named is None:
            return Caller(DEFAULT_ORGANIZATION, None, scopes)
        with self._system.database.connection() as conn:
            organization = organizations.find(conn, named)
        if organization is None:
            raise invalid(ORGANIZATION_HEADER, "names no organization, neither by slug nor by number", "header")
        return Caller(organization.id, organization.id, scopes)

    def _customer(self, key: str, request: Request) -> tuple[Caller, str]:
        digest = hashlib.sha256(key.encode()).digest()
        known = self._remembered.get(digest)
        if known is not None and time.monotonic() < known[2]:
            return known[0], known[1]
        self._remembered.pop(digest, None)
        asked_at = time.monotonic()  # before the look: a revocation that comes after it is noticed within the bound
        found = self._presented(key, request)
        caller = Caller(found.organization_id, found.organization_id, frozenset(found.scopes))
        if len(self._remembered) >= _MOST_REMEMBERED:
            self._remembered.clear()
        good_for_s = min(REMEMBERED_S, found.expires_in_s if found.expires_in_s is not None else REMEMBERED_S)
        self._remembered[digest] = (caller, found.organization_slug, asked_at + good_for_s)
        return caller, found.organization_slug

    def _presented(self, key: str, request: Request) -> Presented:
        found = None
        if organizations.looks_like_key(key):
            with self._system.database.connection() as conn:
                found = organizations.present(conn, key)
        if found is None or found.state != "good":
            why = found.state if found is not None else "unknown"
            metrics.key_refused(why)
            self._failures.count(self._proxies.client_of(request))
            said = "is not known" if why == "unknown" else "was revoked" if why == "revoked" else "has expired"
            raise _unauthorized(f"this key {said}", error="invalid_token")
        return found

    @cached_property
    def _admin_key(self) -> bytes:
        return self._system.admin_key().encode()


class Failures:
    """How often an address came with a wrong key in this minute: in Redis for all processes, else in each by itself.

    Asked only after a key turned out to be wrong, so a right one is never held up, whoever shares its address.
    """

    def __init__(self, system: System) -> None:
        self._system = system
        self._most = RateLimitItemPerMinute(system.settings.auth_failures_per_minute)
        self._alone = FixedWindowRateLimiter(MemoryStorage())
        self._redis_again_at = 0.0

    def count(self, address: str) -> None:
        """Raises Refused with 429 when it was too often."""
        allowed, seconds = self._hit(address)
        if not allowed:
            metrics.key_refused("limited")
            wait_s = max(1, math.ceil(seconds))
            raise Refused(
                429,
                f"too many wrong keys came from this address; wait {wait_s} s",
                headers={"Retry-After": str(wait_s)},
            )

    def _hit(self, address: str) -> tuple[bool, float]:
        if time.monotonic() >= self._redis_again_at:
            try:
                return self._ask(self._shared, address)
            except (redis.RedisError, OSError):
                self._redis_again_at = time.monotonic() + _REDIS_PAUSE_S
        return self._ask(self._alone, address)

    def _ask(self, limiter: FixedWindowRateLimiter, address: str) -> tuple[bool, float]:
        if limiter.hit(self._most, address):
            return True, 0.0
        return False, limiter.get_window_stats(self._most, address).reset_time - time.time()

    @cached_property
    def _shared(self) -> FixedWindowRateLimiter:
        # Quick to give up: whoever guesses must not hold a thread while Redis is away.
        client = redis_client.connect(
            self._system.redis_url,
            connect_timeout_s=1.0,
            client_name=self._system.application_name,
            answer_timeout_s=1.0,
        )
        prefix = f"{self._system.settings.job_queue_name}:wrong-keys"
        return FixedWindowRateLimiter(
            RedisStorage("redis://", connection_pool=client.connection_pool, key_prefix=prefix)
        )


def _unauthorized(detail: str, *, error: str | None = None) -> Refused:
    challenge = 'Bearer realm="agentflow"' + (f', error="{error}"' if error else "")
    return Refused(401, detail, headers={"WWW-Authenticate": challenge})


def _challenge(scope: str) -> dict[str, str]:
    """RFC 6750, 3.1."""
    return {"WWW-Authenticate": f'Bearer realm="agentflow", error="insufficient_scope", scope="{scope}"'}
