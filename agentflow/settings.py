"""The settings of a process: read once from the environment, checked, frozen.

A wrong value stops the process with one line that names the variable (`SettingsError`); a value that is allowed but unwise is
warned about once (`Settings.warnings`). The table in README is checked against `TABLE` by a test.
"""

from __future__ import annotations

import base64
import binascii
import functools
import ipaddress
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import quote, unquote, urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError, model_validator

from agentflow import hosting, tls
from agentflow.alerts import table
from agentflow.comfyui import servers
from agentflow.embedded import default_home
from agentflow.tls import Trust


class SettingsError(Exception):
    """One variable is wrong. The text names it and says what would be right; it never repeats a secret's value."""

    def __init__(self, variable: str, problem: str) -> None:
        super().__init__(f"{variable}: {problem}")
        self.variable = variable
        self.problem = problem


def _split_list(value: Any) -> Any:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def _split_thresholds(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    pairs = [part.partition("=") for part in value.split(",") if part.strip()]
    try:
        found = {name.strip(): float(number) for name, _, number in pairs}
        table.with_thresholds(found)
    except ValueError as error:
        raise ValueError(f"is a list of Name=number: {error}") from None
    return tuple(found.items())


StrList = Annotated[tuple[str, ...], BeforeValidator(_split_list)]
Thresholds = Annotated[tuple[tuple[str, float], ...], BeforeValidator(_split_thresholds)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Calls = Annotated[int, Field(ge=1, le=1_000_000)]
Tier = Literal["embedded", "database only", "starter", "production"]


class Settings(BaseModel):
    """Field names are the variables' names in lower case; a field's description is its line in README's table."""

    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)

    agentflow_env: Literal["development", "production", "test"] = Field(
        "development", description="`development` or `production`: how logs look, what is refused at start"
    )
    agentflow_home: Path = Field(
        default_factory=default_home, description="Folder of the embedded servers, the files and the operator's key"
    )
    database_url: SecretStr | None = Field(
        None, description="Postgres 15 or newer; unset: the embedded one. May be a transaction pooler"
    )
    direct_database_url: SecretStr | None = Field(
        None, description="A connection past the pooler, for migrations (default: `DATABASE_URL`)"
    )
    rabbitmq_url: SecretStr | None = Field(
        None,
        description="RabbitMQ as the broker (also `CLOUDAMQP_URL`); unset: Redis is it, or else workers poll Postgres",
    )
    rabbitmq_quorum: bool = Field(
        False, description="Quorum queues, for a RabbitMQ cluster. May be changed at any time: no job is lost by it"
    )
    redis_url: SecretStr | None = Field(
        None,
        description="Redis or Valkey for the broker, results and live progress; unset: the embedded one, or none",
    )
    redis_host: str | None = Field(None, description="With `REDIS_PORT` and `REDIS_DB`, instead of `REDIS_URL`")
    redis_port: Annotated[int, Field(ge=1, le=65535)] = Field(6379, description="See `REDIS_HOST`")
    redis_db: Annotated[int, Field(ge=0)] = Field(0, description="See `REDIS_HOST`")
    redis_connect_timeout: Seconds = Field(30.0, description="Seconds until a connection to Redis is given up")
    tls_ca_file: SecretStr | None = Field(
        None, description="Certificates of your own authorities (a PEM file, or its text), trusted beside the system's"
    )
    tls_verify: bool = Field(
        True, description="`false`: believe any certificate of Postgres, Redis and RabbitMQ; the log complains"
    )
    storage_url: str | None = Field(
        None,
        description="Where files live: `file:///folder` (default: in the home) or `s3://bucket/prefix` with `AWS_*`",
    )
    storage_shared: bool = Field(
        False, description="Says that all processes see the same folder of `file://`: one machine, or a network disk"
    )
    supabase_url: str | None = Field(
        None, description="With a key, and without `STORAGE_URL`: files live in this project's Supabase Storage"
    )
    supabase_secret_key: SecretStr | None = Field(None, description="A secret key of the project, `sb_secret_…`")
    supabase_service_role_key: SecretStr | None = Field(None, description="The old kind of key, used if there is none")
    supabase_bucket: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{1,62}$")] = Field(
        "agentflow", description="The bucket there, made at the first write; private"
    )
    admin_api_key: SecretStr | None = Field(
        None, description="The operator's key; unset: made once, in `admin.key` in the home"
    )
    encryption_key: SecretStr | None = Field(
        None, description="Base64 of 32 bytes, or 32 ASCII characters: signs links, and encrypts stored credentials"
    )
    encryption_key_old: SecretStr | None = Field(
        None, description="The key before this one, while `agentflow rotate-key` is under way: both can be read"
    )
    trusted_proxies: StrList = Field(
        (),
        description="Whose `X-Forwarded-For` is believed: how many proxies stand in front (`1` on most platforms), or their"
        " addresses and networks",
    )
    auth_failures_per_minute: Count = Field(
        30, description="Wrong keys from one address (IPv6: its /64) before they are answered with 429"
    )
    port: Annotated[int, Field(ge=1, le=65535)] = Field(
        3001, description="Where a process serves `/health` and `/metrics`; web serves its API there (8000 if unset)"
    )
    job_queue_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,40}$")] = Field(
        "agent-jobs", description="Prefix of the queues' names at the broker"
    )
    job_concurrency: Annotated[int, Field(ge=1, le=1000)] = Field(
        25, description="Jobs at once in one worker process (threads)"
    )
    job_lease: Seconds = Field(30.0, description="Seconds after which a silent worker's jobs are taken from it")
    job_lease_renew: Seconds = Field(10.0, description="Seconds between renewals of the leases")
    job_max_crashes: Annotated[int, Field(ge=1, le=100)] = Field(
        3, description="A job under which so many workers died fails as `worker_lost`"
    )
    job_payload_bytes: Annotated[int, Field(ge=1024, le=16 << 20)] = Field(
        256 << 10, description="Largest payload of a job, as JSON; larger things go to storage and travel by key"
    )
    job_result_bytes: Annotated[int, Field(ge=1024, le=64 << 20)] = Field(
        4 << 20, description="Largest result of a job, as JSON"
    )
    worker_polling_interval: Seconds = Field(
        1.0, description="Seconds between two looks for due jobs: to ring for them or, without a broker, to run them"
    )
    worker_log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="How much is logged")
    shutdown_grace: Seconds = Field(
        25.0, description="Seconds that running jobs get on SIGTERM; keep 3 s below the platform's kill"
    )
    database_pool_size: Count = Field(
        5,
        description="Most connections of a process's pool (a worker uses 5 more); for web under load as many as WEB_THREADS",
    )
    retain_succeeded_hours: Seconds = Field(24.0, description="Succeeded jobs are kept while younger than this …")
    retain_succeeded_count: Annotated[int, Field(ge=0)] = Field(1000, description="… or among the newest of these")
    retain_failed_hours: Seconds = Field(168.0, description="Failed and cancelled jobs: the same …")
    retain_failed_count: Annotated[int, Field(ge=0)] = Field(5000, description="… per organization")
    retain_idempotency_hours: Seconds = Field(24.0, description="How long an Idempotency-Key is remembered")
    retain_upload_hours: Seconds = Field(
        168.0, description="How long a video is kept, with its file, after the last job that named it is gone"
    )
    schedules_most: Count = Field(100, description="Most schedules of one organization")
    schedule_min_interval: Count = Field(60, description="Least seconds between two ticks of such a schedule")
    canary_interval: Annotated[int, Field(ge=0)] = Field(
        60, description="Seconds between two canaries (a ping through each queue, timed); `0`: none"
    )
    memory_limit_mb: Annotated[int, Field(ge=64)] | None = Field(
        None,
        description="Memory of the container in MB, for platforms that hide its control group; unset: what that says",
    )
    memory_reserve_mb: Annotated[int, Field(ge=0)] = Field(
        48,
        description="MB of it that no job is counted on to leave free: for light jobs, and for what grows unforeseen",
    )
    memory_admission: bool = Field(
        True, description="Jobs start only if they fit into the memory that is left; `false`: the kernel decides"
    )
    webhook_max_bytes: Annotated[int, Field(ge=1024, le=32 << 20)] = Field(
        4 << 20, description="Largest body of a webhook, in bytes"
    )
    retain_webhook_days: Seconds = Field(30.0, description="How long webhooks are kept, as they came")
    retain_flight_days: Seconds = Field(
        90.0, description="How long flight records tell of jobs and webhooks that are deleted (about 250 bytes each)"
    )
    upload_max_bytes: Count = Field(5 << 30, description="Largest upload or download of a video, in bytes")
    fetch_allow: StrList = Field(
        (), description="`host:port` entries, comma-separated, that may be fetched although they are private addresses"
    )
    web_threads: Annotated[int, Field(ge=2, le=500)] = Field(16, description="Requests at once in one web process")
    web_wait_share: Annotated[float, Field(gt=0, le=0.9)] = Field(
        0.5, description="Share of those threads that `?wait=` and event streams may hold"
    )
    video_concurrency: Count = Field(2, description="Videos analysed at once in one worker process")
    video_max_pixels: Count = Field(8192 * 4320, description="Largest frame of a video, in pixels")
    video_max_hours: Seconds = Field(6.0, description="Longest video, in hours")
    document_max_bytes: Count = Field(50 << 20, description="Largest document, uploaded or downloaded, in bytes")
    document_unpacked_bytes: Count = Field(
        200 << 20, description="Most bytes that a DOCX, PPTX or XLSX may have once it is unpacked"
    )
    render_image_max_bytes: Count = Field(32 << 20, description="Largest image that is given to a render, in bytes")
    document_max_characters: Count = Field(5_000_000, description="Most text of one document, in characters")
    document_memory_mb: Annotated[int, Field(ge=64)] = Field(
        300, description="Most memory of the process that reads a document, in MB (Linux)"
    )
    document_cpu_seconds: Count = Field(300, description="Most time of a processor that reading a document may take")
    document_concurrency: Count = Field(2, description="Documents read at once in one worker process")
    chunk_tokens: Annotated[int, Field(ge=32, le=2048)] = Field(
        256, description="Most tokens of a chunk; a change cuts a document anew when it is read again"
    )
    chunk_overlap_tokens: Annotated[int, Field(ge=0, le=1024)] = Field(
        32, description="Most tokens of a chunk's end that the next one repeats; at most half of `CHUNK_TOKENS`"
    )
    metrics_token: SecretStr | None = Field(None, description="Where set, `/metrics` wants it as a bearer token")
    alert_interval: Annotated[int, Field(ge=0)] = Field(
        15, description="Seconds between two looks of the scheduler at what it raises alerts for; `0`: none"
    )
    alert_thresholds: Thresholds = Field(
        (), description="Other thresholds than those of `ops/monitoring`: `QueueTooLong=50,MemoryHigh=0.9`"
    )
    alert_telegram_chat: str | None = Field(
        None, description="Chat or channel that `TELEGRAM_BOT_TOKEN`'s bot tells of alerts, as its number or `@name`"
    )
    alert_webhook_url: SecretStr | None = Field(
        None, description="And a URL that they are posted to, signed as callbacks are"
    )
    alert_webhook_secret: SecretStr | None = Field(None, description="With this secret, `whsec_` and base64")
    openrouter_api_key: SecretStr | None = Field(None, description="OpenRouter for everything that has no server below")
    openrouter_base_url: str = Field(
        "https://openrouter.ai/api/v1", description="Another address of OpenRouter's API, such as a gateway's"
    )
    openrouter_referer: str | None = Field(None, description="Your product's URL, for OpenRouter's statistics")
    openrouter_title: Annotated[str, Field(max_length=100)] = Field("AgentFlow", description="And its name")
    openrouter_rate_per_minute: Calls = Field(
        100,
        description="Calls of OpenRouter for each organization; over it jobs are parked. `agentflow rules limit` goes before",
    )
    openrouter_rate_per_hour: Calls = Field(5_000, description="The same in an hour")
    openrouter_rate_per_day: Calls = Field(100_000, description="And in a day")
    llm_base_url: str | None = Field(
        None, description="An OpenAI-compatible server for chat and pictures: `http://127.0.0.1:11434/v1` is Ollama's"
    )
    llm_api_key: SecretStr | None = Field(None, description="Its key, where it wants one")
    llm_model: str | None = Field(None, description="Its model; at OpenRouter `openai/gpt-4o-mini`")
    vision_model: str | None = Field(None, description="The model for questions with pictures (default: `LLM_MODEL`)")
    llm_structured_output: Literal["json_schema", "json_object", "none"] = Field(
        "json_schema", description="How JSON is asked for: `json_object` or `none` for servers that refuse schemas"
    )
    llm_timeout: Seconds = Field(180.0, description="Seconds until a model's answer is given up")
    embeddings_base_url: str | None = Field(None, description="An OpenAI-compatible server for embeddings")
    embeddings_api_key: SecretStr | None = Field(None, description="Its key, where it wants one")
    embeddings_model: str | None = Field(
        None,
        description="Its model, or OpenRouter's (`openai/text-embedding-3-small`); unset: the local one, which needs no server",
    )
    embeddings_passage_prefix: str | None = Field(
        None, description="What the model wants before a text that is to be found: `passage:` for E5"
    )
    embeddings_query_prefix: str | None = Field(None, description="And before a question: `query:` for E5")
    transcription_base_url: str | None = Field(None, description="An OpenAI-compatible server for speech")
    transcription_api_key: SecretStr | None = Field(None, description="Its key, where it wants one")
    transcription_model: str | None = Field(None, description="Its model; at OpenRouter `openai/whisper-1`")

    kommo_client_id: str | None = Field(None, description="Your Kommo integration, for connecting accounts by OAuth")
    kommo_client_secret: SecretStr | None = Field(None, description="Its secret key")
    kommo_redirect_uri: str | None = Field(
        None, description="As registered there: the public address of `/crm/oauth/callback` here"
    )
    kommo_calls_per_second: Annotated[int, Field(ge=1, le=1000)] = Field(
        7, description="Calls to one Kommo account within a second, over all workers; paid packages allow more"
    )

    comfyui_url: SecretStr | None = Field(
        None,
        description="ComfyUI servers for renders, comma-separated; each may have credentials, and `?pool=NAME&slots=2`",
    )
    comfyui_timeout: Seconds = Field(
        300.0, description="Seconds from sending a render until it is interrupted and tried again"
    )
    comfyui_poll_interval: Seconds = Field(0.25, description="Seconds between two looks at what became of a render")
    worker_gpu_lock_timeout: Seconds = Field(
        30.0, description="Most seconds until a render that waits for a GPU looks again; it is woken when one is free"
    )

    telegram_bot_token: SecretStr | None = Field(None, description="What @BotFather gave your bot, `123456789:AA…`")
    telegram_workflow: Annotated[str, Field(min_length=1, max_length=100)] = Field(
        "qwen-image-edit", description="The workflow that the bot renders; it takes an `image` and a `prompt`"
    )
    telegram_user_limit: Annotated[int, Field(ge=1, le=1000)] = Field(
        3, description="Pictures that one person may have in work at the bot at once"
    )
    telegram_api_url: str = Field(
        "https://api.telegram.org", description="Another address of the Bot API, such as that of a server of your own"
    )

    sentry_dsn: SecretStr | None = Field(
        None, description="Where Sentry takes errors, traces and check-ins: `https://key@o1.ingest.sentry.io/2`"
    )
    sentry_environment: Annotated[str, Field(min_length=1, max_length=64)] | None = Field(
        None, description="What Sentry calls this installation (default: `AGENTFLOW_ENV`)"
    )
    sentry_traces_sample_rate: Share = Field(
        1.0, description="Share of requests and attempts that are traced; `0.05` on a small plan, `0`: none"
    )
    sentry_profiles_sample_rate: Share = Field(
        0.1, description="Share of those that are profiled as well; `0` on a small plan"
    )
    sentry_monitors: Literal["all", "scheduler", "none"] = Field(
        "all",
        description="Who checks in: each entry of the calendar, or (on a small plan, with one monitor) the scheduler alone",
    )

    @property
    def embedded_database(self) -> bool:
        return self.database_url is None

    @property
    def embedded_redis(self) -> bool:
        return self.redis_url is None and self.embedded_database

    @property
    def uses_redis(self) -> bool:
        return self.redis_url is not None or self.embedded_redis

    @property
    def tier(self) -> Tier:
        """Its name in README's table. What is embedded and what is not may be mixed: then by its broker."""
        if self.rabbitmq_url is not None:
            return "production"
        if self.redis_url is not None:
            return "starter"
        return "embedded" if self.embedded_database else "database only"

    @property
    def storage_folder(self) -> Path | None:
        """Where files are kept on a disk; None where they are not."""
        if self.supabase_key is not None:
            return None
        if self.storage_url is None:
            return self.agentflow_home / "storage"
        url = urlsplit(self.storage_url)
        return Path(unquote(url.path)) if url.scheme == "file" else None

    @property
    def trust(self) -> Trust:
        """Whose certificates are believed."""
        text = tls.authorities(self.tls_ca_file.get_secret_value()) if self.tls_ca_file else None
        return Trust(text, self.tls_verify, self.agentflow_home)

    @property
    def supabase_key(self) -> str | None:
        """The key for Supabase Storage, where files live in it; else None."""
        key = self.supabase_secret_key or self.supabase_service_role_key
        return key.get_secret_value() if key and self.supabase_url and not self.storage_url else None

    @property
    def comfyui_servers(self) -> tuple[servers.Server, ...]:
        """The servers of COMFYUI_URL."""
        return servers.parse(self.comfyui_url.get_secret_value()) if self.comfyui_url else ()

    @property
    def link_secret(self) -> bytes | None:
        """The key material of ENCRYPTION_KEY, 32 bytes."""
        return encryption_key_bytes(self.encryption_key.get_secret_value()) if self.encryption_key else None

    @property
    def old_keys(self) -> tuple[bytes, ...]:
        """The key material of ENCRYPTION_KEY_OLD, where it is set."""
        old = self.encryption_key_old
        return (encryption_key_bytes(old.get_secret_value()),) if old else ()

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.job_lease_renew * 2 > self.job_lease:
            raise SettingsError(
                "JOB_LEASE_RENEW", f"{self.job_lease_renew:g} must be at most half of JOB_LEASE ({self.job_lease:g})"
            )
        for name in ("encryption_key", "encryption_key_old"):
            if (key := getattr(self, name)) is not None:
                encryption_key_bytes(key.get_secret_value(), name.upper())
        if self.encryption_key_old is not None and self.encryption_key is None:
            raise SettingsError("ENCRYPTION_KEY_OLD", "is the key before ENCRYPTION_KEY: set that, too")
        for name, schemes in _SCHEMES.items():
            value = getattr(self, name)
            text = value.get_secret_value() if isinstance(value, SecretStr) else value
            if text is not None and urlsplit(text).scheme not in schemes:
                raise SettingsError(name.upper(), f"must begin with {' or '.join(s + '://' for s in schemes)}")
        if self.rabbitmq_url is not None and not urlsplit(self.rabbitmq_url.get_secret_value()).hostname:
            raise SettingsError("RABBITMQ_URL", "names no host; it looks like amqps://user:password@host/vhost")
        try:
            self.comfyui_servers  # noqa: B018 - read to be checked
        except ValueError as error:
            raise SettingsError("COMFYUI_URL", str(error)) from None
        if self.tls_ca_file is not None:
            try:
                tls.authorities(self.tls_ca_file.get_secret_value())
            except ValueError as error:
                raise SettingsError("TLS_CA_FILE", str(error)) from None
        for entry in self.fetch_allow:
            host, _, port = entry.rpartition(":")
            if not host or not port.isdigit():
                raise SettingsError("FETCH_ALLOW", f"{entry!r} is not host:port")
        if not (len(self.trusted_proxies) == 1 and self.trusted_proxies[0].isdecimal()):
            for entry in self.trusted_proxies:
                try:
                    ipaddress.ip_network(entry, strict=False)
                except ValueError:
                    raise SettingsError(
                        "TRUSTED_PROXIES",
                        f"{entry!r} is neither a number of proxies nor an address or network such as 10.0.0.0/8",
                    ) from None
        for name in ("supabase_secret_key", "supabase_service_role_key"):
            if (secret := getattr(self, name)) and secret.get_secret_value().startswith("sb_publishable_"):
                raise SettingsError(
                    name.upper(), "is a publishable key, which may not write; it begins with sb_secret_"
                )
        for kind in ("llm", "embeddings", "transcription"):
            if getattr(self, f"{kind}_base_url") and not getattr(self, f"{kind}_model"):
                raise SettingsError(
                    f"{kind}_model".upper(),
                    f"must be set where {kind.upper()}_BASE_URL is: it names the server's model",
                )
        if self.alert_telegram_chat is not None and self.telegram_bot_token is None:
            raise SettingsError("ALERT_TELEGRAM_CHAT", "is told by the bot of TELEGRAM_BOT_TOKEN: set that, too")
        if self.alert_webhook_secret is not None and not _SIGNING_SECRET.fullmatch(
            self.alert_webhook_secret.get_secret_value()
        ):
            raise SettingsError(
                "ALERT_WEBHOOK_SECRET", "is `whsec_` and base64; make one with: echo whsec_$(openssl rand -base64 32)"
            )
        if self.chunk_overlap_tokens * 2 > self.chunk_tokens:
            raise SettingsError(
                "CHUNK_OVERLAP_TOKENS",
                f"{self.chunk_overlap_tokens} must be at most half of CHUNK_TOKENS ({self.chunk_tokens})",
            )
        if self.telegram_bot_token is not None and not _BOT_TOKEN.fullmatch(self.telegram_bot_token.get_secret_value()):
            raise SettingsError("TELEGRAM_BOT_TOKEN", "is a number, a colon and letters, as @BotFather shows it")
        if self.sentry_dsn is not None and not _DSN.fullmatch(self.sentry_dsn.get_secret_value()):
            raise SettingsError("SENTRY_DSN", "is https://key@host/number, as Sentry shows it under Client Keys")
        if self.admin_api_key is not None and len(self.admin_api_key.get_secret_value()) < 16:
            raise SettingsError("ADMIN_API_KEY", "must have at least 16 characters")
        return self

    def warnings(self) -> list[str]:
        """Values that are allowed but probably not meant, each a sentence that names its variable."""
        said = []
        for name, (low, high, why) in _SENSIBLE.items():
            value = getattr(self, name)
            if not low <= value <= high:
                said.append(f"{name.upper()}={value:g} is outside the sensible range {low:g} to {high:g}: {why}")
        if not self.tls_verify:
            said.append("TLS_VERIFY is off: whoever stands on the way to a server may read and change what is said")
        for name in ("database_url", "direct_database_url", "redis_url", "rabbitmq_url"):
            url = getattr(self, name)
            if url is not None and (sentence := tls.unverified(name.upper(), url.get_secret_value())):
                said.append(sentence)
        return said


