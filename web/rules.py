"""Rules over HTTP: what is paused, how much may run at once, how often others are called, what a day may cost.

A key with the scope `manage` sets them for its own organization, and never above what the operator allows. The operator's key
sets them for the organization that `X-Organization` names, or without it for each.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Final, Literal

from pydantic import ConfigDict, Field

from agentflow.jobs import budgets, registry, rule_list, rules
from agentflow.jobs.model import QUEUES
from agentflow.jobs.rule_list import Rule
from agentflow.jobs.rules import EVERY, Kind
from agentflow.jobs.text import is_storable
from agentflow.limits import MOST_CALLS, Window
from web.api import Body, Call, Query, Routes, View
from web.cursors import packed, unpacked
from web.jobs import Word
from web.problems import Refused, invalid

routes = Routes("rules")

MOST_WINDOWS: Final = 10
_LONGEST_WINDOW_S: Final = 31_536_000


class WindowRequest(Body):
    amount: Annotated[int, Field(ge=1, le=MOST_CALLS)] = Field(description="At most so many calls …")
    per_s: Annotated[int, Field(ge=1, le=_LONGEST_WINDOW_S)] = Field(description="… within any so many seconds")


class PauseRequest(Body):
    model_config = ConfigDict(json_schema_extra={"examples": [{"pause": "type", "name": "ping"}]})

    pause: Kind
    name: Word | None = Field(None, description="Of the type or queue; of an organization it is left out")
    reason: Word | None = Field(None, description="Shown to whoever asks why")


class ResumeRequest(Body):
    model_config = ConfigDict(json_schema_extra={"examples": [{"resume": "type", "name": "ping"}]})

    resume: Kind
    name: Word | None = None


class CapRequest(Body):
    model_config = ConfigDict(json_schema_extra={"examples": [{"type": "ping", "running": 3}]})

    type: Word | None = Field(None, description="Null: of all types together")
    running: Annotated[int, Field(ge=1, le=100_000)] | None = Field(description="Jobs at once; null: without a cap")


class LimitRequest(Body):
    model_config = ConfigDict(
        json_schema_extra={"examples": [{"provider": "openrouter", "windows": [{"amount": 100, "per_s": 60}]}]}
    )

    provider: Word = Field(
        description="`openrouter`, another server's host, or `type:NAME` for the starts of a type's jobs"
    )
    windows: Annotated[list[WindowRequest], Field(max_length=MOST_WINDOWS)] = Field(
        description="All of them hold; none: the default counts again"
    )


class BudgetRequest(Body):
    model_config = ConfigDict(json_schema_extra={"examples": [{"measure": "usd", "per_day": 5}]})

    measure: Annotated[str, Field(pattern=rf"^{budgets.MEASURE.pattern}$")] = Field(
        description="What attempts report: usd, tokens, tokens_in, tokens_out, model_calls, gpu_s, video_min, crm_calls …"
    )
    per_day: Annotated[float, Field(ge=1e-6, le=budgets.MOST)] | None = Field(
        description="In a day of UTC; null: without a budget"
    )


class _RuleView(View):
    organization_id: int | None = Field(description="Null: each organization")
    own: bool = Field(description="The organization has set it for itself")


class WindowView(View):
    amount: int
    per_s: int


class PauseView(_RuleView):
    kind: Literal["pause"] = "pause"
    paused: Kind
    name: str | None
    reason: str | None
    created_at: datetime


class CapView(_RuleView):
    kind: Literal["cap"] = "cap"
    type: str | None = Field(description="Null: all types together")
    running: int | None = Field(description="Null: there is no such rule any more")


class LimitView(_RuleView):
    kind: Literal["limit"] = "limit"
    provider: str
    windows: list[WindowView] = Field(description="None: there is no such rule any more")


class BudgetView(_RuleView):
    kind: Literal["budget"] = "budget"
    measure: str
    per_day: float | None = Field(description="Null: there is no such rule any more")
    used_today: float | None = Field(description="Null where it is the budget of each organization")


class Resumed(View):
    jobs: int = Field(description="So many that it held are due again")


class RuleQuery(Query):
    limit: Annotated[int, Field(ge=1, le=100)] = 50
    cursor: Annotated[str, Field(max_length=1000)] | None = Field(None, description="`next_cursor` of the page before")


class RuleList(View):
    rules: list[Annotated[PauseView | CapView | LimitView | BudgetView, Field(discriminator="kind")]]
    next_cursor: str | None


@routes.get("/api/rules", {200: RuleList}, query=RuleQuery, scope="manage")
def search(call: Call, query: RuleQuery) -> RuleList:
    """List the rules that hold for the organization: its own, and those for each. The operator's key: all."""
    after = _read_cursor(query.cursor) if query.cursor is not None else ("", 0, "")
    with call.system.database.connection() as conn:
        found = rule_list.search(conn, call.sees, after=after, limit=query.limit + 1)
    page = found[: query.limit]
    return RuleList(
        rules=[_view(rule) for rule in page], next_cursor=_cursor_of(page[-1]) if len(found) > query.limit else None
    )


