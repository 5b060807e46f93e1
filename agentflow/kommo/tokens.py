"""The token to call an account with, and the purchase of the next one.

Each purchase uses up what it is made with: a code, or the refresh token that came with the last token. So one process at a time
buys (it holds the account's row for a minute, by a column and not by an open transaction), the intent is written before the
request is sent, and the new pair before it is used. Where the answer got lost, nobody knows whether the request arrived: it
is repeated once the hold has ended, which works if it did not; if it did, Kommo refuses, and the token at hand goes on until
its own end. Tokens are renewed at two thirds of their life, so that there is time to ask a person.
https://developers.kommo.com/docs/oauth-20
"""

from __future__ import annotations

import base64
import binascii
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from agentflow import log
from agentflow.connections import NoAnswer
from agentflow.database import Connection, Unavailable
from agentflow.errors import Permanent, Transient, Wait
from agentflow.kommo import accounts, hosts
from agentflow.kommo.accounts import Account
from agentflow.secrets import Unreadable

if TYPE_CHECKING:
    from agentflow.system import System

logger = log.get(__name__)

_HOLD_S: Final = 60
_ANSWER_S: Final = 20.0
_RENEW_AT: Final = 2 / 3
_STORE_TRIES: Final = 10


class NeedsReauth(Permanent):
    """A person has to connect the account again."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the account has to be connected again: {reason}", code="crm_needs_reauth")


@dataclass(frozen=True, slots=True)
class Access:
    token: str
    base_url: str


@dataclass(frozen=True, slots=True)
class _Purchase:
    """What one process is to send. `fallback` still works for a while; `repeated`: an answer to the same request was lost."""

    account: Account
    base_url: str
    grant_type: str
    grant: str
    grant_sealed: str
    client: dict[str, str]
    fallback: Access | None
    last_token: str | None
    repeated: bool


def access(system: System, account: Account, check: Callable[[], None], *, refused: str | None = None) -> Access:
    """The token to call with; `refused` is one that was answered with 401. Raises NeedsReauth, Transient, Wait."""
    for _ in range(3):
        try:
            with system.database.transaction() as conn:
                found = _look(system, conn, account, refused)
        except Unreadable as why:  # ours to repair
            raise Transient(f"the account's token cannot be read: {why}", code="secret_unreadable") from why
        except NeedsReauth as error:
            with system.database.connection() as conn:
                accounts.stop(conn, account.organization_id, account.id, "needs_reauth", str(error))
            raise
        if isinstance(found, Access):
            return found
        bought = _buy(system, found, check)
        if bought is not None:
            return bought
    raise Transient("another process renews the account's token", code="crm_token_busy")


def _look(system: System, conn: Connection, account: Account, refused: str | None) -> Access | _Purchase:
    row = conn.execute(
        "select base_url, auth, access_sealed, coalesce(access_expires_at > clock_timestamp() + interval '60 s', true),"
        " coalesce(access_renew_at <= clock_timestamp(), false), grant_type, grant_sealed,"
        " coalesce(grant_held_until > clock_timestamp(), false), grant_refused_at is not null, grant_begun_at is not null,"
        " client_id, client_sealed, redirect_uri from agentflow.crm_accounts"
        " where organization_id = %s and id = %s and state <> 'removed' for update",
        (account.organization_id, account.id),
    ).fetchone()
    if row is None:
        raise Permanent("the account was removed", code="crm_account_removed")
    base_url, auth, sealed, fresh, renew, grant_type, grant_sealed, held, grant_refused, begun, *client = row
    token = _open(system, account, "access", sealed)
    usable = Access(token, base_url) if token is not None and token != refused and fresh else None
    if usable and (auth == "token" or not renew or grant_refused or held):
        return usable
    if auth == "token":
        raise NeedsReauth("its long-lived token has expired or was revoked")
    if grant_refused or grant_sealed is None:
        raise NeedsReauth("its token has ended and could not be renewed")
    if held:
        raise Wait(2.0, "crm_token", message="another process renews the account's token")
    conn.execute(
        "update agentflow.crm_accounts set grant_begun_at = coalesce(grant_begun_at, clock_timestamp()),"
        " grant_held_until = clock_timestamp() + make_interval(secs => %s) where organization_id = %s and id = %s",
        (_HOLD_S, account.organization_id, account.id),
    )
    return _Purchase(
        account=account,
        base_url=base_url,
        grant_type=grant_type,
        grant=_open(system, account, "grant", grant_sealed) or "",
        grant_sealed=grant_sealed,
        client=_client(system, account, *client),
        fallback=usable,
        last_token=token,
        repeated=begun,
    )


def _client(
    system: System, account: Account, client_id: str | None, client_sealed: str | None, redirect_uri: str | None
) -> dict[str, str]:
    settings = system.settings
    installed = settings.kommo_client_secret.get_secret_value() if settings.kommo_client_secret else None
    found = {
        "client_id": client_id or settings.kommo_client_id,
        "client_secret": _open(system, account, "client", client_sealed) or installed,
        "redirect_uri": redirect_uri or settings.kommo_redirect_uri,
    }
    if missing := [name for name, value in found.items() if not value]:
        raise Permanent(f"set KOMMO_{missing[0].upper()}: the account has none of its own", code="crm_not_configured")
    return {name: str(value) for name, value in found.items()}


def _open(system: System, account: Account, what: str, sealed: str | None) -> str | None:
    if sealed is None:
        return None
    return system.sealer.open(sealed, context=accounts.context(account.organization_id, account.id, what))


def _buy(system: System, purchase: _Purchase, check: Callable[[], None]) -> Access | None:
    """None: somebody else has changed the account's credentials; look again."""
    if purchase.repeated:
        logger.warning("an answer about a token was lost; asking once more", account_id=str(purchase.account.id))
    try:
        status, document = _ask(system, purchase, purchase.base_url, check)
        if status in (401, 404) and (moved := _moved_to(system, purchase, check)) is not None:
            logger.warning("a CRM account has moved", account_id=str(purchase.account.id), host=moved)
            _remember_host(system, purchase, moved)
            status, document = _ask(system, purchase, moved, check)
    except NoAnswer as error:
        _let_go(system, purchase, sent=error.sent)
        if purchase.fallback is not None:
            return purchase.fallback
        raise
    if status == 200 and isinstance(document.get("access_token"), str):
        return _store(system, purchase, document)
    if status in (400, 401, 404):
        return _refused(system, purchase, document)
    _let_go(system, purchase, sent=True)
    if purchase.fallback is not None:
        return purchase.fallback
    raise Transient(f"Kommo answered {status} when asked for a token", code="crm_busy")


