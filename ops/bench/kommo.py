"""An account of 25,000 leads and 40,000 contacts that is in use while it is mirrored, at Kommo's 7 calls a second.

    .venv/bin/python ops/bench/kommo.py [--leads 25000] [--contacts 40000] [--lost 0.2] [--changes-per-s 5]

Starts private servers, a Kommo of the tests with its real limits (429 beyond 7 calls within any second), and two workers, of
which one is killed every 10 to 30 s while everything is filled in. Things are changed, made and deleted all the while (half of
the deletions without a trace in the account's log), and a share of the webhooks does not arrive. When the backfill is through the
changes end; one incremental sync and one reconciliation later the mirror is compared row for row. Writes
ops/bench/results/kommo.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import psycopg
from idle import ROOT
from private import private_system

sys.path.insert(0, str(ROOT))

import actors  # noqa: F401 - registers the job types
from agentflow.system import System
from tests.kommo_life import Crew, Life, fill
from tests.kommo_server import kommo
from tests.kommo_support import account_of, connect, differences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--leads", type=int, default=25_000)
    parser.add_argument("--contacts", type=int, default=40_000)
    parser.add_argument("--changes-per-s", type=float, default=5.0)
    parser.add_argument("--lost", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--within-s", type=float, default=3600.0)
    parser.add_argument("--out", type=Path, default=ROOT / "ops/bench/results/kommo.json")
    options = parser.parse_args()
    figures: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "load_average_before": round(os.getloadavg()[0], 1),
        **{name: value for name, value in vars(options).items() if name not in ("out", "within_s")},
    }
    with (
        kommo(rate=7, retry_after=1, most_violations=20) as server,
        private_system(JOB_CONCURRENCY="8", FETCH_ALLOW=server.host) as (system, environment),
    ):
        fill(server, options.leads, options.contacts)
        figures |= one_life(options, server, system, environment)
    print(json.dumps(figures, indent=2))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(figures, indent=2) + "\n")
    if figures["differences"] or figures["answered_429_after_the_first_minute"]:
        raise SystemExit("NOT KEPT")


def one_life(options: argparse.Namespace, server: Any, system: System, environment: dict[str, str]) -> dict[str, Any]:
    folder = Path(environment["AGENTFLOW_HOME"])
    account = connect(system, server)
    life = Life(system, server, account, stirs_per_s=options.changes_per_s, lost=options.lost, seed=options.seed)
    with psycopg.connect(environment["DATABASE_URL"], autocommit=True) as conn:
        began = time.time()

        def filled() -> bool:
            query = "select count(*) from agentflow.sync_runs where mode = 'backfill' and state = 'succeeded'"
            return conn.execute(query).fetchone() == (1,)

        with Crew(environment, folder, options.seed) as crew:
            with life.going_on(due_every_s=10.0):
                life.sync("incremental")
                crew.kill_now_and_then(filled, every_s=(10, 30), within_s=options.within_s)
                backfill_s = time.time() - began
            ended_at = time.time()
            life.finish(conn, within_s=options.within_s)
            reconciled_s = time.time() - ended_at
        found = differences(conn, account.id, server)
        calls = sum(server.requests.values())
        runs = conn.execute(
            "select mode, count(*), sum(calls) from agentflow.sync_runs group by mode order by mode"
        ).fetchall()
        tombstones = conn.execute("select count(*) from agentflow.crm_entities where deleted_at is not null").fetchone()
        state = account_of(system, account).state
    took_s = time.time() - began
    return {
        "changes_meanwhile": life.stirs,
        "webhooks_that_arrived": life.hints,
        "workers_killed": crew.kills,
        "backfill_s": round(backfill_s, 1),
        "last_sync_and_reconciliation_s": round(reconciled_s, 1),
        "calls": calls,
        "calls_per_s": round(calls / took_s, 2),
        "answered_429": len(server.limited),
        "answered_429_after_the_first_minute": sum(at > began + 60 for at in server.limited),
        "runs": {mode: {"runs": number, "calls": called} for mode, number, called in runs},
        "rows": {path: len(things) for path, things in server.things.items()},
        "tombstones": tombstones[0] if tombstones else 0,
        "account": state,
        "differences": len(found),
        "first_differences": found[:5],
    }


if __name__ == "__main__":
    main()
