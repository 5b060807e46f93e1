"""Which servers are believed: TLS for Postgres, Redis and RabbitMQ, verified by the system's authorities and by TLS_CA_FILE.

Redis and RabbitMQ use TLS where their URL says so (`rediss://`, `amqps://`). A Postgres URL rarely says: without `sslmode` a
server with a public name is verified in full, one inside a private network is encrypted where it offers that. What a URL says
explicitly is obeyed.
"""

from __future__ import annotations

import functools
import hashlib
import ipaddress
import os
import re
import socket
import ssl
import struct
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

import certifi
import psycopg
from psycopg.conninfo import conninfo_to_dict

#: sslmodes that check who answers.
VERIFYING: Final = ("verify-ca", "verify-full")
#: Ends of names that public DNS does not have, or that platforms give to their private networks.
_PRIVATE_ENDS: Final = (
    *(".internal", ".local", ".localhost", ".localdomain", ".lan", ".home.arpa", ".svc", ".cluster.local", ".flycast"),
)
_BEGIN: Final = "-----BEGIN CERTIFICATE-----"
_DIAGNOSIS_S: Final = 3.0


@dataclass(frozen=True)
class Trust:
    """`authorities`: PEM text of one's own authorities, trusted beside the system's. `folder`: where a file may be written."""

    authorities: str | None = None
    verify: bool = True
    folder: Path | None = None

    def context(self) -> ssl.SSLContext:
        context = ssl.create_default_context()
        paths = ssl.get_default_verify_paths()
        if paths.cafile is None and paths.capath is None:
            context.load_verify_locations(cafile=certifi.where())
        # Set by Python 3.13: refuses authorities made with openssl's defaults, which everybody else takes.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        if self.authorities:
            context.load_verify_locations(cadata=self.authorities)
        if not self.verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context

    def redis(self) -> dict[str, Any]:
        """Parameters of redis-py's SSLConnection, which what the URL says overrides."""
        paths = ssl.get_default_verify_paths()
        return {
            "ssl_cert_reqs": "required" if self.verify else "none",
            "ssl_ca_data": self.authorities,
            "ssl_ca_certs": None if paths.cafile or paths.capath else certifi.where(),
            "ssl_exclude_verify_flags": [ssl.VERIFY_X509_STRICT],  # see context()
        }

    def postgres(self, url: str) -> dict[str, str]:
        """What to add to the parameters in `url`: sslmode and the authorities, unless they are there or in libpq's variables."""
        given = conninfo_to_dict(url)
        mode = postgres_mode(given, verify=self.verify)
        if mode is None:
            return {}
        added = {"sslmode": mode}
        root = given.get("sslrootcert") or os.environ.get("PGSSLROOTCERT")
        if root == "system":  # means nothing to a libpq from a wheel: its OpenSSL looks for a folder that is not there
            return {"sslmode": "verify-full", "sslrootcert": str(self.bundle())}
        if mode in VERIFYING and root is None:
            added["sslrootcert"] = str(self.bundle())
        return added

    def bundle(self) -> Path:
        """One file with all authorities, for libpq, which takes one."""
        system = Path(os.environ.get("SSL_CERT_FILE") or ssl.get_default_verify_paths().cafile or certifi.where())
        if not self.authorities:
            return system
        text = f"{self.authorities.rstrip()}\n{system.read_text(encoding='utf-8', errors='replace')}"
        return _written(self.folder, text)


def authorities(setting: str) -> str:
    """The PEM text behind TLS_CA_FILE: a file, or the text itself, for platforms without files. Raises ValueError."""
    if _BEGIN in setting:
        text = setting.replace("\\n", "\n")
    else:
        try:
            text = Path(setting).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "not a text file"
            raise ValueError(f"the file {setting} cannot be read ({why.lower()})") from None
    try:
        ssl.create_default_context().load_verify_locations(cadata=text)
    except (ssl.SSLError, ValueError):
        raise ValueError(f"holds no certificates in PEM form ({_BEGIN} …)") from None
    return text


def is_private(host: str) -> bool:
    """Whether `host` can only be a server inside a private network, by its spelling: what DNS answers can be forged."""
    host = host.rstrip(".").lower()
    with suppress(ValueError):
        return ipaddress.ip_address(host.partition("%")[0]).is_private
    return "." not in host or host.endswith(_PRIVATE_ENDS)


def postgres_mode(given: dict[str, Any], *, verify: bool = True) -> str | None:
    """The sslmode that a connection with these parameters gets. None: a socket, or a server of this machine by its name."""
    explicit = given.get("sslmode") or os.environ.get("PGSSLMODE")
    hosts = [h for h in str(given.get("host") or given.get("hostaddr") or "").split(",") if h]
    if not hosts or all(host.startswith(("/", "@")) for host in hosts):
        return None
    if explicit:
        return str(explicit)
    if all(is_private(host) or host.startswith("/") for host in hosts):
        return "prefer"
    return "verify-full" if verify else "require"


def unverified(variable: str, url: str) -> str | None:
    """The sentence that the log says about a URL that turns verification off for a server with a public name."""
    if urlsplit(url).scheme in ("postgresql", "postgres"):
        given = dict(psycopg.conninfo.conninfo_to_dict(url))
        mode = given.get("sslmode")
        if mode and mode not in VERIFYING and postgres_mode({**given, "sslmode": None}) == "verify-full":
            return (
                f"{variable}: sslmode={mode}: nobody checks who answers there, and what is said may be read and changed"
            )
    query = parse_qs(urlsplit(url).query)
    if query.get("ssl_cert_reqs", ["required"])[0] != "required" or "CERT_NONE" in query.get("ssl_options", [""])[0]:
        return f"{variable}: its certificate is not verified: what is said may be read and changed on the way"
    return None


def why_refused(host: str, address: str, port: int, context: ssl.SSLContext) -> str | None:
    """What is wrong with a Postgres server's certificate: libpq says only that verifying failed."""
    with suppress(OSError), socket.create_connection((address, port), timeout=_DIAGNOSIS_S) as sock:
        # https://www.postgresql.org/docs/current/protocol-flow.html#PROTOCOL-FLOW-SSL
        sock.sendall(struct.pack("!ii", 8, 80877103))
        if sock.recv(1) == b"S":
            try:
                context.wrap_socket(sock, server_hostname=host).close()
            except ssl.SSLCertVerificationError as error:
                return reason(error)
    return None


def reason(error: ssl.SSLError) -> str:
    """`certificate has expired`, without OpenSSL's source lines."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the server's certificate is not accepted: {error.verify_message.rstrip('.')}"
    return re.sub(r"\s*\(_ssl\.c:\d+\)", "", str(error.args[-1]) if error.args else str(error))


@functools.cache
def _written(folder: Path | None, text: str) -> Path:
    """A file of that text: one for all processes of a home, or one of this process where the home cannot be written."""
    name = f"authorities-{hashlib.sha256(text.encode()).hexdigest()[:16]}.pem"
    if folder is not None:
        with suppress(OSError):
            return _put(folder, name, text)
    return _put(Path(tempfile.mkdtemp(prefix="agentflow-")), name, text)


def _put(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    if not path.exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = folder / f"{name}.{os.getpid()}"
        new.write_text(text, encoding="utf-8")
        new.replace(path)
    return path.resolve()