def _ask(system: System, purchase: _Purchase, base_url: str, check: Callable[[], None]) -> tuple[int, dict[str, Any]]:
    what = "code" if purchase.grant_type == "authorization_code" else "refresh_token"
    body = {**purchase.client, "grant_type": purchase.grant_type, what: purchase.grant}
    return _call(system, "POST", f"{base_url}/oauth2/access_token", check, json=body)


def _call(
    system: System,
    method: str,
    url: str,
    check: Callable[[], None],
    headers: dict[str, str] | None = None,
    **content: Any,
) -> tuple[int, dict[str, Any]]:
    with system.crm_connections.send(
        method, url, total_s=_ANSWER_S, check=check, headers=headers or {}, **content
    ) as head:
        body = head.read()
    try:
        document = json.loads(body)
    except ValueError:
        document = None
    return head.status, document if isinstance(document, dict) else {}


def _moved_to(system: System, purchase: _Purchase, check: Callable[[], None]) -> str | None:
    """Where a renamed account lives now: asked of the address that its last token names. As Kommo's own SDK does it."""
    if purchase.grant_type != "refresh_token":
        return None
    allow = system.settings.fetch_allow
    try:
        asked = hosts.base_url(_api_domain(purchase.last_token) or purchase.base_url, allow=allow)
        status, document = _call(
            system,
            "GET",
            f"{asked}/oauth2/account/current/subdomain",
            check,
            headers={"X-Refresh-Token": purchase.grant},
        )
        moved = hosts.base_url(str(document.get("domain") or ""), allow=allow) if status == 200 else None
    except (hosts.NotKommo, NoAnswer):
        return None
    return moved if moved != purchase.base_url else None


