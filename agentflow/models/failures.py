"""What a model server's "no" means for the job: never again (`Permanent`), again (`Transient`), or later (`Wait`).

OpenRouter: https://openrouter.ai/docs/api-reference/errors and …/limits. The local servers use the same statuses, with bodies
of their own: Ollama and llama.cpp `{"error": {…}}`, older vLLM the fields at the top, some a bare string.
"""

from __future__ import annotations

import json
import math
import random
import re
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any, Final

from agentflow.errors import JobError, Permanent, Transient, Wait

LIMIT: Final = "model_limit"
LOADING: Final = "model_loading"
#: What fails for every further call, too: the account's matter, not the question's.
OF_THE_ACCOUNT: Final = frozenset({"model_key", "model_no_credit", "model_unknown", "model_forbidden"})

_LONGEST_WAIT_S: Final = 25 * 3600.0
_LOADING_S: Final = 5.0
_MOST_SAID: Final = 200
_ECHO: Final = 16
_LENGTH_PART: Final = re.compile(r"(\d+(?:\.\d+)?)(ms|d|h|m|s)")
_LENGTH: Final = re.compile(r"(?:\d+(?:\.\d+)?(?:ms|d|h|m|s))+")
_KEYS: Final = re.compile(r"\b(sk|gsk|hf|key)[-_][A-Za-z0-9*_.-]{4,}")

#: Words in place of a status, in errors inside of an answer that began well.
_STATUSES: Final = {
    "authentication": 401,
    "payment_required": 402,
    "insufficient_quota": 402,
    "permission_denied": 403,
    "content_policy_violation": 403,
    "refusal": 403,
    "not_found": 404,
    "payload_too_large": 413,
    "image_too_large": 413,
    "rate_limit_exceeded": 429,
    "timeout": 408,
    "server": 500,
    "server_error": 500,
    "provider_unavailable": 502,
    "provider_overloaded": 529,
    "unmapped": 500,
} | dict.fromkeys(
    (
        *("context_length_exceeded", "max_tokens_exceeded", "token_limit_exceeded", "string_too_long"),
        *("invalid_request", "invalid_request_error", "invalid_prompt", "precondition_failed", "unprocessable"),
        *("invalid_image", "image_too_small", "unsupported_image_format", "image_not_found", "image_download_failed"),
    ),
    400,
)


def of_answer(status: int, headers: Mapping[str, str], body: bytes, *, asked: str = "") -> JobError:
    """The error that an HTTP answer of status 300 and up stands for. `asked` is what must not be repeated from it."""
    try:
        document = json.loads(body)
    except ValueError:
        document = None  # HTML of a gateway, or nothing
    return of_error(status, _error_object(document), headers=headers, asked=asked)


def of_document(document: Any, *, asked: str = "") -> JobError | None:
    """The error inside of a 200, or None where there is none."""
    if not isinstance(document, dict):
        return Transient("the model server's answer is no JSON object", code="model_bad_answer")
    if document.get("error"):
        error = _error_object(document)
        return of_error(_status(error), error, asked=asked)
    choices = document.get("choices")
    if isinstance(choices, list) and choices and isinstance(choices[0], dict):
        if choices[0].get("error"):
            error = _error_object(choices[0])
            return of_error(_status(error), error, asked=asked)
        if choices[0].get("finish_reason") == "error":
            return of_error(502, {}, asked=asked)
    return None


def of_error(
    status: int, error: dict[str, Any], *, headers: Mapping[str, str] | None = None, asked: str = ""
) -> JobError:
    if status == 429 and _status(error, default=429) == 402:
        status = 402  # OpenAI's own word for an empty account
    metadata = error.get("metadata") if isinstance(error.get("metadata"), dict) else {}
    said = _said(error, asked)
    wait_s = _wait_s(headers or {}, metadata or {}, str(error.get("message", "")), time.time())
    match status:
        case 401:
            return Permanent(f"the model server refuses the key{said}", code="model_key")
        case 402:
            return Permanent(f"the account at the model server has no credit left{said}", code="model_no_credit")
        case 403:
            return _forbidden(error, metadata or {}, said)
        case 404:
            return Permanent(f"the model server does not have this model{said}", code="model_unknown")
        case 413:
            return Permanent(f"the question is too large for the model{said}", code="model_too_large")
        case 429 if wait_s is not None:
            return Wait(wait_s, LIMIT)
        case 429:
            return Transient(f"the model server is over its limit{said}", code=LIMIT)
        case 503 if "loading" in str(error.get("message", "")).lower():
            return Wait(_LOADING_S, LOADING)
        case 503 if wait_s is not None:
            return Wait(wait_s, LIMIT)
        case 408 | 504 | 524:
            return Transient(f"the model did not answer in time{said}", code="model_timeout")
        case _ if status >= 500 or status in (409, 425, 499):
            return Transient(f"the model server failed with status {status}{said}", code="model_failed")
        case _ if status < 400:
            return Permanent("the model server redirects; its base URL is wrong", code="model_bad_request")
        case _:
            return Permanent(f"the model server refused the question{said}", code="model_bad_request")


