"""A Kommo account in a process of its own, so that what it costs is not counted as the sync's.

`python -m ops.bench.profiling.account LEADS CONTACTS` says where it is in a line of JSON, and then answers each line it is
given: `change N` changes so many things, makes a tenth as many and deletes as many; `calls` says how many came since it was
asked last.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from tests.kommo_server import USER_ID, Account, kommo
from tests.processes import ROOT

_FIRST = 1_600_000_000
_FIELDS = 8
_WORDS = ["invoice", "harbour", "paquete", "ledger", "Rechnung", "счёт", "visita", "delivery", "renewal", "onboarding"]


class Remote:
    """The account, from outside its process."""

    def __init__(self, process: subprocess.Popen[str], host: str, token: str) -> None:
        self._process = process
        self.host = host
        self.token = token

    def ask(self, line: str) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@contextmanager
def remote(leads: int, contacts: int) -> Iterator[Remote]:
    command = [sys.executable, "-m", "ops.bench.profiling.account", str(leads), str(contacts)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield Remote(process, **json.loads(process.stdout.readline()))
    finally:
        process.kill()
        process.wait()


def as_server(account: Remote) -> Any:
    """What tests.kommo_support.connect wants of an account."""
    return SimpleNamespace(host=account.host, token=account.token)


def main() -> None:
    leads, contacts = map(int, sys.argv[1:])
    chance = random.Random(3)
    with kommo(rate=1_000_000) as account:
        _fill(account, leads, contacts, chance)
        _say({"host": account.host, "token": account.token})
        for line in sys.stdin:
            match line.split():
                case ["change", number]:
                    _change(account, int(number), chance)
                    _say(int(number))
                case ["calls"]:
                    _say(sum(account.requests.values()))
                    account.requests.clear()


def _say(what: Any) -> None:
    print(json.dumps(what), flush=True)


def _fill(account: Account, leads: int, contacts: int, chance: random.Random) -> None:
    """Of each ten leads a task, a note and a company; all with the fields that an account in use has filled in."""
    for n in range(contacts):
        account.add("contacts", at=_FIRST + n // 4, **_person(f"Contact {n}", chance))
    for n in range(leads):
        linked = {"tags": _tags(chance), "contacts": [{"id": 1000 + n, "is_main": True}], "companies": []}
        account.add(
            "leads",
            at=_FIRST + 60 * n,
            **{**_person(f"Lead {n}", chance), "_embedded": linked},
            price=n,
            pipeline_id=7,
            status_id=142,
            loss_reason_id=None,
            closed_at=None,
            score=None,
        )
    for n in range(leads // 10):
        account.add("companies", at=_FIRST + n, **_person(f"Company {n}", chance))
        account.add("tasks", at=_FIRST + 30 * n, text=_text(chance, 12), complete_till=_FIRST, entity_id=n)
        account.add(
            "leads/notes",
            at=_FIRST + 30 * n,
            entity_id=n,
            note_type="common",
            params={"text": _text(chance, 60)},
        )


def _person(name: str, chance: random.Random) -> dict[str, Any]:
    fields = [
        {
            "field_id": 900 + n,
            "field_name": f"Field {n}",
            "field_code": None,
            "field_type": "text",
            "values": [{"value": _text(chance, 4)}],
        }
        for n in range(_FIELDS)
    ]
    return {
        "name": name,
        "closest_task_at": None,
        "custom_fields_values": fields,
        "_embedded": {"tags": _tags(chance), "companies": []},
    }


def _tags(chance: random.Random) -> list[dict[str, Any]]:
    return [{"id": n, "name": chance.choice(_WORDS), "color": None} for n in range(2)]


def _text(chance: random.Random, words: int) -> str:
    return " ".join(chance.choices(_WORDS, k=words))


def _change(account: Account, number: int, chance: random.Random) -> None:
    paths = ("leads", "contacts", "companies", "tasks", "leads/notes")
    every = [(path, id_) for path in paths for id_ in account.things[path]]
    for path, id_ in chance.sample(every, number):
        account.change(path, id_, updated_by=USER_ID, name=_text(chance, 3))
    for path, id_ in chance.sample([(p, i) for p, i in every if p in ("leads", "contacts")], number // 10):
        account.remove(path, id_)
    for _ in range(number // 10):
        account.add("leads", **_person("new", chance), price=1, pipeline_id=7, status_id=142)


if __name__ == "__main__":
    main()
