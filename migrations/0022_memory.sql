-- Memory: what jobs take, as it was measured, and workers that the kernel killed for want of it.

-- How often jobs of a type with an input of 2^size_class bytes (-1: none, or nobody knows how many) had a peak of up to
-- 2^(peak_class/4) MB. Weights are halved with time, counted from noted_at.
create table agentflow.memory_peaks (
    type text not null,
    size_class smallint not null,
    peak_class smallint not null,
    weight double precision not null check (weight > 0),
    noted_at timestamptz not null default clock_timestamp(),
    primary key (type, size_class, peak_class)
) with (fillfactor = 50);

alter table agentflow.memory_peaks enable row level security;

alter table agentflow.workers add column out_of_memory boolean not null default false;   -- killed by the kernel, as its counter says

-- The rescue (rescue_1), which says of a job's worker that the kernel killed it for want of memory, where that is known.
create function agentflow.rescue_2(p_worker uuid, p_limit integer, p_lease interval, p_max_crashes integer)
returns table (kind text, job_id uuid, job_fence integer, job_state text, job_queue text, job_type text, job_priority smallint)
language plpgsql as $$
declare
    ids uuid[];
    fences integer[];
    delays double precision[];
    errors jsonb[];
begin
    if not pg_try_advisory_xact_lock(hashtextextended('agentflow.rescue', 7)) or not exists (
        select from agentflow.workers where id = p_worker and stopped_at is null
            and seen_at > clock_timestamp() - p_lease / 2 and well_since <= clock_timestamp() - p_lease / 2
    ) then
        return;
    end if;
    select array_agg(x.id), array_agg(x.fence), array_agg(x.delay), array_agg(x.error) into ids, fences, delays, errors from (
        select j.id, j.fence, least(300, 2 * power(2, j.crashes)) * (0.5 + random() / 2) as delay,
            case when w.out_of_memory
                then '{"code": "worker_out_of_memory", "message": "The worker that ran this job was killed by the kernel: out of memory."}'::jsonb
                else '{"code": "worker_lost", "message": "The worker that ran this job died or fell silent."}'::jsonb
            end as error
        from agentflow.jobs j left join agentflow.workers w on w.id = j.worker
        where j.state = 'running' and (j.lease_until < clock_timestamp() or j.lease_until > clock_timestamp() + 2 * p_lease)
        order by j.id limit p_limit
    ) x;
    if ids is null then
        return;
    end if;
    return query select * from agentflow.settle_1(ids, fences,
        array_fill('crashed'::text, array[cardinality(ids)]), delays, array_fill('worker lost'::text, array[cardinality(ids)]),
        array_fill(null::jsonb, array[cardinality(ids)]), errors, null, p_lease, p_max_crashes);
end $$;
