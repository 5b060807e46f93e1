"""`agentflow doctor`: looks at everything AgentFlow stands on, or (`--url`) at one that runs elsewhere, and says what to do about
what is wrong. Shows no secret.

A server is looked at in steps (name, connection, TLS, password, answer), so that each kind of failure has its own advice.
"""

from __future__ import annotations

from agentflow import embedded, settings
from agentflow.cli import output
from agentflow.cli.checkup import comfyui, machine, postgres, processes, rabbitmq, redis, storage, telegram
from agentflow.cli.checkup.deployed import Deployed
from agentflow.cli.checkup.report import Remark, Report, Wrong
from agentflow.cli.client import Client, operator_key
from agentflow.cli.errors import USAGE, WRONG, Failure
from agentflow.system import System

__all__ = ["Remark", "Report", "Wrong", "deployed", "doctor"]


def doctor() -> None:
    """Raises Failure when something is wrong; SettingsError is one line of its own, as everywhere."""
    read = settings.current()
    report = Report(output.console(), read)
    system = System(read, "doctor")
    with report.check("settings"):
        report.good(machine.settings_read(read))
    report.run("tier", lambda: machine.tier(read))
    report.run("home", lambda: machine.home(read))
    stack = None
    reachable = True
    if read.embedded_database:
        with report.check("servers"):
            stack = embedded.join(read.agentflow_home)
            report.good(f"Postgres and Valkey of its own run in {read.agentflow_home}")
        reachable = stack is not None
    try:
        if reachable and report.run("database", lambda: postgres.database(system)):
            report.run("clock", lambda: machine.clock(system))
            if report.run("schema", lambda: postgres.schema_version(system)):
                report.run("workers", lambda: processes.workers(system))
                report.run("connections", lambda: processes.connections(system))
        if read.direct_database_url is not None:
            url = read.direct_database_url.get_secret_value()
            report.run("migrations", lambda: postgres.server(url, "DIRECT_DATABASE_URL", read.trust))
        if reachable and read.uses_redis:
            report.run("redis", lambda: redis.server(system))
        if read.rabbitmq_url is not None:
            report.run("rabbitmq", lambda: rabbitmq.server(system))
        if read.comfyui_servers:
            report.run("comfyui", lambda: comfyui.servers(system))
        report.run("storage", lambda: storage.round_trip(system))
        if read.telegram_bot_token is not None:
            report.run("telegram", lambda: telegram.bot(system))
        report.run("web", lambda: machine.web(read))
    finally:
        system.close()
        if stack is not None:
            stack.leave()
    _end(report)


def deployed(url: str, watch_min: float | None) -> None:
    """Raises Failure when something is wrong there, and (2) for what is no URL, or without a key."""
    read = settings.current()
    try:
        client = Client(url, operator_key(read))
    except Failure as error:
        raise Failure(str(error), USAGE) from None
    report = Report(output.console(), read)
    there = Deployed(client, read.metrics_token.get_secret_value() if read.metrics_token else None)
    try:
        if report.run("web", there.answers) and report.run("key", there.key):
            report.run("metrics", there.metrics)
            report.run("scheduler", there.scheduler)
            if report.run("workers", there.workers) and report.run("ping", there.ping):
                report.run("queues", there.queues)
                report.run("video", there.video)
                report.run("kommo", there.crm)
            if watch_min is not None:
                report.run("errors", lambda: there.watch(watch_min, output.progress))
    finally:
        output.end_progress()
        client.close()
    _end(report)


def _end(report: Report) -> None:
    if report.wrong:
        raise Failure(f"{report.wrong} of {report.checks} checks failed", WRONG)