@routes.post("/api/rules/pause", {200: PauseView}, body=PauseRequest, scope="manage")
def pause(call: Call, body: PauseRequest) -> PauseView:
    """Hold jobs back: of a type, or all. What runs goes on to its end. A queue is the operator's."""
    organization, own, name = _paused(call, body.pause, body.name)
    with call.system.database.transaction() as conn:
        rules.pause(conn, body.pause, name, organization, body.reason, own=own)
        made = rules.paused(conn, body.pause, name, organization)
    return PauseView(
        organization_id=organization or None,
        own=made.own,
        paused=made.kind,
        name=made.name or None,
        reason=made.reason,
        created_at=made.created_at,
    )


@routes.post("/api/rules/resume", {200: Resumed}, body=ResumeRequest, scope="manage", problems=(404,))
def resume(call: Call, body: ResumeRequest) -> Resumed:
    """End a pause: what it held back is due at once. 404: it is not paused."""
    organization, own, name = _paused(call, body.resume, body.name)
    with call.system.database.transaction() as conn:
        held = rules.resume(conn, body.resume, name, organization, own=own)
    if held is None:
        raise Refused(404, f"{body.resume} {name}".rstrip() + " is not paused")
    return Resumed(jobs=held)


@routes.post("/api/rules/cap", {200: CapView}, body=CapRequest, scope="manage")
def cap(call: Call, body: CapRequest) -> CapView:
    """How many jobs may run at once. An organization's own cap is never above the one that each has."""
    if body.type is not None:
        _check_type(call, body.type, "type")
    organization, own = _whose(call)
    with call.system.database.transaction() as conn:
        running = rules.set_cap(conn, organization, body.type or "", body.running, own=own)
    return CapView(organization_id=organization or None, own=own, type=body.type, running=running)


@routes.post("/api/rules/limit", {200: LimitView}, body=LimitRequest, scope="manage")
def limit(call: Call, body: LimitRequest) -> LimitView:
    """How often a provider may be called. An organization's own windows hold beside those that it has anyway."""
    if len({window.per_s for window in body.windows}) < len(body.windows):
        raise invalid("windows", "names a length twice")
    if body.provider.startswith("type:"):
        _check_type(call, body.provider.removeprefix("type:"), "provider")
    organization, own = _whose(call)
    windows = [Window(window.amount, window.per_s) for window in body.windows]
    with call.system.database.transaction() as conn:
        rules.set_limit(conn, organization, body.provider, windows, own=own)
    return LimitView(
        organization_id=organization or None,
        own=own,
        provider=body.provider,
        windows=[WindowView(amount=window.amount, per_s=window.per_s) for window in body.windows],
    )


@routes.post("/api/rules/budget", {200: BudgetView}, body=BudgetRequest, scope="manage")
def budget(call: Call, body: BudgetRequest) -> BudgetView:
    """What may be used up in a day of UTC; beyond it jobs wait with the reason `budget`.

    They go on at midnight, or within seconds of a larger budget. Of an organization's own and the operator's the smaller counts.
    """
    organization, own = _whose(call)
    with call.system.database.transaction() as conn:
        rules.set_budget(conn, organization, body.measure, body.per_day, own=own)
        used = budgets.used_today(conn, organization, body.measure) if organization != EVERY else None
    return BudgetView(
        organization_id=organization or None, own=own, measure=body.measure, per_day=body.per_day, used_today=used
    )


def _whose(call: Call) -> tuple[int, bool]:
    """The organization that a rule is for, and whether it sets it itself."""
    own = call.caller is not None and "admin" not in call.caller.scopes
    return EVERY if call.sees is None else call.sees, own


def _paused(call: Call, kind: Kind, name: str | None) -> tuple[int, bool, str]:
    organization, own = _whose(call)
    if kind == "organization":
        if name is not None:
            raise invalid("name", "belongs to a type or a queue; the organization is the key's, or X-Organization's")
        if organization == EVERY:
            raise invalid("X-Organization", "is missing: it names the organization", "header")
        return organization, own, ""
    if name is None:
        raise invalid("name", f"is missing: of which {kind}?")
    if kind == "type":
        _check_type(call, name, "name")
        return organization, own, name
    if own:
        raise Refused(403, "a queue belongs to all organizations: only the operator's key can pause it")
    if name not in QUEUES:
        raise invalid("name", f"is none of {', '.join(QUEUES)}")
    return EVERY, False, name


def _check_type(call: Call, name: str, field: str) -> None:
    public_only = _whose(call)[1]
    if not registry.known(name) or (public_only and not registry.get(name).public):
        raise invalid(field, str(registry.UnknownType(name)))


def _view(rule: Rule) -> Any:
    whose: dict[str, Any] = {"organization_id": rule.organization_id or None, "own": rule.own}
    match rule.kind:
        case "pause":
            return PauseView(**whose, **{**rule.says, "name": rule.says["name"] or None})
        case "cap":
            return CapView(type=rule.name or None, **whose, **rule.says)
        case "limit":
            return LimitView(provider=rule.name, **whose, **rule.says)
        case "budget":
            return BudgetView(measure=rule.name, **whose, **rule.says)


def _cursor_of(last: Rule) -> str:
    return packed([last.kind, last.organization_id, last.name])


def _read_cursor(cursor: str) -> tuple[str, int, str]:
    try:
        kind, organization, name = unpacked(cursor)
        if isinstance(organization, int) and abs(organization) < 1 << 63 and is_storable(kind) and is_storable(name):
            return kind, organization, name
    except (ValueError, TypeError, AttributeError):
        pass
    raise invalid("cursor", "is not a next_cursor of ours", "query")
