"""How times, numbers and JSON are shown; filters of the pages."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID

from jinja2 import Environment
from markupsafe import Markup

from agentflow.jobs.model import Job
from web.dashboard.words import grouped, say

HIDDEN: Final = "••••••"
#: Of a text so much is shown: a browser has to draw it.
MOST_CHARACTERS: Final = 64 << 10
_SECRET: Final = re.compile(
    r"secret|passw|authorization|credential|cookie|signature|token$|(api|private|access|encryption)[_-]?key",
    re.IGNORECASE,
)
_SECRET_VALUE: Final = re.compile(
    r"\b(af_[a-z0-9]{12}_[A-Za-z0-9_-]{43}|whsec_[A-Za-z0-9+/=_-]{16,}|sk-[A-Za-z0-9_-]{16,}|Bearer\s+[A-Za-z0-9._~+/=-]{8,})"
)
_USER_IN_URL: Final = re.compile(r"(?<=://)[^/\s:@]*:[^/\s@]+(?=@)")
#: A name and what follows it up to the value. Whether the name is of something secret is looked at apart: what others wrote is
#: long, and a pattern that looks for a word within a name goes over it once for each of its characters.
_QUERY_NAME: Final = re.compile(r"[?&]([^=&#?\s]+)=")
_QUERY_VALUE: Final = re.compile(r"[^&#\s\"]+")
_PAIR_NAME: Final = re.compile(r"(?<![\w-])([\w-]+)[\"']?[ \t]*[:=][ \t]*")
_PAIR_VALUE: Final = re.compile(
    r"\"[^\"\n]*\"?|'[^'\n]*'?|(?:(?:basic|bearer|digest|token) +)?[^\s,;&}]+", re.IGNORECASE
)
_SECRET_NAME: Final = re.compile(r"secret|token|key|passw|sig|credential|authorization|cookie", re.IGNORECASE)
PICTURE: Final = re.compile(r"\.(png|jpe?g|webp|gif)$", re.IGNORECASE)


def install(environment: Environment) -> None:
    environment.filters.update(
        ago=ago,
        moment=moment,
        lasting=lasting,
        grouped=grouped,
        short=short,
        bytes=in_bytes,
        json=as_json,
        percent=percent,
        amount=amount,
        plain=plain,
        clock=clock,
        without=without,
        oneline=one_line,
        hidden=hide_in_text,
    )


def now() -> datetime:
    return datetime.now(UTC)


def lasting(seconds: float | None) -> str:
    """`420 ms`, `3.2 s`, `4 min 10 s`, `2 h 5 min`, `3 d 4 h`."""
    if seconds is None:
        return "–"
    if seconds < 0.0005:
        return say("{n} ms", n=0)
    if seconds < 0.9995:
        return say("{n} ms", n=round(seconds * 1000))
    if seconds < 59.5:
        return say("{n} s", n=f"{seconds:.1f}".removesuffix(".0") if seconds < 9.95 else round(seconds))
    whole = round(seconds)
    for large, small, of_large, of_small in ((86_400, 3600, "d", "h"), (3600, 60, "h", "min"), (60, 1, "min", "s")):
        if whole >= large:
            first, rest = divmod(whole, large)
            parts = [say(f"{{n}} {of_large}", n=first)]
            if rest // small and first < 100:
                parts.append(say(f"{{n}} {of_small}", n=rest // small))
            return " ".join(parts)
    return say("{n} s", n=whole)


#: The keys that `lasting` puts together, for the test that none is missing.
UNITS: Final = ("{n} ms", "{n} s", "{n} min", "{n} h", "{n} d")


def moment(at: datetime | None) -> Markup:
    """The moment itself, which the browser shows in its own zone."""
    if at is None:
        return Markup("–")
    at = at.astimezone(UTC)
    return Markup('<time datetime="{}" data-moment>{} UTC</time>').format(
        at.isoformat(timespec="milliseconds"), at.strftime("%Y-%m-%d %H:%M:%S")
    )


def ago(at: datetime | None) -> Markup:
    """How long ago, or in how long; the moment itself is its title."""
    if at is None:
        return Markup("–")
    seconds = (now() - at).total_seconds()
    if abs(seconds) < 1:
        text = say("now")
    else:
        text = say("{time} ago", time=_rough(seconds)) if seconds > 0 else say("in {time}", time=_rough(-seconds))
    return Markup('<time datetime="{}" title="{}">{}</time>').format(
        at.astimezone(UTC).isoformat(timespec="milliseconds"),
        at.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        text,
    )


def _rough(seconds: float) -> str:
    """One unit: rows that are drawn anew every few seconds should not all change."""
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return say(f"{{n}} {unit}", n=int(seconds // size))
    return say("{n} s", n=int(seconds))


def short(id_: UUID | str) -> str:
    """The end of an id: the beginning is a time, and the same for many."""
    return str(id_)[-8:]


def in_bytes(number: float | None) -> str:
    if number is None:
        return "–"
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000 or unit == "GB":
            return f"{number:.0f}\u202f{unit}" if number >= 10 or unit == "B" else f"{number:.1f}\u202f{unit}"
        number /= 1000
    raise AssertionError


def percent(share: float | None) -> str:
    return "–" if share is None else f"{share * 100:.0f}\u202f%"


def amount(number: float | None) -> str:
    """Of whatever is counted: with four digits after the point where it is small."""
    if number is None:
        return "–"
    return grouped(round(number)) if abs(number) >= 1000 else plain(round(number, 4))


def plain(number: float | None) -> str:
    """As it is typed in."""
    return "" if number is None else f"{number:.6f}".rstrip("0").rstrip(".")


def clock(seconds: float) -> str:
    """A place in a film: `0:07`, `12:40`, `1:02:03`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def as_json(value: Any) -> str:
    """Indented, with secrets hidden, and cut where it is too long to be drawn."""
    return cut(json.dumps(without_secrets(value), ensure_ascii=False, indent=2))


