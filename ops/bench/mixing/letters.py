"""What comes in, by kind and share, and how each is handed in by the public ways.

The shares are those of a CRM with bots: events of others are nearly a third of the jobs, two thirds are short work of the team's
own, of which most comes in mailings, and one job in thirty is something longer. Rates count jobs, and a letter may lead to
several.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlencode

BATCH: Final = 50
#: What a short job of the team's own waits for somebody else: a message sent by a bot's API, a look into another service.
SHORT_MS: Final = 50
#: Names that documents speak of; as in life, most of them are known already.
PEOPLE: Final = tuple(
    f"{first} {last}"
    for first in ("Anna", "Boris", "Clara", "David", "Elena", "Felix", "Galina", "Henry")
    for last in ("Adams", "Berg", "Costa", "Dunn", "Ermakova", "Fischer")
)
COMPANIES: Final = tuple(
    f"{name} {kind}" for name in ("Atlas", "Birch", "Comet", "Delta", "Ember", "Fjord") for kind in ("LLC", "GmbH")
)
_FILLER: Final = (
    "The customer asked about delivery times and was told that orders leave within two working days.",
    "Returns are taken for thirty days, with the receipt and in the original box.",
    "The second call was about the invoice of last month, which had been sent to an old address.",
    "A discount of five percent was agreed for orders above two hundred pieces.",
    "The meeting was moved to Thursday because the warehouse is closed on Wednesday.",
)

#: A POST: path, body, headers. Answers what was said with 2xx.
Post = Callable[[str, bytes, Mapping[str, str]], dict[str, Any]]


@dataclass(frozen=True)
class Kind:
    """`per_100`: letters a second of about 100 jobs a second. `makes`: the jobs that one leads to, not counting the
    syncs that webhooks of Kommo bring about: those wait until it is quiet, and are few. `events`: its answer names an event."""

    name: str
    per_100: float
    makes: Mapping[str, int]
    what: str
    events: bool = False

    @property
    def jobs(self) -> int:
        return sum(self.makes.values())


KINDS: Final = (
    Kind("bot message", 10.0, {"handle_webhook": 1, "ping": 1}, f"a signed webhook that makes a job of {SHORT_MS} ms", True),
    Kind("CRM event", 10.0, {"handle_webhook": 1}, "a webhook of Kommo's: what it names is read again by a sync", True),
    Kind("payment event", 8.0, {"handle_webhook": 1}, "a signed webhook of Stripe's, kept", True),
    Kind("forwarded event", 1.5, {"handle_webhook": 1, "forward_webhook": 1}, "a signed webhook that goes on elsewhere", True),
    Kind("short job", 6.0, {"ping": 1}, f"POST /api/jobs, {SHORT_MS} ms"),
    Kind("batch", 1.0, {"ping": BATCH}, f"POST /api/jobs/batch, {BATCH} jobs of {SHORT_MS} ms: a mailing"),
    Kind("note", 1.5, {"write_crm": 1}, "a note is written to a lead at Kommo"),
    Kind("document", 0.08, {"generate_embeddings": 1}, "a text of 250 words, vectors by the local model"),
    Kind("document with graph", 0.04, {"generate_embeddings": 1, "extract_graph": 1}, "and what it speaks of, by a model"),
    Kind("render", 0.05, {"comfy_render": 1}, "a small graph of ComfyUI's"),
    Kind("video", 0.01, {"analyze_video": 1}, "an upload of 3 s, 320 x 180, with captions, summary and tags by a model"),
)  # fmt: skip
BY_NAME: Final = {kind.name: kind for kind in KINDS}


def rates(jobs_per_s: float) -> dict[str, float]:
    """Letters of each kind a second for so many jobs a second."""
    per_100 = sum(kind.per_100 * kind.jobs for kind in KINDS)
    return {kind.name: jobs_per_s * kind.per_100 / per_100 for kind in KINDS}


def shares() -> dict[str, float]:
    """Of the jobs, by their type."""
    whole = sum(kind.per_100 * kind.jobs for kind in KINDS)
    found: dict[str, float] = {}
    for kind in KINDS:
        for type_, count in kind.makes.items():
            found[type_] = found.get(type_, 0.0) + kind.per_100 * count / whole
    return found


@dataclass(frozen=True)
class Customer:
    """An organization: its key, where its webhooks go and what they are signed with, its account at Kommo and leads there."""

    key: str
    account: str
    leads: tuple[int, ...]
    bot: tuple[str, str]  # path, secret
    payments: tuple[str, str]
    forwarded: tuple[str, str]
    crm: str


def weights(count: int) -> list[float]:
    """Large customers and small ones: the largest of 20 brings a tenth, the smallest a fortieth."""
    return [1 / (rank + 6) for rank in range(count)]


def hand_in(kind: str, number: int, customer: Customer, clip: bytes, post: Post) -> list[str]:
    """The ids of what was accepted: jobs, or the event of a webhook."""
    return _WAYS[kind](number, customer, clip, post)


def _bot_message(number: int, customer: Customer, _clip: bytes, post: Post) -> list[str]:
    body = _json(
        {
            "id": f"update-{number}",
            "chat": {"id": 1000 + number % 5000, "type": "private", "language": "en"},
            "from": {"id": 1000 + number % 5000, "name": random.choice(PEOPLE)},
            "text": random.choice(_FILLER),
            "date": int(time.time()),
        }
    )
    path, secret = customer.bot
    return [_event(post(path, body, {"X-Signature": _hmac(secret, body)}))]


def _crm_event(number: int, customer: Customer, _clip: bytes, post: Post) -> list[str]:
    """Kommo's form, without an id or a signature: what tells it from others is what it says."""
    form = {
        "leads[update][0][id]": random.choice(customer.leads),
        "leads[update][0][price]": number,
        "leads[update][0][last_modified]": int(time.time()),
        "leads[update][0][responsible_user_id]": 8_375_357,
        "account[subdomain]": "example",
        "account[id]": 31_361_463,
    }
    body = urlencode(form).encode()
    return [_event(post(customer.crm, body, {"Content-Type": "application/x-www-form-urlencoded"}))]


