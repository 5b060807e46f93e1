"""All alerts, with their severities and thresholds: the one place. ops/monitoring/alerts.yml is written from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Literal

Severity = Literal["critical", "warning"]

_MINUTE: Final = 60
_HOUR: Final = 3600
_DAY: Final = 86_400


@dataclass(frozen=True, slots=True)
class Condition:
    """A gauge that is above (or below) the threshold, or above a limit of its own. `by`: the labels that tell subjects apart.
    Of gauges that the scheduler has itself it can say without Prometheus whether this is so."""

    metric: str
    by: tuple[str, ...] = ()
    where: Mapping[str, str] = field(default_factory=dict)
    below: bool = False
    limit: float | None = None


@dataclass(frozen=True, slots=True)
class Alert:
    """It fires when any of `conditions`, or `expr`, has been true for `for_s`. `expr` is PromQL with $threshold and ranges such
    as [$5m]. `meaning` says what the threshold is; `summary` may name labels and {value}."""

    name: str
    severity: Severity
    threshold: float
    meaning: str
    for_s: int
    summary: str
    conditions: tuple[Condition, ...] = ()
    expr: str | None = None


_PROCESS: Final = ("job", "instance")

ALERTS: Final[tuple[Alert, ...]] = (
    Alert(
        "WorkerDown",
        "critical",
        1,
        "answers to a scrape",
        _MINUTE,
        "Worker {instance} does not answer",
        expr='up{job="agentflow-worker"} < $threshold',
    ),
    Alert(
        "RedisDisconnected",
        "critical",
        1,
        "1 while Redis answers",
        _MINUTE,
        "{job} {instance} does not reach Redis",
        (Condition("worker_redis_connection_status", _PROCESS, below=True),),
    ),
    Alert(
        "HighJobFailureRate",
        "warning",
        0.1,
        "share of the jobs of a type that ended in 5 minutes, of which at least 3 failed",
        5 * _MINUTE,
        "{value} of the jobs of type {job_type} fail",
        expr="sum by (job_type) (rate(worker_jobs_failed_total[$5m])) / (sum by (job_type)"
        " (rate(worker_jobs_failed_total[$5m])) + sum by (job_type) (rate(worker_jobs_completed_total[$5m])))"
        " > $threshold and sum by (job_type) (increase(worker_jobs_failed_total[$5m])) > 2",
    ),
    Alert(
        "HighJobProcessingTime",
        "warning",
        300,
        "seconds that 95 % of the attempts of a type stay below, of 10 minutes",
        5 * _MINUTE,
        "Attempts of type {job_type} take {value} s",
        expr="histogram_quantile(0.95, sum by (job_type, le) (rate(worker_job_duration_seconds_bucket[$10m]))) > $threshold",
    ),
    Alert(
        "HighJobProcessingQueue",
        "warning",
        0.9,
        "share of all threads that are taken",
        10 * _MINUTE,
        "{value} of the threads are taken",
        expr="sum(worker_jobs_processing) / max(agentflow_threads) > $threshold",
    ),
    Alert(
        "HighRedisReconnectAttempts",
        "warning",
        10,
        "attempts of a process to reach Redis again within 5 minutes",
        2 * _MINUTE,
        "{job} {instance} tried {value} times to reach Redis again",
        expr="max by (job, instance) (increase(worker_redis_reconnect_attempts_total[$5m])) > $threshold",
    ),
    Alert(
        "LowWorkerThroughput",
        "warning",
        1,
        "jobs of a queue done in a minute while some are due, over 10 minutes",
        10 * _MINUTE,
        "Queue {queue}: {value} jobs are done in a minute, and some are due",
        expr="sum by (queue) (rate(worker_jobs_completed_total[$10m])) * 60 < $threshold"
        ' and on (queue) max by (queue) (agentflow_jobs{state="due"}) > 0',
    ),
    Alert(
        "QueueTooLong",
        "warning",
        10,
        "due jobs of a queue",
        5 * _MINUTE,
        "Queue {queue} has {value} due jobs",
        (Condition("agentflow_jobs", ("queue",), {"state": "due"}),),
    ),
    Alert(
        "MemoryHigh",
        "warning",
        0.8,
        "share of the container's memory",
        5 * _MINUTE,
        "{job} {instance} uses {value} of its memory",
        expr="max by (job, instance) (agentflow_memory_used_bytes) / max by (job, instance) (agentflow_memory_limit_bytes)"
        " > $threshold",
    ),
    Alert(
        "WorkersSilent",
        "critical",
        1,
        "worker processes that were heard of in the last minute",
        _MINUTE,
        "No worker has been heard of for a minute",
        (Condition("agentflow_workers", below=True),),
    ),
    Alert(
        "RabbitMQUnreachable",
        "critical",
        1,
        "1 while RabbitMQ answers",
        _MINUTE,
        "{job} {instance} does not reach RabbitMQ",
        (Condition("worker_rabbitmq_connection_status", _PROCESS, below=True),),
    ),
    Alert(
        "PostgresUnreachable",
        "critical",
        1,
        "1 while Postgres answers",
        _MINUTE,
        "{job} {instance} does not reach Postgres",
        (Condition("agentflow_database_connection_status", _PROCESS, below=True),),
    ),
    Alert(
        "DispatchLag",
        "warning",
        30,
        "seconds that a job waits for the relay though nothing holds it back and threads are free",
        2 * _MINUTE,
        "A job of queue {queue} has not been rung for {value} s",
        (Condition("agentflow_dispatch_lag_seconds", ("queue",)),),
    ),
    Alert(
        "JobsStuck",
        "critical",
        0,
        "jobs that are over their time limit, or without a worker, for a minute",
        2 * _MINUTE,
        "{value} running jobs of queue {queue} are ended by nobody",
        (Condition("agentflow_jobs_stuck", ("queue",)),),
    ),
    Alert(
        "DeadLettersGrowing",
        "warning",
        20,
        "jobs of a queue that failed within an hour",
        _MINUTE,
        "{value} jobs of queue {queue} failed within an hour",
        (Condition("agentflow_dead_letters_lately", ("queue",)),),
    ),
    Alert(
        "WebhookSilence",
        "warning",
        0,
        "1 while an endpoint has been quiet for longer than its `silence_after_s`",
        0,
        "No webhook comes to {source} {endpoint}",
        (Condition("agentflow_webhook_silence", ("source", "endpoint")),),
    ),
    Alert(
        "SyncLag",
        "warning",
        30 * _MINUTE,
        "seconds by which the mirror of a CRM account is older than its interval allows",
        5 * _MINUTE,
        "A CRM account of organization {organization} is {value} s behind",
        (Condition("agentflow_sync_lag_seconds", ("organization",)),),
    ),
    Alert(
        "ProviderLimitNear",
        "warning",
        0.8,
        "share of a provider's window, or of a day's budget",
        2 * _MINUTE,
        "Organization {organization} has used {value} of its {provider}{measure}",
        (
            Condition("agentflow_limit_used_ratio", ("provider", "organization")),
            Condition("agentflow_budget_used_ratio", ("measure", "organization")),
        ),
    ),
    Alert(
        "CanaryFailed",
        "critical",
        2 * _MINUTE,
        "seconds that a canary is away; or it failed",
        _MINUTE,
        "The canary of queue {queue} failed, or does not come back",
        (
            Condition("agentflow_canary_away_seconds", ("queue",)),
            Condition("agentflow_canary_failed", ("queue",), limit=0),
        ),
    ),
    Alert(
        "CleanupBehind",
        "warning",
        2 * _HOUR,
        "seconds since clean-up last got to its end",
        10 * _MINUTE,
        "Clean-up of {what} is {value} s behind",
        (Condition("agentflow_cleanup_behind_seconds", ("what",)),),
    ),
    Alert(
        "IdleCpuHigh",
        "warning",
        0.25,
        "share of a processor that a process uses which had nothing to do for 10 minutes",
        15 * _MINUTE,
        "{job} {instance} has nothing to do and uses {value} of a processor",
        expr='sum by (job, instance, process) (rate(process_cpu_seconds_total{job=~"agentflow-.+"}[$10m])) > $threshold'
        " unless sum by (job, instance, process) (increase(worker_jobs_total[$10m])) > 0"
        " unless sum by (job, instance, process) (max_over_time(worker_jobs_processing[$10m])) > 0"
        ' unless sum by (job, instance, process) (rate(agentflow_http_requests_total{route!~"/metrics|/health.*"}[$10m])) > 0.2',
    ),
    Alert(
        "CredentialExpiring",
        "warning",
        3 * _DAY,
        "seconds until a key or a token ends that nobody but a person can renew",
        5 * _MINUTE,
        "A credential ({kind}) ends in {value} s",
        (Condition("agentflow_credential_expires_seconds", ("kind",), below=True),),
    ),
)


def with_thresholds(changed: Mapping[str, float]) -> tuple[Alert, ...]:
    """The alerts with other thresholds for some of them, by name. Raises ValueError for a name that is none."""
    if unknown := sorted(changed.keys() - {alert.name for alert in ALERTS}):
        raise ValueError(f"there is no alert {unknown[0]!r}; there are {', '.join(alert.name for alert in ALERTS)}")
    return tuple(replace(alert, threshold=changed.get(alert.name, alert.threshold)) for alert in ALERTS)
