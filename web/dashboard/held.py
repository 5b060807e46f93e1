"""What is in force of budgets, caps and limits of calls, whom it is from, and how much of it is used up."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from agentflow.database import Connection
from agentflow.jobs import budgets, registry, statistics
from agentflow.jobs.budgets import Used
from agentflow.jobs.rule_list import Rule, RuleKind
from agentflow.jobs.rules import EVERY, Pause, Rules
from agentflow.kommo import accounts
from agentflow.limits import Bucket, Window
from agentflow.models import endpoints
from agentflow.models.endpoints import Kind
from agentflow.organizations import Organization
from web.dashboard.frame import Visit

SetBy = Literal["each", "operator", "own", "default"]
_KINDS: Final[tuple[Kind, ...]] = ("chat", "vision", "embeddings", "transcription")
#: Of an organization so many CRM accounts are asked for; each has a limit of its own.
_MOST_ACCOUNTS: Final = 20


@dataclass(frozen=True, slots=True)
class Held:
    """What is limited. `most` is in force (None: nothing is), or the `windows`, each with the calls that it holds now (None:
    nobody can say); `edited` are those in the form. `mine`: whoever looks may take a rule away; then the next one counts."""

    name: str
    set_by: SetBy | None
    mine: bool
    changeable: bool
    most: float | None = None
    used: float | None = None
    windows: Sequence[tuple[Window, int | None]] = ()
    edited: Sequence[Window] = ()


@dataclass(frozen=True, slots=True)
class Standing:
    """An organization in the operator's list. `fullest`: its budget of which most is used up today."""

    organization: Organization
    running: int
    pause: Pause | None
    fullest: Used | None


def of_budgets(visit: Visit, conn: Connection, found: Sequence[Rule]) -> list[Held]:
    """With all that is used up today, also of what has no budget."""
    used = budgets.used_by_measure(conn, visit.sees) if visit.sees is not None else {}
    rows = []
    for name, each, one in _by_name(found, "budget", used):
        given = [rule.says["per_day"] for rule in (one, each) if rule is not None]
        most = min(given) if one is not None and one.own else next(iter(given), None)
        rows.append(_held(visit, name, each, one, most=most, used=used.get(name, 0.0)))
    return rows


def of_caps(visit: Visit, conn: Connection, found: Sequence[Rule], rules: Rules) -> list[Held]:
    """With what runs now, also of types without a cap; the name '' is all types together."""
    running = statistics.running_by_type(conn, visit.sees) if visit.sees is not None else {}
    if running:
        running[""] = sum(running.values())
    return [
        _held(visit, name, each, one, most=rules.cap_of(visit.sees or EVERY, name), used=running.get(name, 0))
        for name, each, one in _by_name(found, "cap", running)
    ]


def of_calls(visit: Visit, conn: Connection, found: Sequence[Rule], rules: Rules) -> list[Held]:
    """With the providers and types that have a limit without a rule."""
    defaults = _defaults(visit)
    rows = []
    for name, each, one in _by_name(found, "limit", defaults):
        default = defaults.get(name, ())
        windows = rules.limit_of(visit.sees or EVERY, name, default)
        rule = one or each
        edited = [Window(w["amount"], w["per_s"]) for w in rule.says["windows"]] if rule is not None else default
        counted = zip(windows, _counted(visit, conn, name, windows), strict=True)
        rows.append(_held(visit, name, each, one, windows=tuple(counted), edited=edited))
    return rows


def standings(conn: Connection, page: Sequence[Organization], pauses: Iterable[Pause]) -> list[Standing]:
    ids = [each.id for each in page]
    running = statistics.running_by_organization(conn, ids)
    nearest = budgets.nearest(conn, limit=1000, among=ids)
    fullest = {each.organization_id: each for each in reversed(nearest)}
    paused = {each.organization_id: each for each in pauses if each.kind == "organization"}
    return [Standing(each, running.get(each.id, 0), paused.get(each.id), fullest.get(each.id)) for each in page]


def _by_name(
    found: Sequence[Rule], kind: RuleKind, others: Iterable[str]
) -> Iterator[tuple[str, Rule | None, Rule | None]]:
    """Each name with the rule of every organization, and that of the one that is looked at."""
    of_each = {rule.name: rule for rule in found if rule.kind == kind and rule.organization_id == EVERY}
    of_one = {rule.name: rule for rule in found if rule.kind == kind and rule.organization_id != EVERY}
    for name in sorted({*of_each, *of_one, *others}):
        yield name, of_each.get(name), of_one.get(name)


def _held(
    visit: Visit,
    name: str,
    each: Rule | None,
    one: Rule | None,
    *,
    most: float | None = None,
    used: float | None = None,
    windows: Sequence[tuple[Window, int | None]] = (),
    edited: Sequence[Window] = (),
) -> Held:
    set_by: SetBy | None = "default" if windows else None
    if one is not None:
        set_by = "own" if one.own else "operator"
    elif each is not None:
        set_by = "each"
    changeable = visit.is_operator or one is None or one.own
    mine = changeable and (one if visit.sees is not None else each) is not None
    return Held(name, set_by, mine, changeable, most, used, windows, edited)


def _defaults(visit: Visit) -> dict[str, tuple[Window, ...]]:
    """What holds where no rule says otherwise, by provider: of the settings, and of the types."""
    found: dict[str, tuple[Window, ...]] = {}
    for kind in _KINDS:
        try:
            service = endpoints.service(visit.system.settings, endpoints.choose(visit.system.settings, kind))
        except endpoints.NotConfigured:
            continue
        found[service.provider] = service.windows
    for each in registry.every():
        if each.rate is not None:
            found[f"type:{each.name}"] = (Window(each.rate.amount, each.rate.per_s),)
    return {name: windows for name, windows in found.items() if windows}


def _counted(visit: Visit, conn: Connection, provider: str, windows: tuple[Window, ...]) -> Sequence[int | None]:
    """The calls in each window, as those who call count them; of several accounts those of the busiest."""
    if visit.sees is None:
        return [None] * len(windows)
    limits = visit.system.limits
    if provider == "kommo":
        counts = [
            limits.used(Bucket(f"kommo:{each.id}", windows))
            for each in accounts.every(conn, visit.sees, limit=_MOST_ACCOUNTS)
        ]
        known = [each for each in counts if each is not None]
        return [max(each) for each in zip(*known, strict=True)] if known else [None] * len(windows)
    name = f"{provider}:{visit.sees}" if provider.startswith("type:") else f"calls:{provider}:{visit.sees}"
    return limits.used(Bucket(name, windows)) or [None] * len(windows)
