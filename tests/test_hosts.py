"""Hosts that are cut off and come back, in network namespaces. Needs root, and `ip` and `bridge` (Debian's iproute2)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hosts import network
from tests.processes import ROOT, eventually


@pytest.mark.long
@pytest.mark.timeout(900)
def test_nothing_is_lost_or_recorded_twice_while_web_scheduler_and_workers_are_cut_off(tmp_path: Path) -> None:
    assert os.geteuid() == 0, "network namespaces need root: run this test as root, or in a container as its root"
    figures = tmp_path / "hosts.json"

    done = subprocess.run(
        [sys.executable, "ops/bench/hosts.py", "--pings", "1000", "--out", str(figures)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    found = json.loads(figures.read_text())
    assert found["faults"] == [] and found["jobs"] > 1000
    # The cuts met work: leases ran out, and late outcomes came and were refused.
    assert found["outcomes of attempts"]["crashed"] > 0 and found["outcomes refused by their fence"] > 0
    assert found["their runs that came to the end"] > found["effect jobs"]


@pytest.mark.long
def test_a_host_that_is_cut_off_hears_and_says_nothing_until_it_is_joined_and_leaves_nothing_behind() -> None:
    def reaches(host_inside: list[str], address: str) -> bool:
        ask = f"import socket; socket.create_connection(('{address}', 9), 1)"
        done = subprocess.run([*host_inside, sys.executable, "-c", ask], capture_output=True, text=True, check=False)
        return "ConnectionRefusedError" in done.stderr  # somebody is there and says that nobody listens

    with network("one", "two") as net:
        one, two = net.hosts.values()
        assert reaches(one.inside, two.address) and reaches(two.inside, net.address)
        for how in ("silent", "link down"):
            one.cut(how)
            assert not reaches(one.inside, net.address) and not reaches(two.inside, one.address)
            assert reaches(two.inside, net.address)
            one.join()
            # The neighbours have to find each other again first.
            eventually(lambda: reaches(one.inside, net.address) and reaches(two.inside, one.address))
        namespaces = {host.namespace for host in net.hosts.values()}

    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert not namespaces & set(left.split())