_SCHEMES: dict[str, tuple[str, ...]] = {
    "database_url": ("postgresql", "postgres"),
    "direct_database_url": ("postgresql", "postgres"),
    "rabbitmq_url": ("amqp", "amqps"),
    "redis_url": ("redis", "rediss", "unix"),
    "storage_url": ("file", "s3"),
    "supabase_url": ("https", "http"),
    "openrouter_base_url": ("https", "http"),
    "llm_base_url": ("http", "https"),
    "embeddings_base_url": ("http", "https"),
    "transcription_base_url": ("http", "https"),
    "telegram_api_url": ("https", "http"),
    "alert_webhook_url": ("https", "http"),
}

#: As agentflow/signing.py makes them: 24 bytes or more.
_SIGNING_SECRET = re.compile(r"whsec_(?:[A-Za-z0-9+/]{4}){8,}(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?")
#: It becomes a part of URLs.
_BOT_TOKEN = re.compile(r"[1-9][0-9]{0,18}:[A-Za-z0-9_-]{8,200}")

_DSN = re.compile(r"https?://[^\s:/@]+(?::[^\s/@]*)?@[^\s/@]+/(?:[^\s?#]*/)?[0-9]+/?")

_SENSIBLE: dict[str, tuple[float, float, str]] = {
    "job_concurrency": (1, 100, "threads share one interpreter; more processes carry more"),
    "job_lease": (5, 300, "shorter leases are lost to pauses, longer ones delay the rescue of a dead worker's jobs"),
    "worker_polling_interval": (
        0.05,
        10,
        "retries and parked jobs start this much late, or the database is asked too often",
    ),
    "shutdown_grace": (1, 300, "platforms kill after 30 s unless told otherwise"),
    "database_pool_size": (1, 50, "small plans allow 20 connections in all"),
    "comfyui_poll_interval": (
        0.1,
        5,
        "servers are asked too often, or ends are heard of late where no websocket comes through",
    ),
    "worker_gpu_lock_timeout": (5, 120, "renders that wait are woken anyway; more looks are work for nothing"),
}


