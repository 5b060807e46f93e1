"""More worker processes on more hosts: jobs a second until something is used up, which is named.

    .venv/bin/python ops/bench/grow.py [--rounds 1] [--brokers one,three] [--ms 0,20] [--add]        as root

Each host is a network namespace of its own, with one `dramatiq` of 1 to 8 processes with 8 slots each; Postgres (with fsync),
Valkey and RabbitMQ, one node or a cluster of three with quorum queues, are on the machine that all hosts are connected to. The
jobs, which do nothing or wait 20 ms, are handed in while the queue is paused; once every process is ready it is resumed.
Jobs a second from the first beginning to the last end on record, and the cores that each kind of process uses meanwhile. The
limit is the processors where nine tenths of them are used, else the slots, with the time that a job holds one.
--add keeps the rounds that are in --out. Writes ops/bench/results/grow.json and grow.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import psutil
import psycopg
import redis

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from agentflow.jobs import rules  # noqa: E402
from agentflow.prove.ports import free_port  # noqa: E402
from agentflow.prove.rabbitmq import Rabbit  # noqa: E402
from agentflow.prove.servers import family, until  # noqa: E402
from ops.bench.comparison.crew import Crew, Producer, TrialFailed  # noqa: E402
from ops.bench.comparison.figures import Round, shown, values_of  # noqa: E402
from ops.bench.comparison.machine import end_when_told, keep, machine, said_of  # noqa: E402
from ops.bench.comparison.servers import OURS_TABLES, cpu_s  # noqa: E402
from ops.bench.comparison.trials import quiet_settings  # noqa: E402
from ops.bench.peers import catalogue  # noqa: E402
from ops.bench.peers.catalogue import clean_environment  # noqa: E402
from ops.bench.peers.marks import Marks  # noqa: E402
from tests.hosts import Network, network  # noqa: E402
from tests.servers import Postgres, Redis  # noqa: E402

#: (processes, hosts)
SHAPES: Final = ((1, 1), (2, 1), (4, 1), (8, 1), (2, 2), (4, 2), (8, 2), (4, 4), (8, 4))
NODES: Final = {"one": 1, "three": 3}
SLOTS: Final = 8
USED_UP: Final = 0.9
#: What a trial is made long enough for, and the jobs a second that the machine is expected to have at most.
_TRIAL_S: Final = 5.0
_FASTEST: Final = 1_200
_PATIENCE_S: Final = 120.0
_LOOK_S: Final = 0.1
_POSTGRES: Final = {"fsync": "on", "shared_buffers": "256MB", "max_connections": "200"}
_CONF: Final = """\
log.console = false
log.file.level = warning
vm_memory_high_watermark.absolute = 512MiB
disk_free_limit.absolute = 50MB
loopback_users.guest = false
"""
[_AGENTFLOW] = catalogue.named("agentflow")


@dataclass(frozen=True)
class Servers:
    folder: Path
    postgres: Postgres
    redis: Redis
    rabbit: Rabbit

    def connect(self) -> psycopg.Connection[Any]:
        return psycopg.connect(self.postgres.url, autocommit=True)

    def clean(self) -> None:
        with self.connect() as conn:
            conn.execute(f"truncate {OURS_TABLES} cascade".encode())
            conn.execute("checkpoint")
        with redis.Redis.from_url(self.redis.url) as client:
            client.flushall()

    def cpu_s(self) -> dict[str, float]:
        return {
            "postgres": cpu_s(self.postgres.family()),
            "rabbitmq": sum(cpu_s(node.processes()) for node in self.rabbit.nodes),
            "redis": cpu_s(self.redis.family()),
        }

    def environment(self, name: str, node: int) -> dict[str, str]:
        """Of AgentFlow's processes, whose RabbitMQ is that node."""
        return {
            **clean_environment(),
            **quiet_settings(self.folder / "home", name),
            "DATABASE_URL": self.postgres.url,
            "REDIS_URL": self.redis.url,
            "RABBITMQ_URL": self.rabbit.nodes[node % len(self.rabbit.nodes)].url,
            "RABBITMQ_QUORUM": str(len(self.rabbit.nodes) > 1).lower(),
            "STORAGE_URL": (self.folder / "storage").as_uri(),
            "STORAGE_SHARED": "true",
        }

    def versions(self) -> dict[str, str]:
        with self.connect() as conn, redis.Redis.from_url(self.redis.url) as client:
            row = conn.execute("show server_version").fetchone()
            valkey = client.info("server").get("valkey_version", "")
        rabbitmq = self.rabbit.node.ctl("version").strip()
        return {"postgres": str(row[0]) if row else "", "valkey": str(valkey), "rabbitmq": rabbitmq}


