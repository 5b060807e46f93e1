"""How often an outside service may be called, over all workers: one decision over all windows of all buckets of a call.

A bucket (an organization's calls to a provider, a credential) is the exact log of the calls that were let through, as long as its
largest window: never more than `amount` calls within any `per_s` seconds. Who is refused is told when to come back: places are
handed out in order, one calls' distance apart, so that a thousand who wait do not come at once, and who comes later does not
overtake them. A place is a time and no token: who never comes back uses nothing up.

Limits learn: a 429 closes the bucket for all workers until the time that the vendor names, and lowers what is let through.
How far is found as TCP finds its rate, by additive increase and multiplicative decrease (AIMD; Chiu and Jain 1989, RFC 5681): a
little at the first refusal, since the vendor counts by another clock, and twice as much at each that follows, since its limit is
another one than ours. A quiet time gives back half of a large step (the middle between what was refused and what was
not: BIC, Xu, Harfoush and Rhee 2004); from there on it is a slow line and a cube of the time (as CUBIC, RFC 9438): slow near what
was refused, and within ten minutes all of it, since a vendor may have been overloaded for a moment only.

Own code, because no kept library decides over several windows and buckets in one step and hands out times (`limits` and
`pyrate-limiter` count one window at a time, or answer only yes or no).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import redis

from agentflow import log

logger = log.get(__name__)

#: The log of a bucket is as long as its largest window; ten bytes a call.
MOST_CALLS: Final = 1_000_000
_KEEP_PLACE_S: Final = 600
#: Who has a place and comes this much early, or finds those before him late, keeps it; else he goes to the end of the line.
_PATIENCE_MS: Final = 250
#: By how much calls may be differently long on their way, or a twentieth of a window that is shorter than a second.
_ON_ITS_WAY_MS: Final = 50.0
#: The share that a refusal takes off: the first, and the most of those that follow. A half is found in five.
_FIRST_STEP: Final = 0.05
_LARGEST_STEP: Final = 0.2
#: A refusal follows another when it comes within the shortest window, and so long, after the bucket is open again: a lower limit
#: shows itself by then. One that comes later is of a call that was on its way for long.
_FOLLOWS_S: Final = 3.0
#: While Redis is away it is asked so seldom, since each try may take its whole timeout.
_AWAY_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class Window:
    """At most `amount` calls within any `per_s` seconds."""

    amount: int
    per_s: float

    def __post_init__(self) -> None:
        if not 1 <= self.amount <= MOST_CALLS or self.per_s <= 0:
            raise ValueError(f"a window allows 1 to {MOST_CALLS} calls in more than 0 seconds, not {self}")

    @property
    def length_ms(self) -> int:
        """As it is kept here: a vendor counts calls when they arrive, and one may be on its way for longer than the next."""
        return int(self.per_s * 1000 + min(_ON_ITS_WAY_MS, self.per_s * 50))


@dataclass(frozen=True, slots=True)
class Bucket:
    """What is counted together. `name` is stable and holds no secret; without windows a bucket can only be closed, and has no
    line: those who wait for another bucket of the same call do not hold up everybody."""

    name: str
    windows: tuple[Window, ...] = ()

    @property
    def pace_ms(self) -> float:
        """The distance of two calls at the most. Those who wait are as far apart as the window that is full asks for."""
        return min((w.length_ms / w.amount for w in self.windows), default=0.0)


class Limits:
    """Safe in threads. Without Redis each process counts alone, and takes its share: `workers()` says among how many."""

    def __init__(self, client: redis.Redis | None, prefix: str, *, workers: Callable[[], int] = lambda: 1) -> None:
        self._client = client
        # In one slot of a cluster: the script looks at several buckets at once.
        self._prefix = f"{{{prefix}:limits}}"
        self._workers = workers
        self._alone = _Alone()
        self._away_since: float | None = None
        self._ask_again_at = 0.0
        if client is not None:
            self._take = client.register_script(_TAKE)
            self._refuse = client.register_script(_REFUSE)
            self._used = client.register_script(_USED)

    def take(self, buckets: Sequence[Bucket], holder: str) -> float:
        """Let a call through now (0.0), or say in how many seconds `holder` should ask again. Nothing is counted then."""
        if self._client is None or time.monotonic() < self._ask_again_at:
            return self._alone.take(buckets, holder, self._workers())
        try:
            waits_ms = self._take(
                keys=[key for bucket in buckets for key in self._keys(bucket)] + [f"{self._prefix}:place:{holder}"],
                args=[_PATIENCE_MS, _KEEP_PLACE_S * 1000, len(buckets), *self._described(buckets)],
            )
        except redis.RedisError as error:
            self._away(error)
            return self._alone.take(buckets, holder, self._workers())
        self._back()
        return float(waits_ms) / 1000

    def used(self, bucket: Bucket) -> list[int] | None:
        """How many calls each of its windows holds, in their order. None while Redis is away, or there is none."""
        if self._client is None or time.monotonic() < self._ask_again_at or not bucket.windows:
            return None
        windows = [number for window in bucket.windows for number in (window.amount, window.length_ms)]
        try:
            return [int(number) for number in self._used(keys=self._keys(bucket)[:1], args=windows)]
        except redis.RedisError as error:
            self._away(error)
            return None

    def share(self, bucket: Bucket) -> float | None:
        """How much of its fullest window is used up, from 0.0 to 1.0. None where nobody can say."""
        used = self.used(bucket)
        if used is None:
            return None
        return max(number / window.amount for number, window in zip(used, bucket.windows, strict=True))

    def refused(self, bucket: Bucket, retry_after_s: float | None = None) -> None:
        """The vendor answered 429: closed for all workers until then (None: for one call's distance), and slower."""
        seconds = min(bucket.pace_ms / 1000, 60.0) if retry_after_s is None else retry_after_s
        self._close(bucket, seconds, _FIRST_STEP)

    def close(self, bucket: Bucket, for_s: float) -> None:
        """The vendor says that nothing is left until then: closed for all workers, and as fast as before afterwards."""
        self._close(bucket, for_s, 0.0)

    def _close(self, bucket: Bucket, for_s: float, step: float) -> None:
        closed_ms = max(1.0, for_s * 1000)
        follows_s = _FOLLOWS_S + min((w.per_s for w in bucket.windows), default=0.0)
        self._alone.refused(bucket, closed_ms)
        if self._client is None or time.monotonic() < self._ask_again_at:
            return
        try:
            self._refuse(keys=self._keys(bucket)[1:], args=[int(closed_ms), step, _LARGEST_STEP, int(follows_s * 1000)])
        except redis.RedisError as error:
            self._away(error)

    def _keys(self, bucket: Bucket) -> list[str]:
        return [f"{self._prefix}:calls:{bucket.name}", f"{self._prefix}:state:{bucket.name}"]

    @staticmethod
    def _described(buckets: Sequence[Bucket]) -> list[Any]:
        told: list[Any] = []
        for bucket in buckets:
            told += [bucket.pace_ms, len(bucket.windows)]
            for window in bucket.windows:
                told += [window.amount, window.length_ms]
        return told

    def _away(self, error: Exception) -> None:
        self._ask_again_at = time.monotonic() + _AWAY_S
        if self._away_since is None:
            self._away_since = time.monotonic()
            logger.warning("Redis is away: each process keeps to its share of the limits", error=str(error))

    def _back(self) -> None:
        if self._away_since is not None:
            logger.info("Redis is back: limits are shared", seconds=round(time.monotonic() - self._away_since, 1))
            self._away_since = None


# What refusals left of a bucket's amounts. In its hash: factor, the share that the last one left; lowered, from when on it
# recovers; quiet, when no other has followed, and `back` is given back; step, what the last one took off.
_FACTOR: Final = """
local LONGER = 2  -- a window, at the most
local function factor_at(now, state)
    local h = redis.call('HMGET', state, 'factor', 'lowered', 'quiet', 'back')
    if not h[1] then return 1 end
    local seconds = math.max(0, now - tonumber(h[2])) / 1000
    local factor = tonumber(h[1]) + seconds / 3600 + (seconds / 600) ^ 3
    if now >= tonumber(h[3] or 0) then factor = factor + tonumber(h[4] or 0) end
    return math.min(1, factor)
end
"""

# KEYS: two for each bucket (calls: a list of times in ms; state: a hash), and the holder's place.
# ARGV: patience in ms, how long a place is kept in ms, number of buckets, then for each its pace in ms, its number of windows,
# and for each of those the amount and its length in ms.
# The hash: closed, the time until which nothing is let through; line, the last place that was handed out, pace, how far it was
# from the one before it, and the windows that they are of: a line of other ones is over; and what refusals taught (_FACTOR).
# Of a lowered amount whole calls are let through, and for the rest the window is longer: 95 % of 7 calls in 1 s are 7 in 1.05 s.
_TAKE: Final = (
    _FACTOR
    + """
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local patience, keep, buckets = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local place = KEYS[#KEYS]
local at, line, pace, closed = now, now, 0, false
local longest, described, arg = {}, {}, 4
for b = 1, buckets do
    local calls, state = KEYS[2 * b - 1], KEYS[2 * b]
    local h = redis.call('HMGET', state, 'closed', 'line', 'windows', 'pace')
    if h[1] and tonumber(h[1]) > now then
        closed = true
        at = math.max(at, tonumber(h[1]))
    end
    local factor = factor_at(now, state)
    local lines_pace, windows = tonumber(ARGV[arg]) / factor, tonumber(ARGV[arg + 1])
    local full = 0
    arg = arg + 2
    described[b] = table.concat(ARGV, ' ', arg, arg + 2 * windows - 1)
    if windows > 0 and h[3] == described[b] then
        line = math.max(line, tonumber(h[2] or 0))
        lines_pace = tonumber(h[4])
    end
    longest[b] = {0, 0}
    for _ = 1, windows do
        local amount, length = tonumber(ARGV[arg]), tonumber(ARGV[arg + 1])
        arg = arg + 2
        longest[b] = {math.max(longest[b][1], amount), math.max(longest[b][2], length)}
        local lowered = amount * factor
        amount = math.max(1, math.ceil(lowered - 1e-9))
        length = length * math.min(LONGER, amount / lowered)
        local before = redis.call('LINDEX', calls, -amount)
        if before then
            at = math.max(at, tonumber(before) + length)
            if tonumber(before) + length > now then
                full = math.max(full, length / amount)
            end
        end
    end
    pace = math.max(pace, full > 0 and full or lines_pace)
end
local held = not closed and redis.call('EXISTS', place) == 1
if at <= now and (held or line <= now) then
    for b = 1, buckets do
        if longest[b][1] > 0 then
            redis.call('RPUSH', KEYS[2 * b - 1], now)
            redis.call('LTRIM', KEYS[2 * b - 1], -longest[b][1], -1)
            redis.call('PEXPIRE', KEYS[2 * b - 1], longest[b][2] * LONGER + 1000)
        end
    end
    redis.call('DEL', place)
    return 0
end
if not held or at - now > patience then
    at = math.max(at, line + pace)
    for b = 1, buckets do
        if longest[b][1] > 0 then
            redis.call('HSET', KEYS[2 * b], 'line', at, 'pace', pace, 'windows', described[b])
            if redis.call('PTTL', KEYS[2 * b]) < at - now + 3600000 then
                redis.call('PEXPIRE', KEYS[2 * b], math.ceil(at - now) + 3600000)
            end
        end
    end
end
redis.call('SET', place, 1, 'PX', math.ceil(at - now) + keep)
return math.max(1, math.ceil(at - now))
"""
)

# KEYS: the bucket's state. ARGV: closed for so many ms, the share that a first refusal takes off (0: none), the most that one
# takes off, and how soon another one follows in ms.
# Many calls may be under way when the vendor begins to refuse: until it is open again, and for a second, they are one refusal.
_REFUSE: Final = (
    _FACTOR
    + """
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local first, largest, follows = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local h = redis.call('HMGET', KEYS[1], 'closed', 'lowered', 'quiet', 'step')
local closed = math.max(tonumber(h[1] or 0), now + tonumber(ARGV[1]))
redis.call('HSET', KEYS[1], 'closed', closed)
if first > 0 then
    local lowered = tonumber(h[2] or 0)
    if now >= lowered then
        local factor, step, back = factor_at(now, KEYS[1]), first, 0
        if now < tonumber(h[3] or 0) then
            step = math.min(largest, tonumber(h[4]) * 2)
            back = factor * step / 2
        end
        redis.call('HSET', KEYS[1], 'factor', math.max(0.01, factor * (1 - step)), 'step', step, 'back', back)
        lowered = now + 1000
    end
    lowered = math.max(lowered, closed)
    redis.call('HSET', KEYS[1], 'lowered', lowered, 'quiet', lowered + follows)
end
redis.call('PEXPIRE', KEYS[1], math.ceil(math.max(3600000, closed - now + 3600000)))
return 0
"""
)


# KEYS: the bucket's calls. ARGV: of each window the amount and its length in ms. The calls of a window are found by halving: the
# list is in the order of time.
_USED: Final = """
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local used = {}
for arg = 1, #ARGV, 2 do
    local amount, since = tonumber(ARGV[arg]), now - tonumber(ARGV[arg + 1])
    local low, high = 0, math.min(amount, redis.call('LLEN', KEYS[1]))
    while low < high do
        local middle = math.ceil((low + high) / 2)
        if tonumber(redis.call('LINDEX', KEYS[1], -middle)) > since then low = middle else high = middle - 1 end
    end
    used[#used + 1] = low
end
return used
"""


@dataclass
class _State:
    calls: deque[float] = field(default_factory=deque)
    closed: float = 0.0
    line: float = 0.0
    pace: float = 0.0
    windows: tuple[Window, ...] = ()
    seen: float = 0.0


class _Alone:
    """The same for one process, in memory, with its share of each window. Forgets what was not asked for lately."""

    _MOST_BUCKETS: Final = 1000

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._states: dict[str, _State] = {}
        self._places: dict[str, float] = {}

    def take(self, buckets: Sequence[Bucket], holder: str, workers: int) -> float:
        now = time.monotonic() * 1000
        share = 1.0 / max(1, workers)
        with self._lock:
            states = [self._state(bucket.name, now) for bucket in buckets]
            at = max([now, *(state.closed for state in states)])
            closed = at > now
            pace = 0.0
            for bucket, state in zip(buckets, states, strict=True):
                full = 0.0
                for window in bucket.windows:
                    amount = max(1, int(window.amount * share))
                    if len(state.calls) >= amount and (free_at := state.calls[-amount] + window.length_ms) > now:
                        at = max(at, free_at)
                        full = max(full, window.length_ms / amount)
                in_line = bool(bucket.windows) and state.windows == bucket.windows
                pace = max(pace, full or (state.pace if in_line else bucket.pace_ms / share))
            lines = [(state, b.windows) for b, state in zip(buckets, states, strict=True) if b.windows]
            line = max([now, *(state.line for state, windows in lines if state.windows == windows)])
            held = not closed and self._places.get(holder, 0.0) > now
            if at <= now and (held or line <= now):
                for bucket, state in zip(buckets, states, strict=True):
                    state.calls.append(now)
                    most = max((w.amount for w in bucket.windows), default=0)
                    while len(state.calls) > most:
                        state.calls.popleft()
                self._places.pop(holder, None)
                return 0.0
            if not held or at - now > _PATIENCE_MS:
                at = max(at, line + pace)
                for state, windows in lines:
                    state.line, state.pace, state.windows = at, pace, windows
            self._keep_place(holder, at + _KEEP_PLACE_S * 1000, now)
            return max(0.001, (at - now) / 1000)

    def refused(self, bucket: Bucket, closed_ms: float) -> None:
        now = time.monotonic() * 1000
        with self._lock:
            state = self._state(bucket.name, now)
            state.closed = max(state.closed, now + closed_ms)

    def _state(self, name: str, now: float) -> _State:
        state = self._states.get(name)
        if state is None:
            if len(self._states) >= self._MOST_BUCKETS:
                del self._states[min(self._states, key=lambda n: self._states[n].seen)]
            state = self._states[name] = _State()
        state.seen = now
        return state

    def _keep_place(self, holder: str, until: float, now: float) -> None:
        if len(self._places) > 50_000:
            self._places = {name: end for name, end in self._places.items() if end > now}
        self._places[holder] = until
