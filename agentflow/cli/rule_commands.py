"""`agentflow rules …`: what is paused, how much may run at once, how often others may be called, and what a day may cost."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any, cast

from agentflow import organizations
from agentflow.cli import output
from agentflow.cli.direct import connected
from agentflow.cli.errors import USAGE, Failure
from agentflow.database import Connection
from agentflow.jobs import budgets, registry, rule_list, rules
from agentflow.jobs.model import QUEUES
from agentflow.jobs.rule_list import Rule
from agentflow.limits import Window


def show(as_json: bool) -> None:
    with connected() as system, system.database.connection() as conn:
        found = rule_list.search(conn, None)
        slugs: dict[int, str] = {o.id: o.slug for o in organizations.every(conn)}
    rows = [(rule.kind, rule.name or "all types", _whose(slugs, rule), _says(rule)) for rule in found]
    if as_json:
        for row in rows:
            print(json.dumps(dict(zip(("rule", "of", "organization", "says"), row, strict=True))))
    elif rows:
        output.console().print(output.table(("rule", "of", "organization", ""), rows))
    else:
        print("no rules: nothing is paused, capped, limited or budgeted but by the types themselves")


def pause(kind: str, name: str, org: str | None, reason: str | None) -> None:
    with connected() as system, system.database.transaction() as conn:
        target = _target(conn, kind, name, org)
        fresh = rules.pause(conn, *target, reason)
    print(f"{kind} {name} is paused{'' if fresh else ' already'}; what runs goes on to its end")


def resume(kind: str, name: str, org: str | None) -> None:
    with connected() as system, system.database.transaction() as conn:
        held = rules.resume(conn, *_target(conn, kind, name, org))
    if held is None:
        raise Failure(f"{kind} {name} is not paused; `agentflow rules list` shows what is")
    print(f"{kind} {name} goes on" + (f": {held} jobs are due again" if held else ""))


def cap(running: int | None, type_: str | None, org: str | None) -> None:
    if type_ is not None:
        _known_type(type_)
    with connected() as system, system.database.transaction() as conn:
        organization = _organization(conn, org) if org is not None else rules.EVERY
        rules.set_cap(conn, organization, type_ or "", running)
    whose = org or "each organization"
    print(f"{whose}: {type_ or 'jobs'} " + ("without a cap" if running is None else f"at most {running} at once"))


def limit(provider: str, windows: Sequence[str], org: str | None) -> None:
    """`windows` as 100/60 (calls in seconds); none takes the limit away."""
    parsed = [_window(text) for text in windows]
    if len({window.per_s for window in parsed}) < len(parsed):
        raise Failure("two windows have the same length; name each once", USAGE)
    if provider.startswith("type:"):
        _known_type(provider.removeprefix("type:"))
    with connected() as system, system.database.transaction() as conn:
        organization = _organization(conn, org) if org is not None else rules.EVERY
        rules.set_limit(conn, organization, provider, parsed)
    said = ", ".join(f"{w.amount} in {w.per_s:g} s" for w in parsed) or "as it is by default"
    print(f"{org or 'each organization'}: {provider} {said}")


def budget(measure: str, per_day: str, org: str | None) -> None:
    """`per_day` as a number; off takes the budget away."""
    if not budgets.MEASURE.fullmatch(measure):
        raise Failure(f"{measure!r} is no measure, such as usd, tokens or gpu_s", USAGE)
    amount = None if per_day == "off" else _amount(per_day)
    with connected() as system, system.database.transaction() as conn:
        organization = _organization(conn, org) if org is not None else rules.EVERY
        rules.set_budget(conn, organization, measure, amount)
    said = f"at most {amount:g} a day" if amount is not None else "without a budget"
    print(f"{org or 'each organization'}: {measure} {said}")


def _amount(text: str) -> float:
    try:
        amount = float(text)
    except ValueError:
        amount = math.nan
    if not 0 < amount <= budgets.MOST:
        raise Failure(f"{text!r} is neither an amount above 0 nor off", USAGE)
    return amount


def _target(conn: Connection, kind: str, name: str, org: str | None) -> tuple[rules.Kind, str, int]:
    if kind == "organization":
        if org is not None:
            raise Failure(
                "--org goes with a type; name the organization itself: agentflow rules pause organization acme", USAGE
            )
        return "organization", "", _organization(conn, name)
    if kind == "queue":
        if org is not None:
            raise Failure("--org goes with a type; a queue belongs to all organizations", USAGE)
        if name not in QUEUES:
            raise Failure(f"there is no queue {name!r}; they are {', '.join(QUEUES)}", USAGE)
        return "queue", name, rules.EVERY
    _known_type(name)
    return cast(rules.Kind, kind), name, _organization(conn, org) if org is not None else rules.EVERY


def _known_type(name: str) -> None:
    import actors  # noqa: F401 - fills the registry

    if not registry.known(name):
        raise Failure(str(registry.UnknownType(name)), USAGE)


def _organization(conn: Connection, named: str) -> int:
    found = organizations.find(conn, named)
    if found is None:
        raise Failure(f"there is no organization {named!r}; `agentflow orgs list` shows them", USAGE)
    return found.id


def _window(text: str) -> Window:
    parts = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    try:
        return Window(int(parts[1]), int(parts[2])) if parts else _no_window(text)
    except ValueError as error:
        raise Failure(f"{text}: {error}", USAGE) from None


def _no_window(text: str) -> Any:
    raise Failure(f"{text!r} is not CALLS/SECONDS, such as 100/60", USAGE)


def _whose(slugs: dict[int, str], rule: Rule) -> str:
    if rule.organization_id == rules.EVERY:
        return "all" if rule.kind == "pause" else "each"
    slug = slugs.get(rule.organization_id, str(rule.organization_id))
    return f"{slug} (its own)" if rule.own else slug


def _says(rule: Rule) -> str:
    says = rule.says
    match rule.kind:
        case "pause":
            since = output.ago(datetime.fromisoformat(says["created_at"]))
            return f"{says['reason'] or ''} ({since})".strip()
        case "cap":
            return f"{says['running']} at once"
        case "limit":
            return ", ".join(f"{w['amount']} in {w['per_s']} s" for w in says["windows"])
        case "budget":
            used = "" if says["used_today"] is None else f", {says['used_today']:g} used today"
            return f"{says['per_day']:g} a day{used}"