@contextmanager
def running(address: str, nodes: int) -> Iterator[Servers]:
    folder = Path(tempfile.mkdtemp(prefix="agentflow-grow-"))
    folder.chmod(0o755)
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        rabbit = Rabbit(folder / "rabbitmq", nodes=nodes, address=address, conf=_CONF)
        stack.callback(rabbit.close)
        rabbit.start()
        postgres = Postgres(folder / "postgres", address, **_POSTGRES)
        stack.callback(postgres.close)
        postgres.start()
        postgres.make_database()
        scratchpad = Redis(folder / "redis", address)
        stack.callback(scratchpad.close)
        scratchpad.start()
        yield Servers(folder, postgres, scratchpad, rabbit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--brokers", default="one,three", help="nodes of RabbitMQ, comma-separated")
    parser.add_argument("--ms", default="0,20", help="that a job waits, comma-separated")
    parser.add_argument("--most", type=int, default=8, help="processes")
    parser.add_argument("--add", action="store_true", help="to the rounds that are in --out")
    parser.add_argument("--out", type=Path, default=ROOT / "ops/bench/results/grow.json")
    options = parser.parse_args()
    end_when_told()
    shapes = [shape for shape in SHAPES if shape[0] <= options.most]
    figures: dict[str, Any] = json.loads(options.out.read_text()) if options.add and options.out.exists() else {}
    cells: dict[str, dict[str, list[Round]]] = figures.setdefault("cells", {})
    for broker in options.brokers.split(","):
        with network(*(f"host{n}" for n in range(4))) as net, running(net.address, NODES[broker]) as servers:
            figures |= {"machine": machine(), "versions": servers.versions(), "slots": SLOTS}
            for _ in range(options.rounds):
                for ms in map(int, options.ms.split(",")):
                    rows = cells.setdefault(f"{broker}, {ms} ms", {})
                    for processes, hosts in shapes:
                        name = f"{processes} on {hosts}"
                        rows.setdefault(name, []).append(found := one_trial(servers, net, processes, hosts, ms))
                        print(broker, ms, name, json.dumps(found), flush=True)
                        keep(figures, options.out)
    options.out.with_suffix(".md").write_text(page(figures))
    print(page(figures))


def one_trial(servers: Servers, net: Network, processes: int, hosts: int, ms: int) -> Round:
    servers.clean()
    per_s = min(_FASTEST, processes * SLOTS / (ms / 1000) if ms else _FASTEST)
    jobs = round(_TRIAL_S * per_s)
    name = f"bench-{uuid4().hex[:8]}"
    path, log = servers.folder / f"{name}.marks", servers.folder / f"{name}.log"
    marks = Marks.make(path, jobs)
    environment = {**servers.environment(name, 0), "BENCH_MARKS": str(path)}
    with servers.connect() as conn:
        rules.pause(conn, "queue", "default", 0)
        producer = Producer(_AGENTFLOW.producer, environment, log, _PATIENCE_S)
        producer.ask("submit_many", first=0, count=jobs, ms=ms)
        producer.close()
        crew = Crew(environment, log)
        try:
            for number, host in enumerate(list(net.hosts.values())[:hosts]):
                [command] = _AGENTFLOW.worker(processes // hosts, SLOTS)
                more = {"RABBITMQ_URL": servers.environment(name, number)["RABBITMQ_URL"], "PORT": str(free_port())}
                crew.start([[*host.inside, *command]], **more)
            wait(crew, lambda: _count(conn, "workers where stopped_at is null") == processes)
            time.sleep(1.0)  # a few were rung for at once; they are parked by now
            return measured(servers, crew, marks, conn, processes, jobs, ms)
        finally:
            crew.stop()
            path.unlink()


def measured(
    servers: Servers, crew: Crew, marks: Marks, conn: psycopg.Connection[Any], processes: int, jobs: int, ms: int
) -> Round:
    done_before = marks.done()
    rules.resume(conn, "queue", "default", 0)
    wait(crew, lambda: marks.begun() > done_before, every_s=0.02)
    before, began = usage(servers, crew), time.monotonic()
    wait(crew, lambda: marks.done() == jobs)
    used = {role: seconds - before[role] for role, seconds in usage(servers, crew).items()}
    took = time.monotonic() - began
    wait(crew, lambda: _count(conn, "jobs where state = 'succeeded'") == jobs)
    row = conn.execute("select extract(epoch from max(finished_at))::float8 from agentflow.jobs").fetchone()
    assert row is not None
    recorded_at = float(row[0]) - (time.time() - time.monotonic())
    begins = sorted(begin for begin, _, _ in marks.every())[done_before:]
    cores = {role: round(seconds / took, 3) for role, seconds in used.items()}
    per_s = len(begins) / (recorded_at - begins[0])
    share = per_s * ms / 1000 / (processes * SLOTS)
    return {
        "jobs": jobs,
        "jobs_per_s": round(per_s, 1),
        "share_of_slots": round(share, 3),
        **{f"{role}_cores": value for role, value in cores.items()},
        "limit": limit(cores, share, processes, per_s),
    }


def usage(servers: Servers, crew: Crew) -> dict[str, float]:
    """Seconds of a processor so far: of each kind of process, of this one, and of whoever else is on the machine."""
    times = psutil.cpu_times()
    busy = sum(times) - times.idle - times.iowait - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    ours = {"workers": crew.cpu_s(), **servers.cpu_s(), "bench": cpu_s(family(os.getpid())[:1])}
    return {**ours, "foreign": busy - sum(ours.values())}


def limit(cores: dict[str, float], share_of_slots: float, processes: int, per_s: float) -> str:
    """What was used up; `cores` by role, whoever else was on the machine among them. Where jobs always wait, slots are never
    empty: what they do beside the jobs' own work is the way to a claim's answer."""
    there = os.cpu_count() or 1
    if sum(cores.values()) >= USED_UP * there:
        return f"the machine's {there} cores"
    if share_of_slots >= USED_UP:
        return "slots"
    if cores["workers"] >= USED_UP * processes:
        return "one core for each process (Python's lock)"
    held_ms = 1000 * processes * SLOTS / per_s
    return f"slots, each held for {held_ms:.0f} ms by a job; {sum(cores.values()) / there:.0%} of the cores are used"


def wait(crew: Crew, check: Callable[[], bool], every_s: float = _LOOK_S) -> None:
    """Raises TrialFailed when it is not so in time, or a worker has ended."""

    def checked() -> bool:
        crew.check()
        return check()

    if not until(checked, within_s=_PATIENCE_S, every_s=every_s):
        raise TrialFailed(f"not within {_PATIENCE_S:g} s: {crew.said()}")


def _count(conn: psycopg.Connection[Any], what: str) -> int:
    row = conn.execute(f"select count(*) from agentflow.{what}".encode()).fetchone()  # noqa: S608 - constants
    return int(row[0]) if row else 0


# ---- the report ----

ROLES: Final = ("workers", "postgres", "rabbitmq", "redis", "foreign")


def page(figures: dict[str, Any]) -> str:
    lines = [
        "# More processes, more hosts",
        "",
        said_of(figures),
        f"Processes have {figures['slots']} slots each; cores are those used while the jobs ran.",
    ]
    for name, rows in figures["cells"].items():
        lines += [
            "",
            f"## RabbitMQ: {name.replace(', ', ' node(s); jobs of ')}",
            "",
            f"| processes on hosts | jobs/s | share of the slots | cores: {' | '.join(ROLES)} | limit |",
            f"|---|---|---|{'---|' * len(ROLES)}---|",
        ]
        for shape, rounds in rows.items():
            cores = [f"{statistics.median(values_of(rounds, f'{role}_cores')):.2f}" for role in ROLES]
            share = statistics.median(values_of(rounds, "share_of_slots"))
            told = [shape, shown(values_of(rounds, "jobs_per_s")), f"{share:.0%}" if share else "–", *cores]
            lines.append(f"| {' | '.join(told)} | {rounds[-1]['limit']} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
