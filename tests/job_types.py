"""Job types that only the tests have. `dramatiq tests.job_types` starts a worker that knows them beside the product's."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import actors
from agentflow.calls import Service
from agentflow.errors import Permanent, Transient, Wait
from agentflow.jobs.registry import Payload, Rate, job
from agentflow.limits import Window
from agentflow.models import Message, answers
from agentflow.worker.running import JobContext
from tests import statements


class Keyed(Payload):
    key: str = "k"
    slots: int = 1
    sleep_ms: int = 0


@job("test_keyed", payload=Keyed, concurrency=lambda p: (p.key, p.slots))
def keyed(context: JobContext, payload: Keyed) -> dict[str, Any]:
    context.sleep(payload.sleep_ms / 1000)
    return {"slot": context.job.slot}


class Stubborn(Payload):
    seconds: float = 60.0


@job("test_stubborn", payload=Stubborn, time_limit_s=1.0)
def stubborn(context: JobContext, payload: Stubborn) -> dict[str, Any]:
    """Swallows whatever should end it."""
    end = time.monotonic() + payload.seconds
    while time.monotonic() < end:
        with contextlib.suppress(BaseException):
            time.sleep(0.05)
    return {"ended": True}


class Limited(Payload):
    pass


@job("test_limited", payload=Limited, rate=Rate(5, 1))
def limited(context: JobContext, payload: Limited) -> dict[str, Any]:
    return {"at": time.time()}


class Stamped(Payload):
    sleep_ms: int = 0


@job("test_stamped", payload=Stamped)
def stamped(context: JobContext, payload: Stamped) -> dict[str, Any]:
    """Says when it was at work."""
    began = time.time()
    context.sleep(payload.sleep_ms / 1000)
    return {"began": began, "ended": time.time()}


class Unstorable(Payload):
    kind: str


@job("test_unstorable", payload=Unstorable)
def unstorable(context: JobContext, payload: Unstorable) -> Any:
    return {
        "nul": {"text": "a\x00b"},
        "surrogate": {"text": "a\ud800b"},
        "object": object(),
        "large": "x" * (5 << 20),
        "error": None,
    }[payload.kind]


class Gate(Payload):
    file: str


@job("test_gate", payload=Gate)
def gate(context: JobContext, payload: Gate) -> dict[str, Any]:
    """Waits for a file, and leaves one beside it for each time that it came through. Says so when it is half way."""
    while not Path(payload.file).exists():
        if Path(f"{payload.file}.half").exists():
            context.progress(0.5, "half")
        context.sleep(0.02)
    Path(f"{payload.file}.{context.job.id}.{context.job.fence}").touch()
    return {}


@job("test_gpu", payload=Keyed, queue="gpu")
def on_gpu(context: JobContext, payload: Keyed) -> dict[str, Any]:
    context.sleep(payload.sleep_ms / 1000)
    return {}


@job("test_gpu_critical", payload=Keyed, queue="gpu", priority="critical")
def on_gpu_at_once(context: JobContext, payload: Keyed) -> dict[str, Any]:
    return {}


@job("test_halfway", payload=Gate)
def halfway(context: JobContext, payload: Gate) -> dict[str, Any]:
    """Says how far it is, and waits for a file."""
    context.progress(0.5, "halfway")
    return gate(context, payload)


@job("test_narrow", payload=Gate, process_limit=lambda _settings: 1)
def narrow(context: JobContext, payload: Gate) -> dict[str, Any]:
    """One at a time in a process; waits for a file."""
    return gate(context, payload)


@job("test_narrow_fails_once", payload=Gate, process_limit=lambda _settings: 1)
def narrow_fails_once(context: JobContext, payload: Gate) -> dict[str, Any]:
    """One at a time in a process, so that no worker takes it for itself past the broker. Fails once its file is there."""
    gate(context, payload)
    if context.job.attempt == 1:
        raise Transient("attempt 1 fails as asked")
    return {}


class Effect(Payload):
    folder: str
    sleep_ms: int


@job("test_effect", payload=Effect)
def effect(context: JobContext, payload: Effect) -> dict[str, Any]:
    """Does something outside, each time that it comes to its end; says with which claim."""
    context.sleep(payload.sleep_ms / 1000)
    Path(payload.folder, f"{context.job.id}.{context.job.fence}").touch()
    return {"fence": context.job.fence}


class Asker(Payload):
    about: str
    questions: int = 1


@job("test_asker", payload=Asker)
def asker(context: JobContext, payload: Asker) -> dict[str, Any]:
    """Asks a model one question after the other, and keeps the answers."""
    said = []
    for number in range(payload.questions):
        question = f"{payload.about} {number}"
        key, organization = answers.key_of(question), context.job.organization_id
        with context.system.database.connection() as conn:
            found = answers.find(conn, organization, key)
        if found is None:
            found = context.system.models.chat(context, [Message("user", question)]).text
            with context.system.database.connection() as conn:
                answers.keep(conn, organization, key, found)
        said.append(found)
    return {"said": said}


class Spender(Payload):
    then: str = "succeed"


@job("test_spender", payload=Spender)
def spender(context: JobContext, payload: Spender) -> dict[str, Any]:
    """Spends, and ends as it is told to."""
    context.spent(usd=0.25, tokens_in=100)
    context.spent(usd=0.5, gpu_s=1.5)
    if payload.then == "fail":
        raise Permanent("it went wrong")
    if payload.then == "wait" and context.job.fence == 1:
        raise Wait(0.0, "asked")
    return {}


class Slow(Payload):
    sleep_ms: int


@job("test_fails_slowly", payload=Slow, queue="gpu")
def fails_slowly(context: JobContext, payload: Slow) -> dict[str, Any]:
    context.permit(Service("test-provider", "test", (Window(1_000, 60.0),)))
    context.sleep(payload.sleep_ms / 1000)
    raise Permanent("as it was asked to")


class Heavy(Gate):
    megabytes: int


@job("test_heavy", payload=Heavy)
def heavy(context: JobContext, payload: Heavy) -> dict[str, Any]:
    """Holds so much memory, and waits for a file."""
    held = bytearray(payload.megabytes << 20)
    for page in range(0, len(held), 4096):
        held[page] = 1
    gate(context, payload)
    return {"held": len(held)}


statements.install_in_a_process_of_a_test()
actors.worker.declare_actors()
