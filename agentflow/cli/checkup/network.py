"""The way to a server, before it is spoken with."""

from __future__ import annotations

import ipaddress
import socket
from contextlib import suppress
from typing import Final

from agentflow.cli.checkup.report import Wrong

CONNECT_S: Final = 5.0


def reach(host: str, port: int, variable: str) -> None:
    """Raises Wrong: the name is not known, nobody listens, nothing answers."""
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise Wrong(
            f"DNS: the name {host} is not known ({why})",
            f"check the host in {variable}; inside a private network the internal name may be needed",
        ) from None
    last: OSError = OSError("no address")
    for family, kind, protocol, _, address in addresses:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.settimeout(CONNECT_S)
                probe.connect(address)
                return
        except OSError as error:
            last = error
    where = f"{host} port {port}"
    if isinstance(last, TimeoutError):
        raise Wrong(
            f"timeout: {where} did not answer within {CONNECT_S:g} s",
            f"a firewall or an address list stands between, or the address in {variable} is of another network",
        )
    if isinstance(last, ConnectionRefusedError):
        raise Wrong(f"refused: nobody listens at {where}", f"start the server, or correct host and port in {variable}")
    raise Wrong(
        f"{where} cannot be reached ({(last.strerror or str(last)).lower()})", f"check host and port in {variable}"
    )


def is_private(host: str) -> bool:
    with suppress(OSError, ValueError, IndexError):
        return ipaddress.ip_address(socket.getaddrinfo(host, None)[0][4][0]).is_private
    return False
