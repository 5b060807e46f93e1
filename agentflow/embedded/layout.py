"""Where the things of a home lie, and the URLs of its servers. Nothing here makes, starts or changes anything."""

from __future__ import annotations

import hashlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

POSTGRES_MAJOR = 18
POSTGRES_SOCKET = ".s.PGSQL.5432"
VALKEY_SOCKET = "valkey.sock"

# A socket's path has 104 bytes on macOS and 108 on Linux (sockaddr_un), the closing zero among them.
SOCKET_PATH_MAX_BYTES = 103


def default_home() -> Path:
    """The home of someone who named none.

    Root's is not below /root: Postgres runs as `nobody` then, who may not enter there.
    """
    if os.geteuid() == 0:
        return Path("/var/lib/agentflow")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "agentflow"
    data = os.environ.get("XDG_DATA_HOME", "")
    # "All paths set in these environment variables must be absolute", else ignored (XDG Base Directory Specification).
    return (Path(data) if data.startswith("/") else Path.home() / ".local" / "share") / "agentflow"


def database_url(home: Path) -> str:
    """The URL of the home's Postgres, whether it runs or not. Only the first join of a home may still change it."""
    run = quote(os.fsencode(Layout.of(home).run), safe="")
    # The port is named, for libpq would take it from PGPORT otherwise.
    return f"postgresql://agentflow@/postgres?host={run}&port=5432"


def redis_url(home: Path) -> str:
    """The URL of the home's Valkey, whether it runs or not; see `database_url`."""
    return f"unix://{quote(os.fsencode(Layout.of(home).run), safe='/')}/{VALKEY_SOCKET}?db=0"


@dataclass(frozen=True)
class Layout:
    """The paths of one home. `home` is absolute and free of links, so that all names of one folder mean one home."""

    home: Path

    @classmethod
    def of(cls, home: Path) -> Layout:
        return cls(home.resolve())

    @property
    def run(self) -> Path:
        """The folder of the sockets: in the home, or a short private one in /tmp where sockets cannot be in the home.

        That is so when the path is too long for a socket, when libpq would read its comma as two hosts, and on
        file systems that have no sockets (`home.make_run_folder` found out, and left a mark).
        """
        inside = self.home / "run"
        name = os.fsencode(inside / POSTGRES_SOCKET)
        if len(name) <= SOCKET_PATH_MAX_BYTES and b"," not in name and not os.path.lexists(self.run_elsewhere):
            return inside
        digest = hashlib.sha256(os.fsencode(self.home)).hexdigest()[:12]
        return Path(f"/tmp/agentflow-{os.geteuid()}-{digest}")  # noqa: S108 (private, and its owner is verified)

    @property
    def run_elsewhere(self) -> Path:
        return self.home / "run-is-in-tmp"

    @property
    def data(self) -> Path:
        return self.home / f"pg{POSTGRES_MAJOR}"

    @property
    def new_data(self) -> Path:
        return self.home / f"pg{POSTGRES_MAJOR}.new"

    @property
    def valkey(self) -> Path:
        return self.home / "valkey"

    @property
    def binaries(self) -> Path:
        return self.home / "binaries"

    def lock(self, name: str) -> Path:
        """`users` | `keeper` | `prepare` | `postgres` | `valkey`: see `keeper.py` and `stack.py`."""
        return self.home / "locks" / name

    def log(self, name: str) -> Path:
        """`postgres` | `valkey` | `keeper`."""
        return self.home / "logs" / f"{name}.log"