def _api_domain(token: str | None) -> str | None:
    """A claim of newer tokens. Read, not trusted: the host is checked like any other."""
    try:
        part = (token or "").split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
        return str(claims["api_domain"])
    except (IndexError, KeyError, TypeError, ValueError, binascii.Error):
        return None


def _remember_host(system: System, purchase: _Purchase, moved: str) -> None:
    account = purchase.account
    with system.database.connection() as conn:
        conn.execute(
            "update agentflow.crm_accounts set base_url = %s where organization_id = %s and id = %s",
            (moved, account.organization_id, account.id),
        )


def _store(system: System, purchase: _Purchase, document: dict[str, Any]) -> Access | None:
    """Before the token is used. The old grant is worth nothing now, so an outage of the database is waited for."""
    account = purchase.account
    lifetime_s = float(document.get("expires_in") or 86_400)
    grant = document.get("refresh_token")

    def sealed(what: str, plain: Any) -> str | None:
        where = accounts.context(account.organization_id, account.id, what)
        return system.sealer.seal(str(plain), context=where) if plain else None

    for tries_left in range(_STORE_TRIES, 0, -1):
        try:
            with system.database.connection() as conn:
                row = conn.execute(
                    "update agentflow.crm_accounts set access_sealed = %s, grant_sealed = %s,"
                    " access_expires_at = clock_timestamp() + make_interval(secs => %s),"
                    " access_renew_at = clock_timestamp() + make_interval(secs => %s), grant_type = 'refresh_token',"
                    " grant_begun_at = null, grant_held_until = null, grant_refused_at = null"
                    " where organization_id = %s and id = %s and grant_sealed = %s returning base_url",
                    (
                        sealed("access", document["access_token"]),
                        sealed("grant", grant),
                        lifetime_s,
                        lifetime_s * _RENEW_AT,
                        account.organization_id,
                        account.id,
                        purchase.grant_sealed,
                    ),
                ).fetchone()
            return Access(document["access_token"], row[0]) if row else None
        except Unavailable:
            if tries_left == 1:
                raise
            time.sleep(2.0)
    raise AssertionError("unreachable")


def _refused(system: System, purchase: _Purchase, document: dict[str, Any]) -> Access | None:
    """What the grant buys is nothing, unless another process has used it and stored what it got."""
    account = purchase.account
    with system.database.connection() as conn:
        mine = conn.execute(
            "update agentflow.crm_accounts set grant_refused_at = clock_timestamp(), grant_held_until = null"
            " where organization_id = %s and id = %s and grant_sealed = %s",
            (account.organization_id, account.id, purchase.grant_sealed),
        ).rowcount
        if not mine:
            return None
        if purchase.fallback is not None:
            logger.error(
                "a CRM account's token cannot be renewed: connect the account again before it ends",
                account_id=str(account.id),
                ends_at=str(account.access_expires_at),
            )
            return purchase.fallback
        why = str(document.get("hint") or document.get("detail") or "no reason was named")[:200]
        lost = "; the answer to an earlier request was lost" if purchase.repeated else ""
        error = NeedsReauth(f"Kommo refused to renew its token ({why}{lost})")
        accounts.stop(conn, account.organization_id, account.id, "needs_reauth", str(error))
    raise error


def _let_go(system: System, purchase: _Purchase, *, sent: bool) -> None:
    """With a token at hand the hold stays: no call asks again within the minute."""
    account = purchase.account
    with system.database.connection() as conn:
        conn.execute(
            "update agentflow.crm_accounts set grant_begun_at = case when %s then grant_begun_at end,"
            " grant_held_until = case when %s then grant_held_until end"
            " where organization_id = %s and id = %s and grant_sealed = %s",
            (sent, purchase.fallback is not None, account.organization_id, account.id, purchase.grant_sealed),
        )
