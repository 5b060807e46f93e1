"""Hosts on this machine: network namespaces on a bridge, each of which can be cut off and joined again. Needs root."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Literal

from tests.processes import eventually

How = Literal["silent", "link down"]


@dataclass(frozen=True)
class Host:
    """`inside` is what is put before a command to run it there."""

    name: str
    address: str
    namespace: str
    port: str  # of the bridge

    @property
    def inside(self) -> list[str]:
        return ["ip", "netns", "exec", self.namespace]

    def cut(self, how: How) -> None:
        """`silent`: packets vanish in both directions and nobody is told. `link down`: the host itself sees that it has none."""
        if how == "silent":
            _run("bridge", "link", "set", "dev", self.port, "state", "0")
        else:
            _run("ip", "-n", self.namespace, "link", "set", "eth0", "down")

    def join(self) -> None:
        _run("ip", "-n", self.namespace, "link", "set", "eth0", "up")
        eventually(self._forwards)  # the bridge sees a link a moment after it came up

    def _forwards(self) -> bool:
        with suppress(RuntimeError):
            _run("bridge", "link", "set", "dev", self.port, "state", "3")
            return True
        return False


@dataclass(frozen=True)
class Network:
    """`address` is that of the machine which holds the servers."""

    address: str
    hosts: dict[str, Host]


@contextmanager
def network(*names: str) -> Iterator[Network]:
    """A bridge and a namespace for each name; all of it is gone at the end."""
    number = os.getpid()
    bridge, base = f"afb{number}", f"10.{213 + number // 256 % 32}.{number % 256}"
    hosts = {
        name: Host(name, f"{base}.{index}", f"af{number}-{name}", f"afv{number}-{index}")
        for index, name in enumerate(names, start=2)
    }
    try:
        _run("ip", "link", "add", bridge, "type", "bridge")
        _run("ip", "address", "add", f"{base}.1/24", "dev", bridge)
        _run("ip", "link", "set", bridge, "up")
        for host in hosts.values():
            _run("ip", "netns", "add", host.namespace)
            pair = ("type", "veth", "peer", "name", "eth0", "netns", host.namespace)
            _run("ip", "link", "add", host.port, *pair)
            _run("ip", "link", "set", host.port, "master", bridge, "up")
            for command in (("address", "add", f"{host.address}/24", "dev", "eth0"), ("link", "set", "eth0", "up")):
                _run("ip", "-n", host.namespace, *command)
            _run("ip", "-n", host.namespace, "link", "set", "lo", "up")
        yield Network(f"{base}.1", hosts)
    finally:
        for host in hosts.values():
            with suppress(RuntimeError):  # not made yet
                _run("ip", "netns", "del", host.namespace)
        with suppress(RuntimeError):
            _run("ip", "link", "del", bridge)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
