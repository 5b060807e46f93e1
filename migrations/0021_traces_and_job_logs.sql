-- What is seen of a job beside its state: the trace that it belongs to, and the lines that its code logs.

alter table agentflow.jobs add column trace text;     -- as agentflow/traces.py writes it; null: it begins its own, under its id

-- As it was, and what follows from a job belongs to the job's trace.
create or replace function agentflow.follow_up_1(p_ids uuid[]) returns setof uuid
language plpgsql
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
begin
    return query
    insert into agentflow.jobs (id, organization_id, type, queue, priority, payload, max_attempts, time_limit_s,
        then_jobs, callback_url, correlation_id, parent_id, trace, wake_at, sent_at, sends)
    select (t ->> 'id')::uuid, j.organization_id, t ->> 'type', t ->> 'queue', (t ->> 'priority')::smallint, t -> 'payload',
        (t ->> 'max_attempts')::smallint, (t ->> 'time_limit_s')::real, nullif(t -> 'then', 'null'), t ->> 'callback_url',
        j.correlation_id, j.id, coalesce(j.trace, replace(j.id::text, '-', '')), clock_timestamp() + interval '30 s',
        clock_timestamp(), 1
    from agentflow.jobs j cross join lateral jsonb_array_elements(j.then_jobs) t
    where j.id = any (p_ids) and j.state || '' = 'succeeded' and j.then_jobs is not null
    union all
    select agentflow.uuid7_1(), j.organization_id, 'deliver_callback', 'default', 0::smallint,
        jsonb_build_object('job_id', j.id, 'url', j.callback_url), 10::smallint, 60::real, null, null,
        j.correlation_id, j.id, coalesce(j.trace, replace(j.id::text, '-', '')), clock_timestamp() + interval '30 s',
        clock_timestamp(), 1
    from agentflow.jobs j
    where j.id = any (p_ids) and j.finished_at is not null and j.callback_url is not null
    returning id;

    with ended as materialized (                      -- by id alone: an index on batch_id would be read from end to end
        select batch_id, state from agentflow.jobs where id = any (p_ids) and finished_at is not null
    ), counts as (
        select batch_id, count(*) filter (where state = 'succeeded') as s, count(*) filter (where state = 'failed') as f,
            count(*) filter (where state = 'cancelled') as c
        from ended where batch_id is not null group by 1
    ), locked as materialized (
        select b.id from agentflow.batches b join counts on counts.batch_id = b.id order by b.id for update of b
    )
    update agentflow.batches b set succeeded = b.succeeded + s, failed = b.failed + f, cancelled = b.cancelled + c,
        finished_at = case when b.succeeded + b.failed + b.cancelled + s + f + c = b.total then clock_timestamp() end
    from counts, locked where b.id = counts.batch_id and locked.id = b.id;
end $$;

-- One row for each line, capped per job. Written beside the job's own transactions, by the process that runs it.
create table agentflow.job_logs (
    job_id uuid not null references agentflow.jobs on delete cascade,
    organization_id bigint not null,
    fence integer not null,                           -- of which claim
    n integer not null,                               -- its number there; what is missing was over the cap
    attempt smallint not null,
    at timestamptz not null,                          -- by the worker's clock
    level smallint not null check (level in (20, 30, 40, 50)),   -- info, warning, error, critical
    logger text not null,
    message text not null,
    fields jsonb,
    bytes integer not null,
    primary key (job_id, fence, n)
);
alter table agentflow.job_logs enable row level security;
