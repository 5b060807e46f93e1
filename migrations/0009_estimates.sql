-- What estimates are made from, all of it measured: how long jobs of a type took, how many threads are really in use where jobs
-- wait, and what became of earlier estimates.

create table agentflow.durations (
    type text primary key,
    seconds real[] not null,                          -- of the last jobs that succeeded, the newest last
    updated_at timestamptz not null default clock_timestamp()
) with (fillfactor = 50);

create table agentflow.paces (
    queue text primary key,
    in_use real check (in_use >= 0),                  -- of the threads that the queue has, while more jobs waited than there are threads
    looked_at timestamptz not null default clock_timestamp()   -- one worker at a time looks
) with (fillfactor = 50);

-- Seconds from made_at on. What was expected, the range that was given, and what happened.
create table agentflow.forecasts (
    job_id uuid not null,                             -- no foreign key: what was learned outlives the job
    made_at timestamptz not null default clock_timestamp(),
    organization_id bigint not null,
    queue text not null,
    type text not null,
    kind text not null check (kind in ('waiting', 'later', 'running')),
    fence integer not null,                           -- of the job at that time
    start_s double precision,
    start_low_s double precision,
    start_high_s double precision,
    end_s double precision,
    end_low_s double precision,
    end_high_s double precision,
    started_s double precision,
    ended_s double precision,
    closed boolean not null default false,            -- nothing more will be known of it
    primary key (job_id, made_at)
);
create index forecasts_newest on agentflow.forecasts (queue, made_at);
create index forecasts_open on agentflow.forecasts (queue) where not closed;

alter table agentflow.durations enable row level security;
alter table agentflow.paces enable row level security;
alter table agentflow.forecasts enable row level security;
