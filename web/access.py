"""Who is asking: the bearer key of a request, and the organization it acts for."""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from functools import cached_property

from agentflow.system import System
from web.problems import Refused


@dataclass(frozen=True, slots=True)
class Caller:
    """`organization_id` is what new rows belong to and what may be seen."""

    organization_id: int


class Access:
    """The one place that looks at keys. In this version there is one, the operator's, for organization 1."""

    def __init__(self, system: System) -> None:
        self._system = system

    def caller(self, authorization: str | None) -> Caller:
        """Raises Refused with 401. Nothing of the body has been read by then."""
        if not authorization:
            raise _unauthorized("a key is needed: Authorization: Bearer <key>")
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer":
            raise _unauthorized("the scheme must be Bearer: Authorization: Bearer <key>")
        if not hmac.compare_digest(key.strip().encode(), self._admin_key):
            raise _unauthorized("this key is not known", error="invalid_token")
        return Caller(organization_id=1)

    @cached_property
    def _admin_key(self) -> bytes:
        return self._system.admin_key().encode()


def _unauthorized(detail: str, *, error: str | None = None) -> Refused:
    challenge = 'Bearer realm="agentflow"' + (f', error="{error}"' if error else "")
    return Refused(401, detail, headers={"WWW-Authenticate": challenge})
