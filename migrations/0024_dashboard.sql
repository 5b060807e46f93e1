-- What the dashboard shows: who is signed in, how it went by the minute, and dead letters by what they died of.

create table agentflow.dashboard_sessions (
    hash bytea primary key check (octet_length(hash) = 32),      -- of what the browser keeps
    organization_id bigint references agentflow.organizations,   -- null: the operator
    key_id uuid references agentflow.api_keys on delete cascade,
    operator_proof bytea,                                        -- of the operator's key: with another one the session ends
    created_at timestamptz not null default clock_timestamp(),
    expires_at timestamptz not null,
    constraint either_a_key_or_the_operator check ((key_id is null) = (operator_proof is not null)
        and (key_id is null) = (organization_id is null))
);
create index dashboard_sessions_expiry on agentflow.dashboard_sessions (expires_at);

-- Jobs by minute, ten minutes and hour. `pickups` counts by the bounds of agentflow.jobs.history, shortest first; these and the
-- sums are of the jobs that ended.
create table agentflow.job_history (
    seconds smallint not null check (seconds in (60, 600, 3600)),
    at timestamptz not null,
    organization_id bigint not null,
    type text not null,
    queue text not null,
    submitted integer not null default 0,
    succeeded integer not null default 0,
    failed integer not null default 0,
    cancelled integer not null default 0,
    pickups integer[] not null,
    pickup_s double precision not null default 0,
    run_s double precision not null default 0,
    primary key (organization_id, seconds, at, type, queue)
) with (fillfactor = 80);
create index job_history_all on agentflow.job_history (seconds, at);

-- The most that was seen in that time.
create table agentflow.depth_history (
    seconds smallint not null check (seconds in (60, 600, 3600)),
    at timestamptz not null,
    organization_id bigint not null,
    queue text not null,
    due integer not null,
    parked integer not null,
    running integer not null,
    oldest_due_s double precision not null,
    primary key (organization_id, seconds, at, queue)
) with (fillfactor = 80);
create index depth_history_all on agentflow.depth_history (seconds, at);

-- Ends by time. Written once for each job, with the state, which no update of a running job touches.
create index jobs_ended on agentflow.jobs (finished_at) where finished_at is not null;

-- A dead letter that somebody has dealt with is one no longer; its row stays until retention takes it.
alter table agentflow.jobs add column dealt_with text check (dealt_with in ('retried', 'discarded'));

-- What failures have in common: type, code, and the message without what differs from one to the next.
create function agentflow.fingerprint_1(p_type text, p_error jsonb) returns text
language sql immutable parallel safe
as $$
    select left(md5(p_type || chr(10) || coalesce(p_error ->> 'code', '') || chr(10) || regexp_replace(regexp_replace(
        left(coalesce(p_error ->> 'message', ''), 500),
        '[0-9a-fA-F]{8}-[0-9a-fA-F-]{27}|https?://[^[:space:]]+|''[^'']*''|"[^"]*"', '~', 'g'), '[0-9][0-9a-fA-F]*', '#', 'g')), 16)
$$;
create index jobs_dead on agentflow.jobs (organization_id, agentflow.fingerprint_1(type, error), finished_at, id)
    where state = 'failed' and dealt_with is null;

create index jobs_retries on agentflow.jobs (retry_of) where retry_of is not null;

-- Errors by their words. A message may be long, and a tsvector has a limit beyond which writing the row would fail.
create index jobs_error_words on agentflow.jobs using gin (to_tsvector('simple',
    coalesce(error ->> 'code', '') || ' ' || left(coalesce(error ->> 'message', ''), 4000))) where error is not null;

alter table agentflow.dashboard_sessions enable row level security;
alter table agentflow.job_history enable row level security;
alter table agentflow.depth_history enable row level security;
