"""Whether a server is there, as this process knows: one line in the log for each change, and who may try to connect when.

A process has many connections to a server, and each of them finds out by itself that it is away. Here that is said once, the
rest is counted; and while it is away one attempt at a time is made for all, with pauses, so that nobody waits for a server that
is known to be away and none is stormed when it comes back.
"""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable
from typing import Any, Final

from agentflow import log

#: Pauses between attempts grow to this …
PAUSE_MOST_S: Final = 1.0
#: … or to this after a refusal (password, certificate), which does not pass by itself; poolers lock out who goes on asking.
REFUSED_MOST_S: Final = 15.0
_FIRST_PAUSE_S: Final = 0.05
#: Other reasons than the first that are told in one outage.
_MORE_REASONS: Final = 3

logger = log.get(__name__)


class Presence:
    """`begin` before an attempt to connect, `came` or `failed` after it; `failed` as well when a connection is known to be lost.

    `part` names connections of which each is needed: the server is there when it is there for all of them.
    """

    def __init__(
        self,
        server: str,
        *,
        variable: str,
        where: dict[str, Any] | None = None,
        on_change: Callable[[bool], None] = lambda _there: None,
        on_retry: Callable[[], None] = lambda: None,
    ) -> None:
        self.server = server
        self.variable = variable
        self.last_error: str | None = None
        #: What the server, or our check of it, said no to, as long as nothing else came of a later attempt.
        self.refusal: Exception | None = None
        self.quiet = False  # for who says himself what came of it
        self.where = where or {}
        self._on_change = on_change
        self._on_retry = on_retry
        self._lock = threading.Lock()
        self._said_url = self._was_there = self._trying = False
        self._away: dict[str, str] = {}  # part -> why
        self._since = self._next_at = 0.0
        self._attempts = 0
        self._errors = 0
        self._reasons: set[str] = set()

    @property
    def away(self) -> bool:
        """Known to be away, as opposed to not tried yet."""
        return bool(self._away)

    def begin(self) -> str | None:
        """None: go on and connect. Else why not now: it is away, and somebody tries, or did so a moment ago."""
        with self._lock:
            self._say_url()
            if not self._away:
                return None
            if self._trying or time.monotonic() < self._next_at:
                self._errors += 1
                return f"{self.server} is away: {self.last_error}"
            self._trying = True
        self._on_retry()
        return None

    def came(self, part: str = "") -> None:
        """A connection is made, and the server has answered on it."""
        with self._lock:
            self._say_url()
            self._trying = False
            was_away = self._away.pop(part, None) is not None
            ready = not self._away and (was_away or not self._was_there)
            self._was_there = self._was_there or ready
            if ready:
                news: dict[str, Any] = {}
                if was_away:
                    seconds = round(time.monotonic() - self._since, 1)
                    news = {"away_s": seconds, "suppressed_errors": max(0, self._errors - 1)}
                self._attempts = self._errors = 0
                self._say(logger.info, f"{self.server} connection ready", host=self.where.get("host"), **news)
        if ready:
            self._on_change(True)

    def failed(self, error: object, part: str = "", *, refused: bool = False) -> None:
        """An attempt failed, or a connection was lost. `refused`: not for now, but until somebody changes something."""
        why = " ".join(str(error).split()) or type(error).__name__
        with self._lock:
            self._say_url()
            self._trying = False
            first = not self._away
            self._away[part] = self.last_error = why
            self._attempts += 1
            self._errors += 1
            most_s = REFUSED_MOST_S if refused else PAUSE_MOST_S
            pause_s = min(most_s, _FIRST_PAUSE_S * 2.0 ** min(self._attempts, 12))
            self._next_at = time.monotonic() + pause_s * random.uniform(0.7, 1.0)
            kind = re.sub(r"\W*\d[\w.:]*", "", why)  # without addresses, ports and times
            told = {"variable": self.variable, "host": self.where.get("host"), "error": why}
            if first:
                self._since = time.monotonic()
                self._reasons = {kind}
                said = "connection lost" if self._was_there else "cannot be reached"
                self._say(logger.warning, f"{self.server} {said}", **told)
            elif kind not in self._reasons and len(self._reasons) <= _MORE_REASONS:
                self._reasons.add(kind)
                self._say(logger.warning, f"{self.server} is still away, for another reason", **told)
        if first:
            self._on_change(False)

    def gave_up(self) -> None:
        """The attempt that `begin` allowed came to nothing, for a reason that says nothing about the server."""
        with self._lock:
            self._trying = False

    def _say_url(self) -> None:
        """At the first use and not when it is made: that may be before there is a log, and before a fork."""
        if not self._said_url:
            self._said_url = True
            self._say(logger.info, f"{self.server} URL constructed", variable=self.variable, **self.where)

    def _say(self, log_it: Callable[..., Any], event: str, **fields: Any) -> None:
        if not self.quiet:
            log_it(event, **fields)
