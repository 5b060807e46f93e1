"""The systems that are compared: how each is started, what it stores jobs in, and its settings with the vendor's page."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from agentflow.worker.threads import regular

ROOT = Path(__file__).resolve().parent.parent.parent.parent
FOLDER = Path(__file__).resolve().parent
OURS = Path(sys.executable).parent
THEIRS = FOLDER / ".venv/bin"
#: How Redis keeps what it holds on disk: not (for results), or written each second, or with each command.
Durability = Literal["no", "everysec", "always"]
#: Of a setting: its name and value, and where its vendor describes it.
Setting = tuple[str, str]
Command = list[str]


@dataclass(frozen=True)
class Peer:
    """`worker(processes, slots)`: the commands whose processes have so many slots for jobs each.

    `slots_most` is how many jobs one process takes at once at most; `records` says that the end of a job is a row that counts.
    """

    name: str
    title: str
    module: str
    worker: Callable[[int, int], list[Command]]
    stores: str
    settings: list[Setting]
    redis: Durability = "no"
    slots_most: int = 1000
    environment: Callable[[int], dict[str, str]] = field(default=lambda _slots: {})
    records: bool = False
    embedded: bool = False
    node: bool = False

    @property
    def python(self) -> Path:
        return (OURS if self.records else THEIRS) / "python"

    @property
    def producer(self) -> Command:
        if self.node:
            return ["node", str(FOLDER / "bullmq/producer.mjs")]
        return [str(self.python), "-m", "ops.bench.peers.producer", self.module]


def threads_for(slots: int) -> int:
    """How many threads a worker of AgentFlow needs so that so many serve any job: it keeps one in four for critical ones."""
    threads = slots
    while regular(threads) < slots:
        threads += 1
    return threads


def prefetch(slots: int) -> int:
    """Messages that a process has from the broker ahead of its slots: as AgentFlow takes, two for each thread."""
    return 2 * threads_for(slots)


def _agentflow(processes: int, slots: int) -> list[Command]:
    threads = str(threads_for(slots))
    module = "ops.bench.peers.agentflow"
    return [[str(OURS / "dramatiq"), module, "--path", str(ROOT), "--processes", str(processes), "--threads", threads]]


def _dramatiq(processes: int, slots: int) -> list[Command]:
    module = "ops.bench.peers.dramatiq"
    return [
        [str(THEIRS / "dramatiq"), module, "--path", str(ROOT), "--processes", str(processes), "--threads", str(slots)]
    ]


def _celery(pool: str, processes: int, slots: int, name: str = "w") -> Command:
    quiet = ["--without-gossip", "--without-mingle", "-l", "WARNING"]
    at = ["-A", "ops.bench.peers.celery:app", "worker", "-n", f"{name}@%h"]
    return [str(THEIRS / "celery"), *at, "-P", pool, "-c", str(processes * slots), *quiet]


def _taskiq(processes: int, slots: int) -> list[Command]:
    sizes = ["--workers", str(processes), "--max-threadpool-threads", str(slots), "--max-async-tasks", str(slots)]
    module = ["worker", "ops.bench.peers.taskiq:broker", "--ack-type", "when_saved", "--log-level", "WARNING"]
    return [[str(THEIRS / "taskiq"), *module, *sizes]]


def _procrastinate(processes: int, slots: int) -> list[Command]:
    worker = ["worker", "--concurrency", str(slots), "--queues", "$BENCH_QUEUE"]
    return [[str(THEIRS / "procrastinate"), "--app", "ops.bench.peers.procrastinate.app", *worker]] * processes


def _rq(processes: int, _slots: int) -> list[Command]:
    worker = ["worker", "-w", "rq.worker.SimpleWorker", "--url", "$BENCH_REDIS", "--quiet", "$BENCH_QUEUE"]
    return [[str(THEIRS / "rq"), *worker]] * processes


def _huey(processes: int, slots: int) -> list[Command]:
    consumer = [str(THEIRS / "huey_consumer"), "ops.bench.peers.huey.huey", "-w", str(slots), "-k", "thread", "-q"]
    return [consumer] * processes


def _bullmq(processes: int, _slots: int) -> list[Command]:
    return [["node", str(FOLDER / "bullmq/worker.mjs")]] * processes


_DRAMATIQ_GUIDE = "https://dramatiq.io/advanced.html"
_CELERY_PAGE = "https://docs.celeryq.dev/en/stable/userguide/configuration.html"
_REDIS_PAGE = "https://redis.io/docs/latest/operate/oss_and_stack/management/persistence/"
_CELERY: list[Setting] = [
    ("`task_acks_late`, `task_reject_on_worker_lost`", f"{_CELERY_PAGE}#task-acks-late"),
    ("results in Redis, kept for an hour", f"{_CELERY_PAGE}#result-backend"),
    ("`confirm_publish`", "https://docs.celeryq.dev/en/stable/getting-started/backends-and-brokers/rabbitmq.html"),
    (
        "`--without-gossip --without-mingle`",
        "https://docs.celeryq.dev/en/stable/reference/cli.html",
    ),
]
_BULLMQ: list[Setting] = [("`concurrency` as slots; `addBulk`", "https://docs.bullmq.io/guide/workers/concurrency")]

PEERS: tuple[Peer, ...] = (
    Peer(
        name="agentflow",
        title="AgentFlow, RabbitMQ",
        module="agentflow",
        worker=_agentflow,
        stores="Postgres; rung by RabbitMQ (confirms); results in Postgres and Redis",
        settings=[("as shipped; every claim and every end committed with `fsync`", "README.md")],
        records=True,
    ),
    Peer(
        name="agentflow-embedded",
        title="AgentFlow, embedded",
        module="agentflow",
        worker=_agentflow,
        stores="the Postgres and Valkey that it brings",
        settings=[("as shipped, no server named", "README.md")],
        records=True,
        embedded=True,
    ),
    Peer(
        name="dramatiq",
        title="Dramatiq, RabbitMQ",
        module="dramatiq",
        worker=_dramatiq,
        stores="RabbitMQ (classic durable queue); results in Redis",
        settings=[
            ("`confirm_delivery=True`", f"{_DRAMATIQ_GUIDE}#enqueueing-messages"),
            ("`Results` with `RedisBackend`", "https://dramatiq.io/cookbook.html#results"),
            ("`dramatiq_queue_prefetch` as AgentFlow's", f"{_DRAMATIQ_GUIDE}#prefetch-limits"),
        ],
        environment=lambda slots: {"dramatiq_queue_prefetch": str(prefetch(slots))},
    ),
    Peer(
        name="celery-threads",
        title="Celery, threads",
        module="celery",
        worker=lambda processes, slots: [_celery("threads", 1, slots, f"w{n}") for n in range(processes)],
        stores="RabbitMQ; results in Redis",
        settings=[*_CELERY, ("`worker_prefetch_multiplier=4` (default)", f"{_CELERY_PAGE}#worker-prefetch-multiplier")],
    ),
    Peer(
        name="celery-prefork",
        title="Celery, prefork",
        module="celery",
        worker=lambda processes, _slots: [_celery("prefork", processes, 1)],
        stores="RabbitMQ; results in Redis",
        settings=[*_CELERY, ("`worker_prefetch_multiplier=16`", f"{_CELERY_PAGE}#worker-prefetch-multiplier")],
        slots_most=1,
        environment=lambda _slots: {"BENCH_PREFETCH_MULTIPLIER": "16"},
    ),
    Peer(
        name="rq",
        title="RQ",
        module="rq",
        worker=_rq,
        stores="Redis",
        settings=[
            ("`SimpleWorker`: no fork for each job", "https://python-rq.org/docs/workers/#worker-class-modules"),
            ("`appendfsync everysec`", _REDIS_PAGE),
        ],
        redis="everysec",
        slots_most=1,
    ),
    Peer(
        name="procrastinate",
        title="Procrastinate",
        module="procrastinate",
        worker=_procrastinate,
        stores="Postgres, the same server as AgentFlow's",
        settings=[
            (
                "`--concurrency` as slots; jobs are coroutines",
                "https://procrastinate.readthedocs.io/en/stable/howto/basics/command_line.html",
            ),
            (
                "`batch_defer`",
                "https://procrastinate.readthedocs.io/en/stable/howto/advanced/batch_defer.html",
            ),
        ],
        environment=lambda slots: {"BENCH_SLOTS": str(slots)},
    ),
    Peer(
        name="taskiq",
        title="Taskiq, RabbitMQ",
        module="taskiq",
        worker=_taskiq,
        stores="RabbitMQ (classic durable queue); results in Redis",
        settings=[
            ("`--ack-type when_saved` (default)", "https://taskiq-python.github.io/guide/cli.html"),
            ("`--max-threadpool-threads` as slots", "https://taskiq-python.github.io/guide/cli.html"),
            ("`qos` as AgentFlow's prefetch", "https://github.com/taskiq-python/taskiq-aio-pika"),
        ],
        environment=lambda slots: {"BENCH_PREFETCH": str(prefetch(slots))},
    ),
    Peer(
        name="huey",
        title="Huey",
        module="huey",
        worker=_huey,
        stores="Redis; a job that is taken is nowhere else",
        settings=[
            ("`-k thread -w` as slots", "https://huey.readthedocs.io/en/latest/consumer.html"),
            ("`appendfsync everysec`", _REDIS_PAGE),
        ],
        redis="everysec",
    ),
    *(
        Peer(
            name=f"bullmq-{durability}",
            title=f"BullMQ, {durability}",
            module="bullmq",
            worker=_bullmq,
            stores="Redis",
            settings=[*_BULLMQ, (f"`appendfsync {durability}`", "https://docs.bullmq.io/guide/going-to-production")],
            redis=durability,  # type: ignore[arg-type]
            environment=lambda slots: {"BENCH_SLOTS": str(slots), "BENCH_STALLED_MS": "5000"},
            node=True,
        )
        for durability in ("everysec", "always")
    ),
)


def named(names: str | None) -> list[Peer]:
    """Those of a comma-separated list, all without one. Exits with one line on a name that there is not."""
    if names is None:
        return list(PEERS)
    wanted = names.split(",")
    known: dict[str, Any] = {peer.name: peer for peer in PEERS}
    if unknown := [name for name in wanted if name not in known]:
        raise SystemExit(f"there is no peer {', '.join(unknown)}; there are {', '.join(known)}")
    return [known[name] for name in wanted]


def filled(command: Command, environment: dict[str, str]) -> Command:
    """With the variables that it names."""
    return [environment[word[1:]] if word.startswith("$") else word for word in command]


def clean_environment() -> dict[str, str]:
    """Nothing of the caller's own settings."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR", "HOME") if name in os.environ}
    return {**kept, "PYTHONPATH": str(ROOT)}
