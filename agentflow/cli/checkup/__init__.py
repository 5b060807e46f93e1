"""`agentflow doctor`: looks at everything AgentFlow stands on, and says what to do about what is wrong. Shows no secret.

A server is looked at in steps (name, connection, TLS, password, answer), so that each kind of failure has its own advice.
"""

from __future__ import annotations

from agentflow import embedded, settings
from agentflow.cli import output
from agentflow.cli.checkup import comfyui, machine, postgres, processes, rabbitmq, redis, storage, telegram
from agentflow.cli.checkup.report import Remark, Report, Wrong
from agentflow.cli.errors import WRONG, Failure
from agentflow.system import System

__all__ = ["Remark", "Report", "Wrong", "doctor"]


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
    if report.wrong:
        raise Failure(f"{report.wrong} of {report.checks} checks failed", WRONG)
