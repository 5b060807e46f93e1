"""A worker process that is not ready yet when it takes its first job, and then fails, or finds that its parent is gone."""

from __future__ import annotations

import os
import sys
from uuid import UUID

import dramatiq

from agentflow import settings
from agentflow.cli import workers
from agentflow.system import System
from agentflow.worker.process import WorkerProcess
from tests import job_types  # noqa: F401 - registers the tests' job types
from tests.processes import eventually
from tests.test_worker import read


def main() -> None:
    how, job_id = sys.argv[1], UUID(sys.argv[2])
    system = System(settings.current(), "worker")

    def told() -> None:
        eventually(lambda: read(system, job_id).state == "running")
        if how == "fails":
            raise OSError("nobody can be told")
        read_fd, write_fd = os.pipe()
        os.close(read_fd)  # as when who started it is gone
        workers._say_ready(write_fd)
        print("told nobody", file=sys.stderr, flush=True)

    worker = WorkerProcess(system, on_ready=told)
    worker.declare_actors()
    worker.broker.emit_after("process_boot")
    running = dramatiq.Worker(worker.broker)
    running.start()
    running.stop()


if __name__ == "__main__":
    main()
