"""A bare `dramatiq actors`: one working process with JOB_CONCURRENCY threads, whatever the host's CPUs."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import psutil
import psycopg
import pytest

import actors  # noqa: F401 - makes ping known
from agentflow.jobs.requests import NewJob
from agentflow.prove.ports import free_port
from agentflow.system import System
from agentflow.worker.surplus import is_surplus
from tests.processes import BIN, ROOT, eventually, started


@pytest.mark.parametrize(
    ("arguments", "name", "is_child", "surplus"),
    [
        (["/venv/bin/dramatiq", "actors"], "Process-1", True, False),
        (["/venv/bin/dramatiq", "actors"], "Process-2", True, True),
        (["/x/dramatiq/__main__.py", "actors", "--threads", "9"], "Process-12", True, True),
        (["/venv/bin/dramatiq", "actors", "--processes", "2"], "Process-2", True, False),
        (["/venv/bin/dramatiq", "-p2", "actors"], "Process-2", True, False),
        (["/venv/bin/dramatiq", "actors", "--path", "x"], "Process-2", True, True),
        (["/venv/bin/dramatiq", "actors"], "MainProcess", False, False),
        (["/venv/bin/gunicorn", "web.wsgi:app"], "Process-2", True, False),
    ],
)
def test_which_children_are_one_too_many(arguments: list[str], name: str, is_child: bool, surplus: bool) -> None:
    assert is_surplus(arguments, name, is_child=is_child) is surplus


def test_a_bare_command_works_in_one_process_with_the_threads_of_the_settings(
    environment: dict[str, str], system: System, conn: psycopg.Connection, tmp_path: Path
) -> None:
    environment.update(PORT=str(free_port()), JOB_CONCURRENCY="5")
    with started([str(BIN / "dramatiq"), "actors", "--path", str(ROOT)], environment, tmp_path / "log") as process:
        process.wait_for("worker ready")
        jobs = [system.submit(1, NewJob("ping", {})).job.id for _ in range(20)]
        eventually(
            lambda: (
                conn.execute("select count(*) from agentflow.jobs where state = 'succeeded'").fetchone() == (len(jobs),)
            )
        )

        assert conn.execute("select threads from agentflow.workers").fetchall() == [(5,)]
        children = [p for p in process.family()[1:] if p.memory_info().rss > 0]
        assert len(children) >= multiprocessing.cpu_count()
        working = max(children, key=lambda p: p.memory_info().rss)
        light = [p for p in children if p.pid != working.pid]
        assert all(_own_memory(p) < _own_memory(working) / 2 for p in light), [_own_memory(p) >> 20 for p in children]
        assert process.terminate() == 0


def _own_memory(process: psutil.Process) -> int:
    return int(process.memory_full_info().uss)
