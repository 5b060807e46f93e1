"""The websockets of the test ComfyUI, with the trap of the real server: who comes twice with one clientId ends deaf."""

from __future__ import annotations

import json
import socket
import struct
import threading
import uuid
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from websockets.exceptions import InvalidState
from websockets.frames import Frame, Opcode
from websockets.http11 import Request as Handshake
from websockets.server import ServerProtocol

from tests.http_server import Reply, Request

if TYPE_CHECKING:
    from tests.comfyui_server import Comfy


class Socket:
    """One open websocket. Whoever reads too slowly is cut off after 5 s."""

    def __init__(self, connection: socket.socket, protocol: ServerProtocol, *, deaf: bool) -> None:
        self.connection = connection
        self.protocol = protocol
        self.deaf = deaf
        self.sent = 0
        self._lock = threading.Lock()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 5, 0))

    def send(self, payload: bytes, *, binary: bool = False) -> None:
        if self.deaf:
            return
        with self._lock:
            (self.protocol.send_binary if binary else self.protocol.send_text)(payload)
            self.flush()
            self.sent += 1

    def flush(self) -> None:
        for data in self.protocol.data_to_send():
            if data:
                self.connection.sendall(data)

    def drop(self) -> None:
        """No closing frame: the other side sees 1006."""
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def texts(self, data: bytes) -> list[str]:
        with self._lock:
            self.protocol.receive_data(data)
            frames = [event for event in self.protocol.events_received() if isinstance(event, Frame)]
            self.flush()  # pongs, and the answer to a close
        return [bytes(frame.data).decode() for frame in frames if frame.opcode is Opcode.TEXT]


class Sockets:
    """server.sockets: one per clientId."""

    def __init__(self, comfy: Comfy) -> None:
        self.comfy = comfy
        self.by_id: dict[str, Socket] = {}
        self.open: set[Socket] = set()
        self.most = 0
        self._lock = threading.Lock()

    def reply(self, request: Request) -> Reply:
        """The answer to GET /ws: the connection is taken over."""
        if self.comfy.strikes("refuse_socket", request):
            return Reply(503, b"")
        protocol = ServerProtocol()
        lines = [f"GET {request.path}?clientId={request.query.get('clientId', '')} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in request.headers.items()]
        protocol.receive_data("\r\n".join([*lines, "", ""]).encode())
        handshake = next((each for each in protocol.events_received() if isinstance(each, Handshake)), None)
        if handshake is None:
            return Reply(400, b"No WebSocket UPGRADE hdr")
        protocol.send_response(protocol.accept(handshake))
        deaf = self.comfy.strikes("deaf_socket", request) is not None
        id_ = request.query.get("clientId") or uuid.uuid4().hex
        return Reply(takeover=lambda connection: self._serve(Socket(connection, protocol, deaf=deaf), id_))

    def _serve(self, opened: Socket, id_: str) -> None:
        opened.flush()
        greeting = self._greeting(id_)
        with self._lock:
            for message in greeting:
                opened.send(message)
            self.by_id[id_] = opened  # an older one of this id stays open, and hears nothing any more
            self.open.add(opened)
            self.most = max(self.most, len(self.open))
        try:
            first = True
            while data := opened.connection.recv(65536):
                for text in opened.texts(data):
                    if first and json.loads(text).get("type") == "feature_flags":
                        opened.send(_message("feature_flags", self.comfy.features))
                    first = False
                if opened.protocol.close_expected():
                    break
        finally:
            with self._lock:
                self.by_id.pop(id_, None)  # whichever socket stands there by now
                self.open.discard(opened)

    def _greeting(self, id_: str) -> list[bytes]:
        worker = self.comfy.worker
        greeting = [_message("status", {**self.comfy.status(), "sid": id_})]
        if worker.client_id == id_ and worker.last_node is not None:
            greeting.append(_message("executing", {"node": worker.last_node}))
        return greeting

    def send(self, type_: str, data: dict[str, Any], id_: Any) -> None:
        """To one client, or with None to all. A client id that cannot be looked up raises TypeError."""
        with self._lock:
            receivers = list(self.by_id.values()) if id_ is None else [self.by_id[id_]] if id_ in self.by_id else []
        for receiver in receivers:
            self._deliver(receiver, _message(type_, data))

    def send_binary(self, payload: bytes, id_: str) -> None:
        if (receiver := self.by_id.get(id_)) is not None:
            self._deliver(receiver, payload, binary=True)

    def _deliver(self, receiver: Socket, payload: bytes, *, binary: bool = False) -> None:
        try:
            receiver.send(payload, binary=binary)
        except (OSError, InvalidState):  # too slow, closing or closed: the real one forgets it too
            receiver.drop()

    def drop(self, id_: str | None = None) -> None:
        """Cut off the socket of this client, or all."""
        with self._lock:
            dropped = list(self.open) if id_ is None else [self.by_id[id_]] if id_ in self.by_id else []
        for each in dropped:
            each.drop()


def _message(type_: str, data: dict[str, Any]) -> bytes:
    return json.dumps({"type": type_, "data": data}).encode()
