"""Who is connected: workers, and how many connections each process holds."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Final

import redis

from agentflow.cli.checkup import network
from agentflow.cli.checkup.report import Remark
from agentflow.cli.job_commands import unserved
from agentflow.jobs import statistics
from agentflow.system import System

#: Of the connections that a server allows: beyond it the next process may find none.
_CROWDED: Final = 0.8
#: One that publishes and one that consumes; other processes only publish.
_WORKERS_RABBITMQ: Final = 2
#: System.application_name, as a client of Redis may be called (without spaces).
_REDIS_NAME: Final = re.compile(r"agentflow-(\w+)-(.+)-(\d+)")


def workers(system: System) -> str | Remark:
    with system.database.connect() as conn:
        alive = statistics.workers(conn)
        queues = statistics.queues(conn)
    due = sum(q.due for q in queues)
    if alive:
        found = f"{len(alive)} alive, {sum(w.threads for w in alive)} threads"
        if missing := unserved(queues):
            advice = (
                "start one with `dramatiq actors -Q` and their names, or one without -Q, which serves all but `large`"
            )
            return Remark(f"{found}; none serves {missing}", advice)
        return found
    waiting = f" and {due} jobs wait" if due else ""
    return Remark(f"none is running{waiting}", "start `agentflow up`, or `dramatiq actors`")


def connections(system: System) -> str | Remark:
    """By process, as Postgres and Redis know them; a broker that speaks AMQP alone tells nobody, so those are by rule."""
    with system.database.connect() as conn:
        postgres = statistics.connections(conn)
    processes = {name: {"Postgres": number} for name, number in postgres.of_processes.items()}
    totals = [f"Postgres {postgres.used} of {postgres.most}"]
    crowded = postgres.used > _CROWDED * postgres.most
    if system.settings.redis_url is not None or system.settings.embedded_redis:
        with suppress(redis.RedisError):  # a check of its own says what is wrong there
            clients, most = _redis_clients(system)
            for name, number in clients.items():
                processes.setdefault(name, {})["Redis"] = number
            totals.append(f"Redis {sum(clients.values())}" + (f" of {most}" if most else ""))
            crowded = crowded or bool(most and sum(clients.values()) > _CROWDED * most)
    if system.settings.rabbitmq_url is not None:
        for name, counts in processes.items():
            counts["RabbitMQ"] = _WORKERS_RABBITMQ if name.split(" ")[1] in ("worker", "up") else 1
        totals.append(f"RabbitMQ at most {sum(counts['RabbitMQ'] for counts in processes.values())}")
    lines = [
        f"{name.removeprefix('agentflow ')}: {', '.join(f'{server} {n}' for server, n in counts.items())}"
        for name, counts in sorted(processes.items())
    ]
    found = f"\n  {'':<11} ".join([", ".join(totals), *lines])
    if crowded:
        return Remark(found, "lower DATABASE_POOL_SIZE or the number of processes, or take a larger plan")
    return found


def _redis_clients(system: System) -> tuple[dict[str, int], int | None]:
    """Connections by process, and the most that there may be, where the server says so."""
    client = system.redis_client(answer_timeout_s=network.CONNECT_S)
    try:
        found: dict[str, int] = {}
        for each in client.client_list():
            if named := _REDIS_NAME.fullmatch(str(each.get("name", ""))):
                name = f"agentflow {' '.join(named.groups())}"
                found[name] = found.get(name, 0) + 1
        return found, client.info("clients").get("maxclients")
    finally:
        client.close()
