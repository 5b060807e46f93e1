"""What is looked at once a minute: jobs by their rows, memory and processor of each process, and the database."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import psutil
import psycopg

from agentflow.embedded.layout import Layout
from agentflow.jobs.statistics import id_floor
from agentflow.prove.servers import family
from ops.bench.mixing.system import Setting

#: Of rows by when they were made: their ids begin with that, so that no look reads the table from one end to the other.
_JOBS: Final = """
select type, count(*), count(*) filter (where finished_at is not null), count(*) filter (where state = 'failed'),
    percentile_cont(array[0.5, 0.95, 0.99])
        within group (order by 1000 * extract(epoch from started_at - greatest(created_at, run_at))),
    percentile_cont(array[0.5, 0.99]) within group (order by 1000 * extract(epoch from finished_at - created_at))
from agentflow.jobs where id >= %s and id < %s group by type order by type"""
_SHORT: Final = """
select percentile_cont(array[0.5, 0.95, 0.99, 1]) within group (order by 1000 * extract(epoch from started_at - created_at))
from agentflow.jobs where id >= %s and id < %s and type = any (%s)"""
_OPEN: Final = """
select type, state, coalesce(wait_reason, ''), count(*) from agentflow.jobs where state = 'queued' group by 1, 2, 3
union all select type, state, '', count(*) from agentflow.jobs where state = 'running' group by 1, 2"""
_TABLES: Final = """
select c.relname, pg_table_size(c.oid), pg_indexes_size(c.oid), s.n_live_tup, s.n_dead_tup, s.autovacuum_count
from pg_class c join pg_stat_user_tables s on s.relid = c.oid where s.schemaname = 'agentflow'
order by pg_total_relation_size(c.oid) desc limit 8"""
_CONNECTIONS: Final = """
select application_name, count(*) from pg_stat_activity where backend_type = 'client backend' and pid <> pg_backend_pid()
group by 1"""
#: Jobs that wait for nothing but a thread.
SHORT_TYPES: Final = ("handle_webhook", "ping", "forward_webhook")


class Watch:
    """Samples of a run that began at `began` (unix time); minutes count from there."""

    def __init__(self, made: Setting, began: float) -> None:
        self._made = made
        self._began = began
        self._cpu = made.cpu_s()
        self._cpu_at = time.monotonic()

    def sample(self, minute: int) -> dict[str, Any]:
        """After that minute. What cannot be asked is left out, and `trouble` says why: an hour must not end with that."""
        found: dict[str, Any] = {"minute": minute, "cpu": {}, "trouble": []}
        parts = {
            "cpu": self._cores,
            "processes": self._processes,
            "servers": self._servers,
            "vendors": self._made.vendors.ask,
        }
        for name, part in parts.items():
            try:
                found[name] = part()
            except (psutil.Error, OSError, ValueError) as error:
                found["trouble"].append(f"{name}: {error}")
        try:
            with self._made.servers.connect() as conn:
                found |= self._database(conn, minute)
        except psycopg.Error as error:
            found["trouble"].append(f"database: {error}")
        return found

    def jobs_of(self, conn: psycopg.Connection[Any], minute: int) -> dict[str, Any]:
        """Those that were made in that minute: counts, pick-up and time in the system in ms."""
        span = tuple(id_floor(self._began + 60 * m) for m in (minute, minute + 1))
        by_type = {
            type_: {
                "made": made,
                "ended": ended,
                "failed": failed,
                "pickup_ms": _named(pickups, ("p50", "p95", "p99")),
                "total_ms": _named(totals, ("p50", "p99")),
            }
            for type_, made, ended, failed, pickups, totals in conn.execute(_JOBS, span).fetchall()
        }
        row = conn.execute(_SHORT, (*span, list(SHORT_TYPES))).fetchone()
        return {"by_type": by_type, "short_pickup_ms": _named(row[0] if row else None, ("p50", "p95", "p99", "max"))}

    def _cores(self) -> dict[str, float]:
        """Cores that each used since the last sample; `others` is everything on this machine that is not ours."""
        now, at = self._made.cpu_s(), time.monotonic()
        used = {name: (value - self._cpu.get(name, 0.0)) / (at - self._cpu_at) for name, value in now.items()}
        self._cpu, self._cpu_at = now, at
        machine = used.pop("machine")
        return {name: round(value, 3) for name, value in {**used, "others": machine - sum(used.values())}.items()}

    def _processes(self) -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = {}
        for name, processes in self._made.families().items():
            for role, process in _roles(name, processes):
                with suppress(psutil.NoSuchProcess, OSError):
                    memory = process.memory_full_info()
                    each = found.setdefault(role, {"pss_mb": 0.0, "filled_mb": 0.0, "descriptors": 0, "threads": 0})
                    each["pss_mb"] = round(each["pss_mb"] + memory.pss / 1e6, 2)
                    each["filled_mb"] = round(each["filled_mb"] + _filled_mb(process.pid), 2)
                    each["descriptors"] += process.num_fds()
                    each["threads"] += process.num_threads()
        return found

    def _servers(self) -> dict[str, float]:
        """PSS in MB."""
        servers = self._made.servers
        layout = Layout.of(servers.home)
        valkey = servers._valkeys["everysec"].popen.pid
        rabbitmq = servers.rabbitmq._popen.pid if servers.rabbitmq._popen is not None else 0
        pids = {"postgres": int(layout.lock("postgres").read_text()), "valkey": valkey, "rabbitmq": rabbitmq}
        return {name: round(sum(map(_pss_mb, family(pid))), 1) for name, pid in pids.items()}

    def _database(self, conn: psycopg.Connection[Any], minute: int) -> dict[str, Any]:
        kinds: Counter[str] = Counter()
        for name, count in conn.execute(_CONNECTIONS).fetchall():
            kinds[" ".join(name.split()[:2])] += count
        tables = {
            name: {"table_mb": _mb(table), "indexes_mb": _mb(indexes), "live": live, "dead": dead, "vacuums": vacuums}
            for name, table, indexes, live, dead, vacuums in conn.execute(_TABLES).fetchall()
        }
        waiting = [
            {"type": type_, "state": state, "reason": reason, "jobs": count}
            for type_, state, reason, count in conn.execute(_OPEN).fetchall()
        ]
        size = conn.execute("select pg_database_size(current_database())").fetchone()
        return {
            "jobs": self.jobs_of(conn, minute),
            "open": sum(each["jobs"] for each in waiting),
            "waiting": waiting,
            "connections": dict(kinds),
            "tables": tables,
            "database_mb": _mb(size[0] if size else 0),
        }


def _roles(name: str, processes: list[psutil.Process]) -> list[tuple[str, psutil.Process]]:
    """The first starts those that work. What a job runs in comes and goes, and so does the encoder."""
    found: list[tuple[str, psutil.Process]] = []
    working = 0
    for number, process in enumerate(processes):
        with suppress(psutil.Error):
            command = " ".join(process.cmdline())
            if "agentflow.worker.child" in command:
                found.append((f"{name}, children of jobs", process))
            elif "agentflow.knowledge.encoder" in command:
                found.append((f"{name}, encoder", process))
            elif "resource_tracker" in command or (number == 0 and len(processes) > 1):
                found.append((f"{name}, parent", process))
            else:
                working += 1
                found.append((name if working == 1 else f"{name}, {working}", process))
    return found


def _filled_mb(pid: int) -> float:
    """Pages that it filled itself: its share of libraries' pages rises and falls with its neighbours."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Anonymous:", "Swap:"))) * 1024 / 1e6


def _pss_mb(process: psutil.Process) -> float:
    try:
        return float(process.memory_full_info().pss / 1e6)
    except (psutil.Error, OSError):
        return 0.0


def _named(values: Any, names: tuple[str, ...]) -> dict[str, float] | None:
    if not values or values[0] is None:
        return None
    return {name: round(float(value), 1) for name, value in zip(names, values, strict=True)}


def _mb(size: int) -> float:
    return round(size / 1e6, 1)
