"""Kommo from its webhook to the mirror: its sender, gunicorn, a worker, and no sync but the one that the webhook asks for."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

import psycopg

from tests.core_support import rows, value
from tests.kommo_hooks import Hooks
from tests.kommo_server import ACCOUNT_ID
from tests.kommo_server import Account as Server
from tests.kommo_support import differences, server
from tests.processes import eventually, worker
from tests.web_support import gunicorn

__all__ = ["server"]


def test_what_kommos_webhooks_name_is_read_again(
    server: Server, environment: dict[str, str], conn: psycopg.Connection, tmp_path: Path
) -> None:
    leads = [server.add("leads", name=f"Lead {n}") for n in range(3)]
    firm = server.add("companies", name="Firm")
    with gunicorn(environment, tmp_path) as web, worker(environment, tmp_path / "worker.log"):
        account = web.http.post("/api/crm/accounts", json={"host": server.host, "token": server.token}).json()
        account_id = UUID(account["id"])
        # Nobody runs the calendar here: the first sync is handed in with the account, and begins the backfill.
        eventually(
            lambda: (
                value(conn, "select count(*) from agentflow.sync_runs where state = 'succeeded'") == 2
                and differences(conn, account_id, server) == []
            ),
            within_s=60,
        )
        endpoint = web.http.post(
            "/api/webhook-endpoints",
            json={"source": "kommo", "name": "kommo", "config": {"account_id": account["id"]}},
        ).json()
        hooks = Hooks(ACCOUNT_ID, deadline_s=30.0)
        hook = hooks.subscribe(
            web.url + endpoint["path"], ["update_lead", "update_company", "delete_lead", "add_contact"]
        )

        server.change("leads", leads[0], name="As it is")
        server.change("companies", firm, name="Its new name")
        server.remove("leads", leads[1])
        contact = server.add("contacts", name="Ann")
        hooks.happened(0, "leads", "update", {"id": leads[0], "name": "As the webhook has it"})
        hooks.happened(0, "contacts", "update", {"id": firm, "type": "company"})
        hooks.happened(0, "leads", "delete", {"id": leads[1]})
        hooks.happened(0, "contacts", "add", {"id": contact, "type": "contact"})
        assert hooks.deliver(0) == 4

        def touched() -> bool:
            query = "select count(*) from agentflow.sync_runs where mode = 'touched' and state = 'succeeded'"
            return bool(value(conn, query)) and not value(conn, "select count(*) from agentflow.crm_touched")

        eventually(touched, within_s=60)
        events = web.http.get("/api/webhook-events").json()["events"]
    assert [(delivery.attempts, delivery.delivered) for delivery in hook.deliveries] == [([200], True)] * 4
    assert [event["outcome"] for event in events] == ["done"] * 4
    # The account's log of events is read by the sync that goes through what has changed, not by this one.
    assert [each for each in differences(conn, account_id, server) if not each.startswith("events ")] == []
    modes = {row.mode for row in rows(conn, "select mode from agentflow.sync_runs")}
    assert modes == {"incremental", "backfill", "touched"}
    assert value(conn, "select count(*) from agentflow.sync_runs where mode <> 'touched'") == 2
