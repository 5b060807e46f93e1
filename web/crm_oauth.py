"""Connecting CRM accounts by OAuth: the user goes to Kommo, says yes, and the browser comes back with a code."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any, Final
from urllib.parse import urlencode
from uuid import UUID

from flask import Response

from agentflow.kommo import accounts, syncing
from agentflow.kommo.accounts import Credentials
from web.api import Call, Media, Routes
from web.crm import find, host_of
from web.crm_views import AuthorizationRequest, AuthorizationView, CallbackQuery
from web.cursors import packed, unpacked
from web.problems import Refused, invalid

routes = Routes("crm_oauth")

CALLBACK: Final = "/crm/oauth/callback"
STATE_S: Final = 3600
_AT_KOMMO: Final = "https://www.kommo.com/oauth"


@routes.post(
    "/api/crm/authorizations", {200: AuthorizationView}, body=AuthorizationRequest, scope="manage", problems=(404, 409)
)
def authorize(call: Call, body: AuthorizationRequest) -> AuthorizationView:
    """Begin to connect an account by OAuth, or to connect one again.

    409: the installation has no integration of its own (KOMMO_CLIENT_ID and its two companions).
    """
    settings = call.system.settings
    if not (settings.kommo_client_id and settings.kommo_client_secret and settings.kommo_redirect_uri):
        raise Refused(
            409, "set KOMMO_CLIENT_ID, KOMMO_CLIENT_SECRET and KOMMO_REDIRECT_URI to connect accounts by OAuth"
        )
    owner = find(call, body.account_id).organization_id if body.account_id is not None else call.organization_id
    expires = int(time.time()) + STATE_S
    about = {"o": owner, "a": str(body.account_id) if body.account_id else None, "n": body.name, "e": expires}
    query = urlencode({"client_id": settings.kommo_client_id, "state": state_of(call, about), "mode": "popup"})
    return AuthorizationView(url=f"{_AT_KOMMO}?{query}", expires_at=datetime.fromtimestamp(expires, UTC))


@routes.get(
    CALLBACK,
    {200: Media("text/plain", "For the person at the browser: it is connected, or it was refused")},
    query=CallbackQuery,
    open=True,
    problems=(404, 422),
)
def callback(call: Call, query: CallbackQuery) -> Response:
    """Where Kommo sends the browser. What it says is believed with a `state` of ours that is not an hour old."""
    about = _about(call, query.state)
    if query.code is None:
        said = "The account was not connected: access was refused at Kommo.\n"
        return Response(said, 200, content_type="text/plain; charset=utf-8")
    base_url = host_of(call, query.referer or "", "referer", "query")
    given = Credentials(code=query.code)
    with call.system.transaction() as transaction:
        conn, sealer = transaction.conn, call.system.sealer
        if about["a"] is None:
            name = about["n"] or base_url.partition("://")[2]
            found = accounts.create(conn, about["o"], sealer, name=name, base_url=base_url, credentials=given)
        else:
            again = accounts.reconnect(conn, about["o"], UUID(about["a"]), sealer, given, base_url=base_url)
            if again is None:
                raise Refused(404, "the account was removed meanwhile")
            found = again
        syncing.submit(transaction, found.organization_id, found.id, "incremental")
    return Response(
        "The account is being connected. You may close this window.\n", 200, content_type="text/plain; charset=utf-8"
    )


def state_of(call: Call, about: dict[str, Any]) -> str:
    text = packed(about)
    return f"{text}.{call.system.links.signature_of('crm-oauth', text)}"


def _about(call: Call, state: str) -> dict[str, Any]:
    text, _, signature = state.partition(".")
    if not call.system.links.is_signature_of("crm-oauth", text, signature):
        raise invalid("state", "was not made here", "query")
    try:
        about: dict[str, Any] = unpacked(text)
    except ValueError:
        raise invalid("state", "was not made here", "query") from None
    if about["e"] < time.time():
        raise invalid("state", "is older than an hour: begin again", "query")
    return about
