"""What an endpoint is set to do with its events, as the API takes it and the row keeps it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final, Literal
from uuid import UUID

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from agentflow.jobs import registry
from agentflow.jobs.text import is_storable
from agentflow.webhooks import mapping, places

if TYPE_CHECKING:
    from agentflow.fetch import Guard

_HEADER: Final = r"^[A-Za-z0-9][A-Za-z0-9-]{0,99}$"


class InvalidConfig(ValueError):
    """`field` is a path (`action.payload.sleep_ms`), `problem` says what would be right."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


def _storable(text: str) -> str:
    if not is_storable(text):
        raise ValueError("holds a NUL character or half of a surrogate pair, which cannot be stored")
    return text


Place = Annotated[str, Field(max_length=500, pattern=places.PATTERN)]
EventType = Annotated[str, Field(min_length=1, max_length=300), AfterValidator(_storable)]


class _Part(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
    )


class KeepAction(_Part):
    """Keep the event, and do nothing more."""

    kind: Literal["keep"] = "keep"


class JobAction(_Part):
    """Hand in a job. In its payload `{"$from": place}` stands for what the event has there, else for its `default`."""

    kind: Literal["job"]
    type: Annotated[str, Field(min_length=1, max_length=200)] = Field(description="One of `GET /api/job-types`")
    payload: dict[str, Any] = Field({}, description='Such as `{"text": {"$from": "/data/name"}, "number": 7}`')


class ForwardAction(_Part):
    """POST the body as it came to another address, signed with the organization's callback secret (Standard Webhooks)."""

    kind: Literal["forward"]
    url: Annotated[str, Field(min_length=1, max_length=4096)] = Field(description="http(s), a public address")


Action = Annotated[KeepAction | JobAction | ForwardAction, Field(discriminator="kind")]


class HmacScheme(_Part):
    """How a `generic` sender signs: HMAC of the body, or of `timestamp + separator + body` where a header has the time.
    `prefix` is what stands before the signature, such as `sha256=`."""

    header: Annotated[str, Field(pattern=_HEADER)] = "X-Signature"
    algorithm: Literal["sha1", "sha256", "sha512"] = "sha256"
    encoding: Literal["hex", "base64"] = "hex"
    prefix: Annotated[str, Field(max_length=50, pattern=r"^[!-~]*$")] = ""
    timestamp_header: Annotated[str, Field(pattern=_HEADER)] | None = None
    separator: Annotated[str, Field(max_length=5, pattern=r"^[ -~]*$")] = "."


class Config(_Part):
    """A place is `/data/id` (a JSON pointer into the body), `header:X-Name`, or `event:` and one of `id`, `type`, `source`,
    `delivery_id`, `received_at`."""

    action: Action = Field(default=KeepAction(), description="What is done with an event")
    only: Annotated[list[EventType], Field(min_length=1, max_length=100)] | None = Field(
        default=None, description="Events of other types than these are kept and nothing is done with them"
    )
    entity: Place | None = Field(
        default=None, description="What an event is about: events of one entity are handled in order …"
    )
    version: Place | None = Field(
        default=None,
        description="… and one with an older time than was handled already is discarded (Unix time or ISO 8601)",
    )
    account_id: UUID | None = Field(default=None, description="For `kommo`: the account whose entities are read again")
    hmac: HmacScheme = Field(default=HmacScheme(), description="For `generic`")
    delivery_id: Place | None = Field(
        default=None, description="For `generic`: what tells a delivery from others; else its body"
    )
    type: Place | None = Field(default=None, description="For `generic`: where an event's type stands")


def check(source: str, config: Config, *, guard: Guard) -> None:
    """Whether this can work with this source. Raises InvalidConfig. May look up the name in a URL."""
    if (source == "kommo") != (config.account_id is not None):
        raise InvalidConfig("account_id", "belongs to `kommo`, which needs it")
    if source == "kommo" and not isinstance(config.action, KeepAction):
        raise InvalidConfig("action", "is fixed for `kommo`: the entities are read again")
    if source != "generic":
        for name in ("hmac", "delivery_id", "type"):
            if getattr(config, name) != Config.model_fields[name].default:
                raise InvalidConfig(name, "belongs to `generic`: this source has its own")
    if config.version is not None and config.entity is None:
        raise InvalidConfig("version", "is of an entity: name that, too")
    if isinstance(config.action, ForwardAction):
        from agentflow.fetch import FetchRefused, check_url  # with its HTTP modules only where a URL is named

        try:
            check_url(config.action.url, guard)
        except FetchRefused as error:
            raise InvalidConfig("action.url", str(error)) from None
    if isinstance(config.action, JobAction):
        _check_job(config.action)


def _check_job(action: JobAction) -> None:
    if not registry.known(action.type) or not registry.get(action.type).public:
        raise InvalidConfig("action.type", str(registry.UnknownType(action.type)))
    if not is_storable(action.model_dump_json()):
        raise InvalidConfig("action.payload", "holds what cannot be stored: a NUL, or half of a surrogate pair")
    try:
        mapping.check(action.payload, registry.get(action.type).payload)
    except mapping.Unmappable as error:
        raise InvalidConfig(".".join(["action.payload", *error.path]), error.problem) from None
