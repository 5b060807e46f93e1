"""Signing in with an API key, and out."""

from __future__ import annotations

from typing import Final
from urllib.parse import urlsplit

from flask import Response, render_template, request

from agentflow import sessions
from web.api import Services
from web.dashboard import frame
from web.dashboard.frame import Pages, Visit, link
from web.dashboard.words import say
from web.problems import Refused

pages = Pages()

_MOST_CHARACTERS: Final = 500


@pages.get("/sign-in", scope=None)
def sign_in(services: Services) -> Response:
    if frame.visitor(services) is not None:
        return frame.to(_next())
    return _form(200)


@pages.post("/sign-in", scope=None)
def try_key(services: Services) -> Response:
    _refuse_others()
    key = request.form.get("key", "").strip()[:_MOST_CHARACTERS]
    if not key:
        return _form(422, say("Enter a key."))
    try:
        key_id = services.access.holder(key, request)
    except Refused as error:
        if error.status == 429:
            wait_s = error.headers.get("Retry-After", "60")
            answer = _form(429, say("Too many wrong keys came from this address. Wait {n} s.", n=wait_s))
            answer.headers["Retry-After"] = wait_s
            return answer
        return _form(401, say("This key does not open anything: it is unknown, revoked or has expired."))
    with services.system.database.connection() as conn:
        token = sessions.begin(conn, key_id, services.access.operator_key)
    answer = frame.to(_next())
    answer.set_cookie(
        frame.COOKIE,
        token,
        max_age=int(sessions.LASTS_S),
        path=frame.PREFIX,
        httponly=True,
        samesite="Strict",
        secure=frame.is_secure(),
    )
    return answer


@pages.post("/sign-out", scope="read")
def sign_out(visit: Visit) -> Response:
    with visit.system.database.connection() as conn:
        sessions.end(conn, visit.token)
    answer = frame.to(link("sign_in", organization=None))
    answer.delete_cookie(frame.COOKIE, path=frame.PREFIX)
    return answer


def _form(status: int, problem: str | None = None) -> Response:
    return frame.html(render_template("sign_in.html", visit=None, problem=problem, next=_next()), status)


def _next() -> str:
    """Where the visitor wanted to go: a page of ours and nothing else."""
    wanted = request.values.get("next", "")
    parts = urlsplit(wanted)
    ours = parts.path == frame.PREFIX or parts.path.startswith(f"{frame.PREFIX}/")
    return wanted if ours and not parts.scheme and not parts.netloc and "\\" not in wanted else link("overview")


def _refuse_others() -> None:
    """Before there is a session there is no form token: the browser says whose page the form is on."""
    site, origin = request.headers.get("Sec-Fetch-Site"), request.headers.get("Origin")
    if site in ("cross-site", "same-site") or (
        origin is not None and site is None and urlsplit(origin).netloc != request.host
    ):
        raise Refused(403, say("This form was sent from another site."))
