"""The whole of it: an account that is in use, workers that die, webhooks that get lost; and the mirror equals it row for row."""

from __future__ import annotations

from pathlib import Path

import psycopg

from agentflow.system import System
from tests.kommo_life import Crew, Life, fill
from tests.kommo_server import Account as Server
from tests.kommo_support import account_of, connect, differences, linked, server

__all__ = ["linked", "server"]


def test_the_mirror_of_an_account_in_use_equals_it_though_workers_die_and_webhooks_get_lost(
    linked: System, server: Server, conn: psycopg.Connection, environment: dict[str, str], tmp_path: Path
) -> None:
    server.page_cap = 20
    fill(server, leads=200, contacts=200)
    account = connect(linked, server)
    conn.execute("update agentflow.crm_accounts set delete_share = 1")
    life = Life(linked, server, account, stirs_per_s=20, lost=0.3, seed=5)

    def filled() -> bool:
        query = "select count(*) from agentflow.sync_runs where mode = 'backfill' and state = 'succeeded'"
        return crew.kills >= 2 and conn.execute(query).fetchone() == (1,)

    with Crew(environment, tmp_path, seed=5) as crew:
        with life.going_on(due_every_s=0.5):
            life.sync("incremental")
            crew.kill_now_and_then(filled, every_s=(0.5, 2), within_s=240)
        life.finish(conn, within_s=240)

    assert differences(conn, account.id, server) == []
    assert life.stirs > 20 < life.hints
    assert account_of(linked, account).state == "connected"
    assert not server.limited
