"""Services outside of the installation, as its jobs meet with them: who waits for them, what failed of them, who has stopped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from agentflow.comfyui import pool
from agentflow.database import Connection
from agentflow.jobs import statistics
from agentflow.jobs.statistics import Queue
from agentflow.kommo import accounts
from agentflow.models import endpoints
from agentflow.settings import Settings
from agentflow.webhooks import silence
from web.dashboard.frame import Visit
from web.dashboard.words import plural, say

Name = Literal["models", "crm", "telegram", "renders", "addresses", "webhooks"]
State = Literal["well", "look", "bad", "off"]

LATELY_S: Final = 3600
#: By what the codes of errors, and the reasons of waiting that are such codes, begin with; and those that are the asker's fault.
_CODES: Final[Mapping[Name, tuple[str, ...]]] = {
    "models": ("model_",),
    "crm": ("crm_", "rate_limit"),
    "telegram": ("telegram_",),
    "renders": (
        "comfyui_",
        "render_refused",
        "render_node_error",
        "render_out_of_memory",
        "render_timeout",
        "render_lost",
    ),
    "addresses": ("url_timeout", "url_unreachable", "url_tls", "url_busy", "url_cut"),
}
_NOT_THEIRS: Final = frozenset(
    {"model_being_deleted", "model_dimensions", "model_too_large", "crm_account_removed", "crm_not_configured"}
)


@dataclass(frozen=True, slots=True)
class Service:
    """`waiting` jobs wait for it now, `failed` have within the last hour; `stopped` says who of it is away, in words."""

    name: Name
    state: State
    waiting: int = 0
    failed: int = 0
    stopped: str | None = None


def services(visit: Visit, conn: Connection, queues: Sequence[Queue]) -> list[Service]:
    """Machines and senders are the operator's."""
    failed = statistics.failed_by_code(conn, visit.sees, LATELY_S)
    waiting: dict[str, int] = {}
    for queue in queues:
        for reason, number in queue.parked.items():
            waiting[reason] = waiting.get(reason, 0) + number
    looks: dict[Name, Callable[[], tuple[bool, str | None]]] = {
        "models": lambda: (_asks_models(visit.system.settings), None),
        "crm": lambda: _crm(conn, visit.sees),
        "telegram": lambda: (visit.system.settings.telegram_bot_token is not None, None),
        "addresses": lambda: (True, None),
    }
    if visit.is_operator:
        looks |= {"renders": lambda: _servers(conn), "webhooks": lambda: _senders(conn)}
    found = []
    for name, look in looks.items():
        is_used, stopped = look()
        waits, fails = _of(name, waiting), _of(name, failed)
        state: State = "bad" if stopped else "look" if waits or fails else "well" if is_used else "off"
        found.append(Service(name, state, waits, fails, stopped))
    return found


def named(name: Name) -> str:
    return {
        "models": say("Language models"),
        "crm": say("CRM"),
        "telegram": say("Telegram"),
        "renders": say("Render servers"),
        "addresses": say("Addresses that jobs ask"),
        "webhooks": say("Senders of webhooks"),
    }[name]


def _of(name: Name, by_code: Mapping[str, int]) -> int:
    beginnings = _CODES.get(name, ())
    return sum(number for code, number in by_code.items() if code.startswith(beginnings) and code not in _NOT_THEIRS)


def _asks_models(settings: Settings) -> bool:
    try:
        endpoints.choose(settings, "chat")
    except endpoints.NotConfigured:
        return False
    return True


def _crm(conn: Connection, organization_id: int | None) -> tuple[bool, str | None]:
    states = accounts.by_state(conn, organization_id)
    stopped = states.get("needs_reauth", 0) + states.get("blocked", 0)
    return bool(states), plural(stopped, "{n} account has stopped", "{n} accounts have stopped") if stopped else None


def _servers(conn: Connection) -> tuple[bool, str | None]:
    known = pool.servers(conn)
    away = sum(not each.well for each in known)
    return bool(known), plural(away, "{n} server gets no work", "{n} servers get no work") if away else None


def _senders(conn: Connection) -> tuple[bool, str | None]:
    watched = silence.watches(conn)
    quiet = sum(each.is_silent for each in watched)
    return bool(watched), plural(quiet, "{n} sender is silent", "{n} senders are silent") if quiet else None
