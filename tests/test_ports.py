"""Ports for servers that tests and `agentflow prove` start."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from agentflow.prove import ports


@pytest.fixture(autouse=True)
def from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "_last", None)


def test_a_port_is_none_that_the_kernel_gives_to_outgoing_connections() -> None:
    lowest_outgoing = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])

    assert all(10_000 <= ports.free_port() < lowest_outgoing for _ in range(200))


def test_no_port_is_given_twice_and_none_at_which_somebody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "_last", ports.free_port())
    first = ports.free_port()
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", first + 1))

        assert ports.free_port() > first + 1


def test_a_row_of_ports_is_kept() -> None:
    first = ports.free_port(room=21)

    assert ports.free_port() > first + 20 or ports.free_port() < first


def test_at_the_end_it_goes_on_at_the_lowest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "_last", ports._outgoing_from() - 2)

    assert ports.free_port(room=2) < 11_000


def test_where_every_port_is_taken_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class Taken(socket.socket):
        def bind(self, _address: object) -> None:
            raise OSError

    monkeypatch.setattr(ports.socket, "socket", Taken)
    with pytest.raises(OSError, match="no free port from 10000"):
        ports.free_port()


def test_processes_begin_at_different_places() -> None:
    code = "from agentflow.prove.ports import free_port; print(free_port())"
    found = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in "abc"
    ]

    assert len(set(found)) > 1
