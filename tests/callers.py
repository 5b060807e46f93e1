"""Callers of the API as threads: one that hands in, one that follows, one that waits. Each goes on until it has what it wants."""

from __future__ import annotations

import json
import threading
from typing import Any
from uuid import UUID, uuid4

import httpx2

from tests.web_support import AUTH

#: An answer that takes longer is none. Ten times what any answer should take, for busy machines.
PATIENCE_S = 25.0


class Caller(threading.Thread):
    """Hands in pings, one after the other, each again and again until it is accepted, with the same Idempotency-Key."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.accepted: dict[str, str] = {}
        self.refused: list[httpx2.Response] = []
        self.unanswered: list[str] = []
        self.prefix = uuid4().hex
        self._url = url
        self._give_up = threading.Event()

    def run(self) -> None:
        with httpx2.Client(base_url=self._url, headers=AUTH, timeout=PATIENCE_S) as http:
            number = 0
            while not self._give_up.wait(0.05):
                number += 1
                self._hand_in(http, f"{self.prefix}-{number}", _mixed(number))

    def _hand_in(self, http: httpx2.Client, key: str, payload: dict[str, Any]) -> None:
        while True:
            try:
                answer = http.post(
                    "/api/jobs", json={"type": "ping", "payload": payload}, headers={"Idempotency-Key": key}
                )
            except httpx2.TransportError as error:
                self.unanswered.append(repr(error))
                return
            if answer.status_code == 202:
                self.accepted[key] = answer.json()["id"]
                return
            self.refused.append(answer)
            if self._give_up.wait(0.2):
                return

    def stop(self) -> None:
        self._give_up.set()
        self.join(60)
        assert not self.is_alive()


def _mixed(number: int) -> dict[str, Any]:
    return ({}, {"sleep_ms": 100}, {"wait_ms": 300}, {}, {"fail_attempts": 1})[number % 5]


class Follower(threading.Thread):
    """Follows a job's events as a browser does: comes back with Last-Event-ID until the job has ended."""

    def __init__(self, url: str, job_id: UUID) -> None:
        super().__init__(daemon=True)
        self.states: list[str] = []
        self.statuses: list[int] = []
        self.unanswered: list[str] = []
        self._url = f"{url}/api/jobs/{job_id}/events"
        self._give_up = threading.Event()

    def run(self) -> None:
        last: str | None = None
        with httpx2.Client(headers=AUTH, timeout=PATIENCE_S) as http:
            while not self._give_up.wait(0.2):
                headers = {"Last-Event-ID": last} if last else {}
                try:
                    with http.stream("GET", self._url, headers=headers) as answer:
                        self.statuses.append(answer.status_code)
                        for line in answer.iter_lines() if answer.status_code == 200 else ():
                            name, _, value = line.partition(": ")
                            if name == "id":
                                last = value
                            elif name == "data":
                                self.states.append(json.loads(value)["state"])
                                if self.states[-1] in ("succeeded", "failed", "cancelled"):
                                    return
                            if self._give_up.is_set():
                                return
                except httpx2.TransportError as error:
                    self.unanswered.append(repr(error))

    def stop(self) -> None:
        self._give_up.set()
        self.join(30)


class Waiter(threading.Thread):
    """Asks with `?wait=` until it gets an end."""

    def __init__(self, url: str, job_id: UUID) -> None:
        super().__init__(daemon=True)
        self.state: str | None = None
        self.statuses: list[int] = []
        self.unanswered: list[str] = []
        self._url = f"{url}/api/jobs/{job_id}"
        self._give_up = threading.Event()

    def run(self) -> None:
        while not self._give_up.wait(0.2):
            try:
                answer = httpx2.get(self._url, params={"wait": 5}, headers=AUTH, timeout=PATIENCE_S)
            except httpx2.TransportError as error:
                self.unanswered.append(repr(error))
                continue
            self.statuses.append(answer.status_code)
            if answer.status_code == 200 and answer.json()["state"] in ("succeeded", "failed", "cancelled"):
                self.state = answer.json()["state"]
                return

    def stop(self) -> None:
        self._give_up.set()
        self.join(30)