def encryption_key_bytes(text: str, variable: str = "ENCRYPTION_KEY") -> bytes:
    """The 32 bytes behind a key: base64 of 32 bytes, or exactly 32 ASCII characters as the old product had."""
    if len(text) == 32 and text.isascii():
        return text.encode()
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    if len(raw) != 32:
        raise SettingsError(
            variable,
            "must be base64 of 32 bytes, or 32 ASCII characters; make one with: openssl rand -base64 32",
        )
    return raw


def load(environ: Mapping[str, str] | None = None) -> Settings:
    """Settings from `environ` (default: this process's). Empty variables count as unset. Raises SettingsError."""
    environ = os.environ if environ is None else environ
    values: dict[str, str] = {}
    for field in Settings.model_fields:
        text = environ.get(field.upper(), "")
        if text != text.strip():
            raise SettingsError(field.upper(), "has spaces or a line break at its start or end; take them out")
        if text:
            values[field] = text
    _derive_redis_url(environ, values)
    if "rabbitmq_url" not in values and (cloud := environ.get("CLOUDAMQP_URL", "").strip()):
        values["rabbitmq_url"] = cloud  # what Heroku's and Render's add-on of that name sets
    try:
        read = Settings.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise SettingsError(str(first["loc"][0]).upper(), first["msg"]) from None
    platform = hosting.ephemeral_platform(environ)
    if read.database_url is None and platform and not hosting.survives(read.agentflow_home, platform, environ):
        disk = "" if platform == "Heroku" else ", or put AGENTFLOW_HOME on a disk that is mounted"
        raise SettingsError(
            "DATABASE_URL",
            f"must be set: {platform} throws this disk away, and all jobs with it; set it to a Postgres{disk}",
        )
    return read


