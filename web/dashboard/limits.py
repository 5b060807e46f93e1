"""Limits: what is used up of them, changed in place; and what is paused. Of one organization, or what holds for each."""

from __future__ import annotations

from typing import Any, Final

from flask import Response, request

from agentflow import organizations
from agentflow.jobs import registry, rule_list
from agentflow.jobs.model import QUEUES
from agentflow.jobs.rules import EVERY, Kind
from web import rules as api
from web.api import validated
from web.dashboard import held
from web.dashboard.frame import Pages, Visit
from web.dashboard.words import plural, say
from web.problems import Refused

pages = Pages()

#: Organizations on a page.
PAGE: Final = 50
_MOST_PAUSES: Final = 100
_MOST_CHARACTERS: Final = 200
#: What jobs report most; others can be typed in.
MEASURES: Final = ("usd", "tokens", "gpu_s", "video_min", "crm_calls", "model_calls")
_FORM: Final = "form"


@pages.get("/limits", scope="manage")
def limits(visit: Visit) -> Response:
    rules = visit.system.rules.anew()
    pauses = [
        each for each in rules.pauses.values() if visit.sees is None or each.organization_id in (EVERY, visit.sees)
    ]
    with visit.system.database.connection() as conn:
        found = rule_list.search(conn, EVERY if visit.sees is None else visit.sees)
        listed = organizations.every(conn, after=_after(), limit=PAGE + 1) if visit.sees is None else []
        standings = held.standings(conn, listed[:PAGE], pauses) if listed else []
        values: dict[str, Any] = {
            "budgets": held.of_budgets(visit, conn, found),
            "caps": held.of_caps(visit, conn, found, rules),
            "calls": held.of_calls(visit, conn, found, rules),
            "standings": standings,
            "more": listed[PAGE - 1].id if len(listed) > PAGE else None,
            "is_first": not _after(),
            "pauses": pauses[:_MOST_PAUSES],
            "whole_pause": next(
                (each for each in pauses if each.kind == "organization" and each.organization_id == visit.sees), None
            ),
            "slugs": {each.id: each.slug for each in visit.organizations()},
        }
    part = request.args.get("part")
    if part in ("organizations", "used"):
        return visit.part(f"limits_{part}.html", **values)
    types = registry.every() if visit.is_operator else registry.public()
    names = sorted(each.name for each in types)
    return visit.page("limits.html", **values, types=names, queues=QUEUES, measures=MEASURES)


# ---- changes ----


@pages.post("/limits/budget", scope="manage")
def set_budget(visit: Visit) -> Response:
    measure, per_day = _text("measure"), None if _is_removal() else _amount("per_day")
    api.budget(visit, validated(lambda: api.BudgetRequest(measure=measure, per_day=per_day), _FORM))
    return _back(visit, measure, removed=per_day is None)


@pages.post("/limits/cap", scope="manage")
def set_cap(visit: Visit) -> Response:
    type_ = _text("type") or None
    running = None if _is_removal() else _number("running", _text("running"))
    api.cap(visit, validated(lambda: api.CapRequest(type=type_, running=running), _FORM))
    return _back(visit, type_ or say("all types together"), removed=running is None)


@pages.post("/limits/calls", scope="manage")
def set_calls(visit: Visit) -> Response:
    """The windows of a provider, as pairs of fields; a pair that is left empty is none."""
    provider = _text("provider")
    pairs = zip(request.form.getlist("amount"), request.form.getlist("per_s"), strict=False)
    asked = [] if _is_removal() else [(a.strip(), s.strip()) for a, s in pairs if a.strip() or s.strip()]
    if not asked and not _is_removal():
        raise Refused(422, say("Say how many calls, and within how many seconds."))
    windows = [{"amount": _number("amount", amount), "per_s": _number("per_s", per_s)} for amount, per_s in asked]
    body = validated(lambda: api.LimitRequest.model_validate({"provider": provider, "windows": windows}), _FORM)
    api.limit(visit, body)
    return _back(visit, provider, removed=not windows)


@pages.post("/limits/pause", scope="manage")
def pause(visit: Visit) -> Response:
    kind, name = _what()
    asked = {"pause": kind, "name": name, "reason": _text("reason") or None}
    api.pause(visit, validated(lambda: api.PauseRequest.model_validate(asked), _FORM))
    return visit.go("limits", said=say("{what}: paused.", what=_named(visit, kind, name)), **_where())


@pages.post("/limits/resume", scope="manage")
def resume(visit: Visit) -> Response:
    kind, name = _what()
    resumed = api.resume(
        visit, validated(lambda: api.ResumeRequest.model_validate({"resume": kind, "name": name}), _FORM)
    )
    said = say("{what}: goes on.", what=_named(visit, kind, name))
    if resumed.jobs:
        said += " " + plural(resumed.jobs, "{n} job that it held is due.", "{n} jobs that it held are due.")
    return visit.go("limits", said=said, **_where())


def _text(name: str) -> str:
    return request.form.get(name, "").strip()[:_MOST_CHARACTERS]


def _is_removal() -> bool:
    return "remove" in request.form


def _amount(name: str) -> float:
    try:
        return float(_text(name).replace(",", "."))
    except ValueError:
        raise _no_number(name) from None


def _number(name: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 15):
        raise _no_number(name)
    return int(text)


def _no_number(name: str) -> Refused:
    return Refused(422, say("{field} must be a number, as 100.", field=name))


def _what() -> tuple[Kind | str, str | None]:
    """Of what kind, and its name: an organization is the one that is looked at."""
    kind = _text("kind")
    return kind, _text("name") or None if kind != "organization" else None


def _named(visit: Visit, kind: str, name: str | None) -> str:
    if kind == "organization":
        return visit.organization.name if visit.organization else say("The organization")
    return say("The queue {name}", name=name) if kind == "queue" else say("Jobs of type {name}", name=name)


def _where() -> dict[str, Any]:
    """Back to the list of all organizations, where the form was there."""
    return {"organization": None} if _text("from") == "all" else {}


def _after() -> int:
    text = request.args.get("after", "")
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 18 else 0


def _back(visit: Visit, name: str, *, removed: bool) -> Response:
    if removed:
        return visit.go("limits", said=say("{name}: the rule is taken away.", name=name))
    return visit.go("limits", said=say("{name}: the limit is changed.", name=name))
