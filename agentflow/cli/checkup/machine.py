"""This machine: settings, home, clock, and whether an `agentflow up` runs."""

from __future__ import annotations

import os
import shutil
import time
from datetime import UTC, datetime
from typing import Final

from agentflow import settings
from agentflow.cli import output, running
from agentflow.cli.checkup.report import Remark, Wrong
from agentflow.settings import Settings, Tier
from agentflow.system import System

_LITTLE_DISK: Final = 1_000_000_000
_NO_DISK: Final = 100_000_000
_CLOCK_S: Final = 5.0


def settings_read(read: Settings) -> str | Remark:
    given = [name.upper() for name in sorted(read.model_fields_set)]
    warnings = read.warnings()
    if warnings:
        return Remark("; ".join(warnings), "change it unless it is meant")
    return f"read; set are {', '.join(given)}" if given else "none set: everything runs on this machine"


_TIERS: Final[dict[Tier, str]] = {
    "embedded": "embedded: Postgres and Valkey of its own, on this machine",
    "database only": "database only: no broker and no Redis, workers look into Postgres every {poll:g} s",
    "starter": "starter: Redis rings, and keeps results and live progress",
    "production": "production: RabbitMQ rings, {redis}",
}


def tier(read: Settings) -> str | Remark:
    redis = "Redis keeps results and live progress" if read.uses_redis else "results and progress are in Postgres alone"
    found = _TIERS[read.tier].format(poll=read.worker_polling_interval, redis=redis)
    try:
        settings.check_files(read)
    except settings.SettingsError as error:
        return Remark(f"{found}; for `agentflow up` alone", str(error))
    return found


def home(read: Settings) -> str | Remark:
    folder = read.agentflow_home
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        probe = folder / f".doctor-{os.getpid()}"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise Wrong(
            f"{folder} cannot be written ({(error.strerror or str(error)).lower()})",
            "set AGENTFLOW_HOME to a folder of your own",
        ) from None
    free = shutil.disk_usage(folder).free
    if free < _NO_DISK:
        raise Wrong(f"only {output.size(free)} are free in {folder}", "make room: Postgres stops when the disk is full")
    if free < _LITTLE_DISK:
        return Remark(f"only {output.size(free)} are free in {folder}", "make room before the next large video")
    return f"{folder}, {output.size(free)} free"


def clock(system: System) -> str | Remark:
    with system.database.connect() as conn:
        began = time.monotonic()
        row = conn.execute("select clock_timestamp()").fetchone()
        trip_s = time.monotonic() - began
    assert row is not None  # noqa: S101 - a select of one row
    ahead_s = (datetime.now(UTC) - row[0]).total_seconds() - trip_s / 2
    if abs(ahead_s) > _CLOCK_S:
        where = "ahead of" if ahead_s > 0 else "behind"
        return Remark(
            f"this machine's clock is {abs(ahead_s):.0f} s {where} the database's",
            "let a time service (chrony, systemd-timesyncd) set it: signed links and TLS go by it",
        )
    return f"agrees with the database's to {abs(ahead_s) * 1000:.0f} ms"


def web(read: Settings) -> str | Remark:
    url = running.url_of(read.agentflow_home)
    return f"`agentflow up` serves at {url}" if url else "no `agentflow up` runs in this home"
