"""The outside services, all in one process: Kommo, OpenRouter, ComfyUI, and an address that webhooks are forwarded to.

    python -m ops.bench.mixing.vendors FOLDER ACCOUNTS GPUS

The first line it prints says where they are. To each line that it reads it answers what was done there so far; it ends with its
input. They take as long as the real ones, but for models and renders: those a tenth of it.
"""

from __future__ import annotations

import json
import math
import random
import re
import sys
import threading
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from tests.comfyui_server import Comfy, comfyui
from tests.http_server import Reply, Request, Server, serve
from tests.kommo_server import Account, kommo
from tests.openrouter_server import Asked, model_server

LEADS: Final = 50
#: Medians of how long they take. Most answers lie between half of it and twice as much.
KOMMO_S: Final = 0.2
RECEIVER_S: Final = 0.1
MODEL_S: Final = 0.4  # the real one: 4
RENDER_S: Final = 2.0  # the real one: 20
_SPREAD: Final = 0.35
#: A lead of each account is changed so often, or syncs would find nothing.
_STIR_S: Final = 1.0
_FORGET_S: Final = 10.0

_PASSAGE: Final = re.compile(r"^\[(\d+)\] (.*)$", re.MULTILINE)
_WORKS_FOR: Final = re.compile(r"([A-Z][a-z]+ [A-Z][a-z]+) works for ([A-Z][a-z]+ (?:LLC|GmbH))\.")


def main() -> None:
    folder, accounts, gpus = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    with ExitStack() as stack:
        crms = [stack.enter_context(kommo(rate=7, most_violations=10**9)) for _ in range(accounts)]
        for crm in crms:
            crm.faults.append(_slow_crm)
            for number in range(LEADS):
                crm.add("leads", name=f"Lead {number}", price=number, pipeline_id=7, status_id=142)
        models = stack.enter_context(model_server())
        models.reply = answer
        cards = [stack.enter_context(comfyui(_made(folder / f"gpu-{n}"))) for n in range(gpus)]
        for card in cards:
            card.durations = {"ImageInvert": RENDER_S}
        receiver = stack.enter_context(serve())
        received: Counter[str] = Counter()
        receiver.on("/", lambda request: _take(received, request))
        servers = [*(crm.server for crm in crms), models.server, receiver]
        threading.Thread(target=_live, args=(crms, servers, models), daemon=True).start()
        _say(
            {
                "kommo": [{"host": c.host, "token": c.token, "leads": list(c.things["leads"])} for c in crms],
                "openrouter": models.url,
                "comfyui": [card.url for card in cards],
                "receiver": receiver.url("/hook"),
                "receiver_host": receiver.netloc,
            }
        )
        for _ in sys.stdin:
            _say(done(crms, cards, received))


def done(crms: list[Account], cards: list[Comfy], received: Counter[str]) -> dict[str, Any]:
    """What was done how often: of notes, renders and forwarded events the numbers, and how many of them more than once."""
    notes: Counter[str] = Counter()
    for crm in crms:
        notes.update(note["params"]["text"] for note in crm.shown("leads/notes").values())
    runs = Counter(prompt for card in cards for prompt, times in card.times_run().items() for _ in range(times))
    return {
        "notes": len(notes),
        "notes_twice": sum(times > 1 for times in notes.values()),
        "renders": len(runs),
        "renders_twice": sum(times > 1 for times in runs.values()),
        "forwarded": len(received),
        "forwarded_twice": sum(times > 1 for times in received.values()),
        "kommo_429": sum(len(crm.limited) for crm in crms),
        "kommo_calls": sum(sum(crm.requests.values()) for crm in crms),
    }


def answer(asked: Asked) -> Any:
    """A model that reads: who works for whom in a document; of pictures always the same."""
    time.sleep(_pause(MODEL_S))
    match asked.schema:
        case "found":
            return _found(asked.text)
        case "verdict":
            return {"same": False}
        case "seen":
            return {"caption": "Blocks of colour.", "text": []}
        case "chapters":
            return {"chapters": [{"start_s": 0.0, "title": "Colours", "summary": "Blocks of colour drift."}]}
        case "summary":
            return {"short": "Colours.", "long": "Blocks of colour drift to the right."}
        case "tags":
            return {"tags": ["colours"]}
    return "pong"


def _found(text: str) -> dict[str, Any]:
    entities, relations = [], []
    for number, passage in _PASSAGE.findall(text):
        for said in _WORKS_FOR.finditer(passage):
            person, company = said.groups()
            quoted = {"passage": int(number), "quote": said.group()}
            entities += [
                {"name": person, "type": "person", **quoted},
                {"name": company, "type": "organization", **quoted},
            ]
            more = {"valid_from": None, "valid_to": None, "valid_quote": None}
            relations.append({"subject": person, "predicate": "works_for", "object": company, **quoted, **more})
    return {"entities": entities, "relations": relations}


def _slow_crm(_request: Request) -> None:
    time.sleep(_pause(KOMMO_S))


def _take(received: Counter[str], request: Request) -> Reply:
    time.sleep(_pause(RECEIVER_S))
    received[request.headers.get("webhook-id", "")] += 1
    return Reply()


def _pause(median_s: float) -> float:
    return min(5 * median_s, random.lognormvariate(math.log(median_s), _SPREAD))


def _live(crms: list[Account], servers: list[Server], models: Any) -> None:
    """Leads change; what the stand-ins remember for tests is let go, or an hour of it would fill the memory."""
    forget_at = time.monotonic()
    while True:
        time.sleep(_STIR_S)
        for crm in crms:
            with crm.lock:
                ids = list(crm.things["leads"])
                crm.change("leads", random.choice(ids), price=random.randrange(10**6))
        if time.monotonic() > forget_at:
            forget_at = time.monotonic() + _FORGET_S
            for server in servers:
                server.requests.clear()
            models.asked.clear()
            models.answered.clear()


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _say(what: dict[str, Any]) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    main()
