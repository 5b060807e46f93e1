"""Settings: read once, checked, frozen; a mistake stops the process with one line that names the variable."""

from __future__ import annotations

import base64
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from agentflow import settings
from agentflow.settings import SettingsError
from tests.processes import ROOT


def test_without_variables_everything_is_embedded_and_has_the_documented_defaults() -> None:
    read = settings.load({})

    assert (read.embedded_database, read.embedded_redis) == (True, True)
    assert (read.job_concurrency, read.job_lease, read.job_lease_renew, read.shutdown_grace) == (25, 30, 10, 25)
    assert read.warnings() == []


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("JOB_CONCURRENCY", "many"),
        ("JOB_CONCURRENCY", "0"),
        ("JOB_LEASE", "-1"),
        ("JOB_LEASE", "nan"),
        ("JOB_LEASE_RENEW", "20"),
        ("PORT", "70000"),
        ("DATABASE_URL", "mysql://localhost/x"),
        ("REDIS_URL", "localhost:6379"),
        ("STORAGE_URL", "ftp://x"),
        ("AGENTFLOW_ENV", "prod"),
        ("JOB_QUEUE_NAME", "with space"),
        ("ENCRYPTION_KEY", "too short"),
        ("ADMIN_API_KEY", "short"),
        ("FETCH_ALLOW", "localhost"),
        ("WORKER_LOG_LEVEL", "LOUD"),
    ],
)
def test_a_wrong_value_is_refused_and_names_its_variable(variable: str, value: str) -> None:
    with pytest.raises(SettingsError) as refused:
        settings.load({variable: value})

    assert refused.value.variable == variable
    assert str(refused.value).startswith(f"{variable}: ")


@pytest.mark.parametrize("value", [" 5", "5 ", "5\n", "\t5"])
def test_surrounding_spaces_are_refused_and_not_guessed_away(value: str) -> None:
    with pytest.raises(SettingsError, match="JOB_CONCURRENCY: has spaces"):
        settings.load({"JOB_CONCURRENCY": value})


def test_an_empty_variable_counts_as_unset() -> None:
    assert settings.load({"JOB_CONCURRENCY": "", "DATABASE_URL": ""}) == settings.load({})


def test_what_is_allowed_and_unwise_is_a_warning_that_names_the_variable() -> None:
    said = settings.load({"JOB_CONCURRENCY": "500", "SHUTDOWN_GRACE": "1000"}).warnings()

    assert [line.split("=")[0] for line in said] == ["JOB_CONCURRENCY", "SHUTDOWN_GRACE"]


def test_nothing_can_be_changed_afterwards() -> None:
    with pytest.raises(ValidationError):
        settings.load({}).job_concurrency = 5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("variables", "url"),
    [
        ({"REDIS_HOST": "cache", "REDIS_PORT": "7000", "REDIS_DB": "2"}, "redis://cache:7000/2"),
        (
            {"UPSTASH_REDIS_REST_URL": "https://eu1-x.upstash.io", "UPSTASH_REDIS_REST_TOKEN": "a/b=="},
            "rediss://default:a%2Fb%3D%3D@eu1-x.upstash.io:6379",
        ),
        (
            {"REDIS_URL": "https://eu1-x.upstash.io", "UPSTASH_REDIS_REST_TOKEN": "token"},
            "rediss://default:token@eu1-x.upstash.io:6379",
        ),
        ({"REDIS_URL": "redis://a/0", "REDIS_HOST": "b"}, "redis://a/0"),
    ],
)
def test_redis_may_be_named_in_several_ways(variables: dict[str, str], url: str) -> None:
    read = settings.load(variables)

    assert read.redis_url is not None and read.redis_url.get_secret_value() == url


def test_upstash_without_its_token_names_the_token() -> None:
    with pytest.raises(SettingsError, match="UPSTASH_REDIS_REST_TOKEN: is missing"):
        settings.load({"UPSTASH_REDIS_REST_URL": "https://eu1-x.upstash.io"})


@pytest.mark.parametrize(
    ("variables", "tier"),
    [
        ({}, "embedded"),
        ({"DATABASE_URL": "postgresql://db/x"}, "database only"),
        ({"DATABASE_URL": "postgresql://db/x", "REDIS_URL": "redis://r"}, "starter"),
        ({"DATABASE_URL": "postgresql://db/x", "REDIS_URL": "redis://r", "RABBITMQ_URL": "amqp://q"}, "production"),
        ({"DATABASE_URL": "postgresql://db/x", "RABBITMQ_URL": "amqp://q"}, "production"),
    ],
)
def test_what_is_set_names_the_tier(variables: dict[str, str], tier: str) -> None:
    read = settings.load(variables)

    assert read.tier == tier
    assert read.uses_redis == ("REDIS_URL" in variables or tier == "embedded")


@pytest.mark.parametrize("key", ["0123456789abcdef0123456789abcdef", base64.b64encode(bytes(range(32))).decode()])
def test_an_encryption_key_is_32_characters_or_base64_of_32_bytes(key: str) -> None:
    assert len(settings.encryption_key_bytes(key)) == 32


def test_secrets_are_not_in_the_text_of_settings_or_of_a_refusal() -> None:
    secret = "s3cr3t-0123456789abcdef"
    variables = {
        "ADMIN_API_KEY": secret,
        "DATABASE_URL": f"postgresql://u:{secret}@h/d",
        "REDIS_URL": f"redis://:{secret}@h",
    }

    assert secret not in repr(settings.load(variables))
    with pytest.raises(SettingsError) as refused:
        settings.load({"DATABASE_URL": f"mysql://u:{secret}@h/d"})
    assert secret not in str(refused.value)


@pytest.mark.parametrize(
    "command",
    [["-m", "scheduler"], ["-m", "migrations"], ["-m", "agentflow.cli", "queues"], ["-c", "import actors"]],
)
def test_every_process_stops_with_one_line_and_exit_status_2(command: list[str], tmp_path: Path) -> None:
    environment = {"JOB_LEASE": "soon", "PATH": "/usr/bin:/bin", "AGENTFLOW_HOME": str(tmp_path)}

    ended = subprocess.run(
        [sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60
    )

    assert ended.returncode == 2
    assert ended.stderr.startswith("agentflow: JOB_LEASE: ") and len(ended.stderr.splitlines()) == 1