def _forbidden(error: dict[str, Any], metadata: dict[str, Any], said: str) -> Permanent:
    reasons = metadata.get("reasons")
    if isinstance(reasons, list) and reasons:
        named = ", ".join(str(reason)[:40] for reason in reasons[:5])
        return Permanent(f"the model's moderation refused this: {named}", code="model_refused")
    if metadata.get("error_type") in ("content_policy_violation", "refusal"):
        return Permanent(f"the model refused this{said}", code="model_refused")
    return Permanent(f"the model server does not permit this{said}", code="model_forbidden")


def _error_object(document: Any) -> dict[str, Any]:
    """`error` if it is an object, itself as the message if it is a string, else what stands at the top."""
    if not isinstance(document, dict):
        return {}
    error = document.get("error")
    if isinstance(error, dict):
        return error
    if isinstance(error, str):
        return {"message": error}
    return document if "message" in document else {}


def _status(error: dict[str, Any], default: int = 502) -> int:
    metadata = error.get("metadata")
    words = (error.get("code"), metadata.get("error_type") if isinstance(metadata, dict) else None, error.get("type"))
    for word in words:
        if isinstance(word, int) and not isinstance(word, bool) and 300 <= word < 600:
            return word
        if isinstance(word, str) and word.isdecimal() and 300 <= int(word) < 600:
            return int(word)
        if isinstance(word, str) and word in _STATUSES:
            return _STATUSES[word]
    return default


def exhausted_s(headers: Mapping[str, str]) -> float | None:
    """For how long a good answer's headers say that no call is left; None where they do not.

    `X-RateLimit-Remaining` and `-Reset`, also with OpenAI's `-Requests`; the reset is a time (Unix, in s or ms), seconds, or a
    length such as 6m0s.
    """
    for of in ("", "-requests"):
        if (headers.get(f"x-ratelimit-remaining{of}") or "").strip() == "0":
            seconds = _reset_s((headers.get(f"x-ratelimit-reset{of}") or "").strip(), time.time())
            if seconds is not None:
                return min(_LONGEST_WAIT_S, max(0.0, seconds))
    return None


def _reset_s(said: str, now: float) -> float | None:
    if parts := _LENGTH.fullmatch(said):
        factors = {"d": 86_400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
        return sum(float(number) * factors[unit] for number, unit in _LENGTH_PART.findall(parts[0]))
    try:
        number = float(said)
    except ValueError:
        return None
    if not math.isfinite(number):
        return None
    if number > 1e11:
        return number / 1000 - now
    return number - now if number > 1e9 else number


def _wait_s(headers: Mapping[str, str], metadata: dict[str, Any], message: str, now: float) -> float | None:
    """Until when the other side wants to be left alone, where it says so: Retry-After, the reset in the body, midnight."""
    seconds = _retry_after_s(headers.get("retry-after"), now)
    limits = metadata.get("headers")
    if seconds is None and isinstance(limits, dict):
        lower = {str(name).lower(): value for name, value in limits.items()}
        seconds = _retry_after_s(str(lower["retry-after"]), now) if "retry-after" in lower else None
        if seconds is None:
            seconds = _reset_s(str(lower.get("x-ratelimit-reset", "")).strip(), now)
    if seconds is None:
        seconds = exhausted_s(headers)
    if seconds is None and "per-day" in message:  # the daily quota of free models ends at 00:00 UTC
        today = datetime.fromtimestamp(now, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
        seconds = (today + timedelta(days=1)).timestamp() - now
    if seconds is None or math.isnan(seconds):
        return None
    # A little later than asked, and not all at once.
    return min(_LONGEST_WAIT_S, max(0.0, seconds) + random.uniform(0.1, 1.0))


def _retry_after_s(value: str | None, now: float) -> float | None:
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - now)
    except ValueError:
        return None


def _said(error: dict[str, Any], asked: str) -> str:
    """The server's own words for people, less what looks like a key, and none at all where they repeat the question."""
    message = " ".join(str(error.get("message") or "").split())[:_MOST_SAID]
    if any(message[i : i + _ECHO] in asked for i in range(max(0, len(message) - _ECHO + 1))):
        return ""
    message = _KEYS.sub("…", message)
    return f": {message}" if message else ""