def check_files(read: Settings, environ: Mapping[str, str] | None = None, *, alone: bool = False) -> None:
    """For a process that keeps files for others, or reads theirs. Raises SettingsError where the others would not see them.

    `alone`: web, worker and schedule are all in this process, so that a folder of this machine will do, if it lasts.
    """
    folder = read.storage_folder
    if read.embedded_database or folder is None or read.storage_shared:
        return
    environ = os.environ if environ is None else environ
    platform = hosting.ephemeral_platform(environ)
    lasts = platform is None or hosting.survives(folder, platform, environ)
    if alone and lasts:
        return
    where = f"the folder {folder} is this machine's own" if lasts else f"{platform} throws the folder {folder} away"
    raise SettingsError(
        "STORAGE_URL",
        f"must be shared by all processes, as s3://bucket/prefix is: {where};"
        " where all of them do see it, set STORAGE_SHARED=true",
    )


def _derive_redis_url(environ: Mapping[str, str], values: dict[str, str]) -> None:
    """Upstash's REST variables and REDIS_HOST name a Redis server as well; the REST token is its password."""
    rest = values.get("redis_url", "")
    if not rest.startswith("https://"):
        rest = "" if "redis_url" in values else environ.get("UPSTASH_REDIS_REST_URL", "").strip()
    if rest:
        url = urlsplit(rest)
        token = environ.get("UPSTASH_REDIS_REST_TOKEN", "").strip() or url.password
        if url.scheme != "https" or not url.hostname:
            raise SettingsError("UPSTASH_REDIS_REST_URL", "must be the https:// URL that Upstash shows")
        if not token:
            raise SettingsError("UPSTASH_REDIS_REST_TOKEN", "is missing; it belongs to the https:// URL of Upstash")
        values["redis_url"] = f"rediss://default:{quote(token, safe='')}@{url.hostname}:6379"
    elif "redis_url" not in values and "redis_host" in values:
        values["redis_url"] = (
            f"redis://{values['redis_host']}:{values.get('redis_port', 6379)}/{values.get('redis_db', 0)}"
        )


@functools.lru_cache(maxsize=1)
def current() -> Settings:
    """The settings of this process, read at the first call."""
    return load()


#: variable -> (default as text, description): what README's table must say.
TABLE: dict[str, tuple[str, str]] = {
    name.upper(): (
        "" if field.default is None else "see text" if field.default_factory else str(field.default),
        field.description or "",
    )
    for name, field in Settings.model_fields.items()
}
