"""RabbitMQ."""

from __future__ import annotations

import time

from agentflow.broker import RabbitBroker
from agentflow.cli.checkup import network
from agentflow.cli.checkup.report import Remark, Wrong
from agentflow.cli.errors import one_line
from agentflow.system import System


def server(system: System) -> str | Remark:
    broker = system.broker
    assert isinstance(broker, RabbitBroker)  # noqa: S101 - what RABBITMQ_URL makes it
    network.reach(broker.host, broker.port, "RABBITMQ_URL")
    began = time.monotonic()
    try:
        broker.check(network.CONNECT_S)
    except OSError as error:
        raise _refused(error) from None
    found = (
        f"{broker.publishing.server}, connected in {(time.monotonic() - began) * 1000:.0f} ms;"
        f" {'quorum' if broker.quorum else 'classic'} queues; a worker uses 2 connections, any other process 1"
    )
    if broker.encrypted:
        found += f"; TLS {broker.presence.where['tls']}"
    if not broker.encrypted and not network.is_private(broker.host):
        return Remark(f"{found}, not encrypted", "use amqps:// in RABBITMQ_URL")
    return found


def _refused(error: OSError) -> Wrong:
    text = one_line(error)
    low = text.lower()
    if "access_refused" in low or "authentication" in low:
        return Wrong(f"auth: the server refuses the user or password: {text}", "check both in RABBITMQ_URL")
    if "vhost" in low or "not_allowed" in low or "accessdenied" in low:
        return Wrong(f"the virtual host is refused: {text}", "it is the path of RABBITMQ_URL; %2F is the default one")
    if "ssl" in low or "certificate" in low or "incompatibleprotocol" in low:
        return Wrong(
            f"TLS: {text}", "amqp:// for a server without TLS; TLS_CA_FILE names the file of your own authority"
        )
    if "blocks publishers" in low:
        return Wrong(text, "the server is short of memory or disk: make room there")
    if isinstance(error, TimeoutError) or "timeout" in low or "not connected yet" in low:
        return Wrong(
            f"timeout: connected, but it did not answer within {network.CONNECT_S:g} s",
            "is it starting, or overloaded?",
        )
    return Wrong(text, "check RABBITMQ_URL")
