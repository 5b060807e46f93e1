"""Taking out what opens something, before a text leaves for a log that others read, a table, or Sentry.

Three ways, since none is enough alone: values of our own settings wherever they stand, names that say that a secret follows,
and shapes that are one whoever made them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from pydantic import SecretStr

from agentflow.settings import Settings

REDACTED: Final = "[redacted]"
#: Shorter values would be found in words that have nothing to do with them.
_SHORTEST: Final = 6
_DEEPEST: Final = 20

#: With whatever before them (`db_password`), and letters after them. The others are whole words.
_WORDS: Final = (
    r"password|passwd|passphrase|secret|credential|authorization|signature|cookie|api[_-]?key|access[_-]?key"
    r"|private[_-]?key|client[_-]?key|encryption[_-]?key|token"
)
_NAMES: Final = rf"(?:(?:{_WORDS})[a-z0-9_]*|\b(?:auth|pwd|sig|dsn|session(?:_?id)?))"
_NAME: Final = re.compile(rf"{_NAMES}\Z", re.IGNORECASE)
#: Counted, not secret: what models' usage is named by.
_COUNTED: Final = re.compile(r"(?:^|_)tokens?_(?:in|out|count|limit)\Z|(?:^|_)tokens\Z", re.IGNORECASE)
_BARE: Final = rf"(?:{re.escape(REDACTED)}|[^\s\"',;&)\]}}]+)"
_NAMED: Final = re.compile(
    rf"""({_NAMES}["']?\s*(?:=>|[=:])\s*)(?:"(?:[^"\\]|\\.)+"|'(?:[^'\\]|\\.)+'|(?:bearer|basic)\s+{_BARE}|{_BARE})""",
    re.IGNORECASE,
)
_SHAPES: Final = (
    (
        re.compile(r"(\b[a-z][a-z0-9+.-]{0,20}://)[^\s/@\"']+@", re.IGNORECASE),
        rf"\1{REDACTED}@",
    ),  # user:password in a URL
    (re.compile(r"\b(bearer|basic)\s+[a-z0-9+/_.=~-]{8,}", re.IGNORECASE), rf"\1 {REDACTED}"),
    (re.compile(r"(?<![0-9])[1-9][0-9]{5,18}:[A-Za-z0-9_-]{30,200}"), REDACTED),  # a Telegram bot's token
    (re.compile(r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*"), REDACTED),  # a JSON Web Token
    (re.compile(r"\b(?:sk|pk|rk|af|whsec|sb_secret|xox[a-z]|gh[a-z])[_-][A-Za-z0-9_+/=-]{12,}"), REDACTED),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"), REDACTED),
    (re.compile(r"([?&]key=)[^&#\s\"']+", re.IGNORECASE), rf"\1{REDACTED}"),
    (re.compile(r"(/webhooks/[a-z0-9_-]+/)[^\s/?\"']+"), rf"\1{REDACTED}"),  # the token in a webhook's address
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL), REDACTED),
)


class Redactor:
    """`known` are secrets that are taken out wherever they stand."""

    def __init__(self, known: Iterable[str] = ()) -> None:
        self._known = sorted({each for each in known if len(each) >= _SHORTEST}, key=len, reverse=True)

    def also(self, known: Iterable[str]) -> Redactor:
        """One that knows these, too."""
        return Redactor([*self._known, *known])

    def text(self, text: str) -> str:
        for secret in self._known:
            if secret in text:
                text = text.replace(secret, REDACTED)
        for shape, instead in _SHAPES:
            text = shape.sub(instead, text)
        return _NAMED.sub(_keep_the_name, text)

    def value(self, value: Any, depth: int = 0) -> Any:
        """A copy of JSON-like data: texts are looked through, what stands under a secret's name is gone."""
        if isinstance(value, str):
            return self.text(value)
        if value is None or isinstance(value, bool | int | float):
            return value
        if depth > _DEEPEST:
            return REDACTED
        if isinstance(value, Mapping):
            return {
                self.text(str(name)): REDACTED
                if content is not None and is_secret(str(name))
                else self.value(content, depth + 1)
                for name, content in value.items()
            }
        if isinstance(value, list | tuple | set | frozenset):
            return [self.value(each, depth + 1) for each in value]
        return self.text(str(value))


def is_secret(name: str) -> bool:
    """Whether what stands under this name opens something."""
    return _NAME.search(name) is not None and _COUNTED.search(name) is None


def secrets_in(value: Any, depth: int = 0) -> set[str]:
    """The texts under secrets' names in JSON-like data, and passwords in its URLs: to be taken out of texts that quote it."""
    found: set[str] = set()
    if depth > _DEEPEST:
        return found
    if isinstance(value, Mapping):
        for name, content in value.items():
            if isinstance(content, str) and is_secret(str(name)):
                found.add(content)
            else:
                found |= secrets_in(content, depth + 1)
    elif isinstance(value, list | tuple):
        for each in value:
            found |= secrets_in(each, depth + 1)
    elif isinstance(value, str):
        found |= _passwords(value)
    return found


def secrets_of(settings: Settings) -> set[str]:
    """Whatever of the settings must not be shown: secrets, and passwords inside of URLs."""
    found = set()
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if isinstance(value, SecretStr):
            text = value.get_secret_value()
            found |= {text, *_passwords(text)}
    return {secret for secret in found if len(secret) >= 3}


def of(settings: Settings) -> Redactor:
    return Redactor(secrets_of(settings))


def _passwords(text: str) -> set[str]:
    """In a URL, or a list of them."""
    found = set()
    for url in (text, *text.split(",")) if "://" in text else ():
        with suppress(ValueError):
            if password := urlsplit(url.strip()).password:
                found |= {password, unquote(password)}
    return found


def _keep_the_name(match: re.Match[str]) -> str:
    name = re.match(r"[\w-]+", match.group(1))
    return match.group(0) if name and _COUNTED.search(name.group()) else f"{match.group(1)}{REDACTED}"
