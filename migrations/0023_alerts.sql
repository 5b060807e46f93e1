-- Alerts that the scheduler raises by itself: which are up, since when, and what was told of them.

create table agentflow.alerts (
    name text not null,                               -- as ops/monitoring/alerts.yml has it
    subject jsonb not null,                           -- what it is about: {"queue": "default"}; {} where there is nothing to tell apart
    value double precision not null,
    since timestamptz not null default clock_timestamp(),
    fired_at timestamptz,                             -- it has been so for as long as the alert asks
    ended_at timestamptz,                             -- it is so no more; the row goes when everybody knows
    told text[] not null default '{}',                -- who knows that it fires
    primary key (name, subject)
);
alter table agentflow.alerts enable row level security;

-- How many jobs failed lately, and which key ends next: asked every few seconds, and answered from a page or two.
create index jobs_failed on agentflow.jobs (finished_at) where state = 'failed';
create index api_keys_ending on agentflow.api_keys (expires_at)
    where expires_at is not null and revoked_at is null and successor_id is null;

-- Which of several schedulers raises them; another takes over when it is not heard of. One row.
create table agentflow.alert_watch (
    one boolean primary key default true check (one),
    holder uuid not null,
    until timestamptz not null
);
alter table agentflow.alert_watch enable row level security;
