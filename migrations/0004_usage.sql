-- What an attempt has used up, as measured or as the other side reported it: {"usd": 0.0012, "tokens_in": 840, …}. Written while
-- the attempt runs, as it is spent, because money is gone also where the attempt fails, is parked or is killed. A row holds
-- the attempt's totals, so writing it twice changes nothing.

create table agentflow.usage (
    job_id uuid not null references agentflow.jobs on delete cascade,
    fence integer not null,                           -- which claim of the job
    organization_id bigint not null,
    measures jsonb not null check (jsonb_typeof(measures) = 'object'),
    updated_at timestamptz not null default clock_timestamp(),
    primary key (job_id, fence)
);

-- Answers of models that were paid for, by what was asked: the hash of the question, the model and the prompt's version. A job
-- that is parked, tried again or handed in again takes them from here.
create table agentflow.model_answers (
    organization_id bigint not null,
    key bytea not null check (length(key) = 32),
    answer jsonb not null,
    created_at timestamptz not null default clock_timestamp(),
    primary key (organization_id, key)
);
create index model_answers_age on agentflow.model_answers (created_at);

alter table agentflow.usage enable row level security;
alter table agentflow.model_answers enable row level security;

-- Totals of attempts, one row each; those of jobs that are gone are passed over. Totals only rise: of two writes that overtake
-- each other the larger one stays.
create function agentflow.record_usage_1(p_jobs uuid[], p_fences integer[], p_measures jsonb[]) returns void
language sql
as $$
    insert into agentflow.usage as u (job_id, fence, organization_id, measures)
    select j.id, n.fence, j.organization_id, n.measures
    from unnest(p_jobs, p_fences, p_measures) n(id, fence, measures)
    join agentflow.jobs j on j.id = n.id
    order by j.id, n.fence
    on conflict (job_id, fence) do update set updated_at = clock_timestamp(), measures = (
        select jsonb_object_agg(name, greatest((u.measures ->> name)::numeric, (excluded.measures ->> name)::numeric))
        from jsonb_object_keys(u.measures || excluded.measures) name
    )
$$;

create or replace view agentflow.job_attempts with (security_invoker = true) as
select a.job_id, a.fence, a.attempt, a.worker, a.started_at, a.ended_at, a.outcome, a.error, u.measures as usage
from agentflow.attempts a left join agentflow.usage u on u.job_id = a.job_id and u.fence = a.fence
union all
select j.id, j.fence, j.attempt, j.finished_by, j.started_at, j.finished_at, 'succeeded', null, u.measures
from agentflow.jobs j left join agentflow.usage u on u.job_id = j.id and u.fence = j.fence where j.state = 'succeeded';
