"""Every error of the API as one kind of document: RFC 9457, `application/problem+json`."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final

from flask import Flask, Response
from pydantic import BaseModel, ConfigDict, Field
from werkzeug.exceptions import HTTPException, InternalServerError, NotFound

from agentflow import log
from agentflow.database import Unavailable
from agentflow.jobs.intake import IdempotencyConflict
from agentflow.jobs.registry import UnknownType
from agentflow.jobs.requests import InvalidJob
from agentflow.jobs.rules import OperatorsRule
from agentflow.schedules.when import InvalidWhen
from agentflow.storage import StorageError, TooLarge

logger = log.get(__name__)

MEDIA_TYPE: Final = "application/problem+json"
#: Long enough that a crowd of clients does not stand in the way of a database that is starting up.
RETRY_AFTER_S: Final = 5
#: As RFC 9110 names them; Python does so from 3.13 on.
_PHRASES: Final = {
    413: "Content Too Large",
    414: "URI Too Long",
    416: "Range Not Satisfiable",
    422: "Unprocessable Content",
}


class Fault(BaseModel):
    """One thing that is wrong with a request."""

    model_config = ConfigDict(extra="forbid")

    field: str = Field(description="What is meant, as a path: `payload.sleep_ms`, `jobs.3.type`, `limit`")
    problem: str = Field(description="What would be right")
    where: str = Field(description="`body`, `query` or `header`")


class Problem(BaseModel):
    """An error (RFC 9457)."""

    model_config = ConfigDict(title="Problem", extra="forbid")

    type: str = Field("about:blank", description="`about:blank`: the status says what kind of problem it is")
    title: str
    status: int
    detail: str | None = Field(None, description="A sentence for people")
    errors: list[Fault] = Field([], description="What is wrong with which field (422)")


class Refused(Exception):
    """Ends a request with a problem document."""

    def __init__(
        self, status: int, detail: str, *, errors: list[Fault] | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.errors = errors or []
        self.headers = dict(headers or {})


def invalid(field: str, problem: str, where: str = "body") -> Refused:
    """422 for one field."""
    return Refused(422, f"{field}: {problem}", errors=[Fault(field=field, problem=problem, where=where)])


def phrase(status: int) -> str:
    """What a status is called, the same with every Python."""
    return _PHRASES.get(status) or HTTPStatus(status).phrase


def document(status: int, detail: str | None, errors: list[Fault] | None = None) -> str:
    problem = Problem(type="about:blank", title=phrase(status), status=status, detail=detail, errors=errors or [])
    return problem.model_dump_json(exclude_none=True, exclude=None if errors else {"errors"})


def response(
    status: int, detail: str | None, *, errors: list[Fault] | None = None, headers: Mapping[str, str] | None = None
) -> Response:
    answer = Response(document(status, detail, errors), status, content_type=MEDIA_TYPE)
    answer.headers.update(headers or {})
    return answer


def install(app: Flask) -> None:
    """Turn whatever a view raises into a problem document."""

    @app.errorhandler(Refused)
    def refused(error: Refused) -> Response:
        return response(error.status, error.detail, errors=error.errors, headers=error.headers)

    @app.errorhandler(HTTPException)
    def http(error: HTTPException) -> Response:
        status = error.code or 500
        if status < 400:  # a redirect
            return Response(error.get_body(), status, error.get_headers())
        kept = {name: value for name, value in error.get_headers() if name.lower() not in ("content-type",)}
        detail = error.description
        if isinstance(error, InternalServerError):
            detail = None
        elif detail == NotFound.description:
            detail = "nothing is served at this address"  # werkzeug's text gives advice on typing
        return response(status, detail, headers=kept)

    @app.errorhandler(InvalidJob)
    def invalid_job(error: InvalidJob) -> Response:
        return http_of(invalid(error.field, error.problem))

    @app.errorhandler(InvalidWhen)
    def invalid_when(error: InvalidWhen) -> Response:
        return http_of(invalid(error.field, error.problem))

    @app.errorhandler(UnknownType)
    def unknown_type(error: UnknownType) -> Response:
        return http_of(invalid("type", str(error)))

    @app.errorhandler(IdempotencyConflict)
    def conflict(error: IdempotencyConflict) -> Response:
        return response(409, str(error))

    @app.errorhandler(OperatorsRule)
    def operators_rule(error: OperatorsRule) -> Response:
        return response(403, str(error))

    @app.errorhandler(TooLarge)
    def too_large(error: TooLarge) -> Response:
        logger.warning("the store takes no file of this size", error=str(error))
        return response(413, "the file is larger than the storage of this installation takes; nothing was kept")

    @app.errorhandler(StorageError)
    def storage(error: StorageError) -> Response:
        logger.error("storage failed", error=str(error))
        return away("the storage of files cannot be reached; nothing was kept")

    def database(error: Exception) -> Response:
        logger.warning("answered 503: the database is away", error=" ".join(str(error).split()))
        return away("the database cannot be reached; nothing was kept")

    for kind in Unavailable:
        app.register_error_handler(kind, database)

    @app.errorhandler(Exception)
    def unforeseen(error: Exception) -> Response:
        logger.exception("a request failed in a way that is not foreseen", exc_info=error)
        return response(500, "something is wrong here; it was logged")


def http_of(error: Refused) -> Response:
    return response(error.status, error.detail, errors=error.errors, headers=error.headers)


def away(detail: str, retry_after_s: int = RETRY_AFTER_S) -> Response:
    return response(503, detail, headers={"Retry-After": str(retry_after_s)})


def faults(errors: list[Any], where: str) -> list[Fault]:
    """pydantic's list of errors, in our words' form; at most twenty."""
    found = []
    for error in errors[:20]:
        path = ".".join(str(part) for part in error["loc"]) or where
        problem = str(error["msg"]).removeprefix("Value error, ")
        if error["type"] == "extra_forbidden":
            problem = "is not known here"
        elif error["type"] == "missing":
            problem = "is missing"
        found.append(Fault(field=path, problem=problem, where=where))
    return found