def cut(text: str) -> str:
    if len(text) > MOST_CHARACTERS:
        text = text[:MOST_CHARACTERS] + "\n" + say("… {n} more characters", n=grouped(len(text) - MOST_CHARACTERS))
    return text


def without_secrets(value: Any) -> Any:
    """A copy in which whatever is called or looks like a credential is dots."""
    if isinstance(value, dict):
        return {
            key: HIDDEN if _SECRET.search(str(key)) and each and each is not True else without_secrets(each)
            for key, each in value.items()
        }
    if isinstance(value, list):
        return [without_secrets(each) for each in value]
    return hide_in_text(value) if isinstance(value, str) else value


def without(fields: dict[str, Any], name: str) -> dict[str, Any]:
    """The fields of a line but for one, with secrets hidden."""
    shown: dict[str, Any] = without_secrets({key: each for key, each in fields.items() if key != name})
    return shown


def one_line(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def hide_in_text(text: str) -> str:
    return _without_values(_USER_IN_URL.sub(HIDDEN, _SECRET_VALUE.sub(HIDDEN, text)), _QUERY_NAME, _QUERY_VALUE)


def hide_pairs(text: str) -> str:
    """The same in a text of which nobody knows the form: `name: value`, `"name": "value"`, `name=value`."""
    return _without_values(hide_in_text(text), _PAIR_NAME, _PAIR_VALUE)


def _without_values(text: str, names: re.Pattern[str], values: re.Pattern[str]) -> str:
    parts, at = [], 0
    for name in names.finditer(text):
        value = values.match(text, name.end()) if name.start() >= at and _SECRET_NAME.search(name[1]) else None
        if value is not None:
            parts += [text[at : name.end()], HIDDEN]
            at = value.end()
    return "".join([*parts, text[at:]])


@dataclass(frozen=True, slots=True)
class Artefact:
    """A stored file in a result: where it stands there, and its signed link. `picture` is what to draw of it, if anything."""

    name: str
    url: str
    picture: str | None
    size: int | None


def artefacts(result: Any) -> list[Artefact]:
    """Of a result with links (web.jobs.with_links), in its order."""
    return list(_artefacts(result, ""))


def _artefacts(value: Any, path: str) -> Iterator[Artefact]:
    if isinstance(value, list):
        for index, each in enumerate(value):
            yield from _artefacts(each, f"{path} {index + 1}".strip())
    if not isinstance(value, dict):
        return
    url, key = value.get("url"), value.get("key")
    if isinstance(url, str) and isinstance(key, str) and url.startswith("/artefacts/"):
        thumbnail = value.get("thumbnail_url")
        picture = thumbnail if isinstance(thumbnail, str) else url if PICTURE.search(key) else None
        size = value.get("bytes") or value.get("size")
        yield Artefact(path or key.rpartition("/")[2], url, picture, size if isinstance(size, int) else None)
    for name, each in value.items():
        yield from _artefacts(each, f"{path} {name}".strip())


def curl(job: Job) -> str:
    """The request that would make such a job, without the key."""
    body: dict[str, Any] = {"type": job.type, "payload": without_secrets(job.payload)}
    if job.correlation_id is not None:
        body["correlation_id"] = job.correlation_id
    if job.priority != "default":
        body["priority"] = job.priority
    text = json.dumps(body, ensure_ascii=False)
    return (
        'curl -X POST "$AGENTFLOW_URL/api/jobs" \\\n  -H "Authorization: Bearer $AGENTFLOW_KEY" \\\n'
        f"  -H 'Content-Type: application/json' \\\n  -d {shlex.quote(text)}"
    )
