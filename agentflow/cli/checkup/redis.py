"""Redis, or Valkey."""

from __future__ import annotations

import ssl
import time
from typing import Any
from urllib.parse import urlsplit

import redis

from agentflow import redis_client
from agentflow.cli.checkup import network
from agentflow.cli.checkup.report import Remark, Wrong
from agentflow.cli.errors import one_line
from agentflow.system import System


def server(system: System) -> str | Remark:
    variable = "REDIS_URL" if system.settings.redis_url else "AGENTFLOW_HOME"
    url = system.redis_url
    parts = urlsplit(url)
    if parts.scheme != "unix":
        network.reach(parts.hostname or "localhost", parts.port or 6379, variable)
    began = time.monotonic()
    trust = system.settings.trust
    client = redis_client.connect(
        url,
        connect_timeout_s=network.CONNECT_S,
        answer_timeout_s=network.CONNECT_S,
        client_name="agentflow doctor",
        trust=trust,
    )
    try:
        client.ping()
        connected_ms = (time.monotonic() - began) * 1000
        info: dict[str, Any] = client.info()
    except redis.RedisError as error:
        raise _refused(error, parts.scheme, variable) from None
    finally:
        client.close()
    name = "Valkey" if "valkey_version" in info else "Redis"
    found = f"{name} {info.get('valkey_version') or info.get('redis_version', '?')}, answers in {connected_ms:.0f} ms"
    if parts.scheme == "rediss":
        found += f", TLS {redis_client.presence_of(url, trust).where['tls']}"
    policy = info.get("maxmemory_policy", "noeviction")
    if info.get("maxmemory") and policy != "noeviction":
        return Remark(f"{found}, throws keys away when it is full ({policy})", "set its policy to noeviction")
    if parts.scheme == "redis" and parts.hostname and not network.is_private(parts.hostname):
        return Remark(f"{found}, not encrypted", "use rediss:// in REDIS_URL")
    return found


def _refused(error: redis.RedisError, scheme: str, variable: str) -> Wrong:
    text = one_line(error)
    low = text.lower()
    if isinstance(error, redis.AuthenticationError) or "noauth" in low or "wrongpass" in low or "noperm" in low:
        return Wrong(f"auth: the server refuses the password: {text}", f"check it in {variable}; quote @ : / # in it")
    if isinstance(error.__cause__, ssl.SSLError) or "ssl" in low or "certificate" in low:
        return Wrong(
            f"TLS: {text}", "redis:// for a server without TLS; TLS_CA_FILE names the file of your own authority"
        )
    if isinstance(error, redis.TimeoutError):
        return Wrong(
            f"timeout: connected, but it did not answer within {network.CONNECT_S:g} s",
            "if it wants TLS use rediss://, else it hangs or is overloaded",
        )
    if isinstance(error, redis.ConnectionError) and scheme == "redis" and ("closed" in low or "reset" in low):
        return Wrong(f"the connection was closed at once: {text}", "the server may want TLS: rediss://")
    return Wrong(text, f"check {variable}")
