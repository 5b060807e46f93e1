-- The calendar: what organizations want done at certain times, every tick that was claimed, and files whose rows are gone.

create table agentflow.schedules (
    id uuid primary key,
    organization_id bigint not null references agentflow.organizations,
    name text not null check (name <> ''),
    cron text,                                        -- one of these three says when …
    every_s integer check (every_s > 0),
    once_at timestamptz,
    time_zone text not null default 'UTC',            -- … of a cron line: where
    type text not null,
    payload jsonb not null default '{}',
    jitter_s integer not null default 0 check (jitter_s >= 0),
    enabled boolean not null default true,
    starts_at timestamptz not null default clock_timestamp(),   -- what an interval is counted from
    next_at timestamptz,                              -- the next tick; null while there is none to come
    wake_at timestamptz,                              -- the same with its jitter
    created_at timestamptz not null default clock_timestamp(),
    constraint one_when check (num_nonnulls(cron, every_s, once_at) = 1),
    constraint wakes_for_a_tick check ((next_at is null) = (wake_at is null)),
    constraint enabled_has_a_tick check (enabled or next_at is null),
    unique (organization_id, name)
);
create index schedules_list on agentflow.schedules (organization_id, id);
create index schedules_due on agentflow.schedules (wake_at) where wake_at is not null;

-- One row for each time that something was due. Whoever inserts it does what is to be done: a job in the same transaction, or
-- work inside the scheduler. Of each schedule and subject the newest hundred are kept.
create table agentflow.ticks (
    schedule text not null,                           -- an entry of the calendar, or `user`
    subject text not null default '',                 -- what it is about: a queue, an account; of `user` the schedule's id
    at timestamptz not null,
    organization_id bigint not null default 0,        -- 0: the installation's own
    claimed_at timestamptz not null default clock_timestamp(),
    missed integer not null default 0 check (missed >= 0),   -- earlier ticks that nobody claimed, made up for by this one
    by_hand boolean not null default false,
    job_id uuid,
    outcome text check (outcome in ('submitted', 'refused', 'done', 'behind', 'failed')),   -- null: at work
    ended_at timestamptz,
    facts jsonb,
    primary key (schedule, subject, at)
);
create index ticks_latest on agentflow.ticks (schedule, at);
create index ticks_old on agentflow.ticks (claimed_at);

-- Written by the transaction that deletes the rows they belonged to; a folder ends in a slash.
create table agentflow.doomed_files (
    key text primary key,
    organization_id bigint not null,
    doomed_at timestamptz not null default clock_timestamp(),
    due_at timestamptz not null default clock_timestamp(),
    tries smallint not null default 0
);
create index doomed_files_due on agentflow.doomed_files (due_at);

-- Whether any job still needs an upload.
create index jobs_video on agentflow.jobs (organization_id, (payload->>'video_id')) where payload ? 'video_id';

alter table agentflow.schedules enable row level security;
alter table agentflow.ticks enable row level security;
alter table agentflow.doomed_files enable row level security;