def _payment_event(number: int, customer: Customer, _clip: bytes, post: Post) -> list[str]:
    return [_event(_stripe(f"evt_p{number}", customer.payments, post))]


def _forwarded_event(number: int, customer: Customer, _clip: bytes, post: Post) -> list[str]:
    return [_event(_stripe(f"evt_f{number}", customer.forwarded, post))]


def _stripe(id_: str, to: tuple[str, str], post: Post) -> dict[str, Any]:
    paid = {"object": "charge", "amount": 4900, "currency": "eur", "status": "succeeded", "description": "x" * 300}
    body = _json({"id": id_, "object": "event", "type": "charge.succeeded", "data": {"object": paid}})
    now = str(int(time.time()))
    signature = _hmac(to[1], now.encode() + b"." + body)
    return post(to[0], body, {"Stripe-Signature": f"t={now},v1={signature}"})


def _short_job(number: int, customer: Customer, _clip: bytes, post: Post) -> list[str]:
    return [str(post("/api/jobs", _json(_ping(number)), _keyed(customer, number))["id"])]


def _batch(number: int, customer: Customer, _clip: bytes, post: Post) -> list[str]:
    body = _json({"jobs": [_ping(number) for _ in range(BATCH)]})
    return [str(id_) for id_ in post("/api/jobs/batch", body, _keyed(customer, number))["ids"]]


def _ping(number: int) -> dict[str, Any]:
    return {"type": "ping", "payload": {"sleep_ms": SHORT_MS}, "correlation_id": f"letter-{number}"}


def _note(number: int, customer: Customer, _clip: bytes, post: Post) -> list[str]:
    lead = random.choice(customer.leads)
    note = {"entity_id": lead, "note_type": "common", "params": {"text": f"note {number}"}}
    body = _json({"of": "leads", "items": [note]})
    return [str(post(f"/api/crm/accounts/{customer.account}/notes", body, _keyed(customer, number))["id"])]


def _document(number: int, customer: Customer, _clip: bytes, post: Post) -> list[str]:
    return _text(number, customer, post, graph=False)


def _document_with_graph(number: int, customer: Customer, _clip: bytes, post: Post) -> list[str]:
    return _text(number, customer, post, graph=True)


def _text(number: int, customer: Customer, post: Post, *, graph: bool) -> list[str]:
    sentences = [f"This is the record of call {number}."]
    for _ in range(4):
        sentences += random.choices(_FILLER, k=3)
        sentences.append(f"{random.choice(PEOPLE)} works for {random.choice(COMPANIES)}.")
    body = _json({"text": " ".join(sentences), "source_id": f"call-{number}", "graph": graph})
    return [str(post("/api/knowledge/documents", body, _keyed(customer, number))["job_id"])]


def _render(number: int, customer: Customer, _clip: bytes, post: Post) -> list[str]:
    graph = {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": number}},
        "2": {"class_type": "ImageInvert", "inputs": {"image": ["1", 0]}},
        "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "out"}},
    }
    return [str(post("/api/renders", _json({"graph": graph}), _keyed(customer, number))["id"])]


def _video(number: int, customer: Customer, clip: bytes, post: Post) -> list[str]:
    headers = {"Authorization": f"Bearer {customer.key}", "Content-Type": "video/mp4"}
    video_id = post(f"/api/videos?filename=clip-{number}.mp4", clip, headers)["video_id"]
    return [str(post("/api/videos/analyze", _json({"video_id": video_id}), _keyed(customer, number))["task_id"])]


_WAYS: Final[Mapping[str, Callable[[int, Customer, bytes, Post], list[str]]]] = {
    "bot message": _bot_message,
    "CRM event": _crm_event,
    "payment event": _payment_event,
    "forwarded event": _forwarded_event,
    "short job": _short_job,
    "batch": _batch,
    "note": _note,
    "document": _document,
    "document with graph": _document_with_graph,
    "render": _render,
    "video": _video,
}


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _keyed(customer: Customer, number: int) -> dict[str, str]:
    return {"Authorization": f"Bearer {customer.key}", "Idempotency-Key": f"letter-{number}"}


def _hmac(secret: str, text: bytes) -> str:
    return hmac.new(secret.encode(), text, hashlib.sha256).hexdigest()


def _event(answer: Mapping[str, Any]) -> str:
    return str(answer["event_id"])
