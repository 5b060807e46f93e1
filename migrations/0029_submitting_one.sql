-- Inserts one job by the same rules as submit_1, without arrays, joins and windows, which cost more than the insert. Returns what
-- the database decides.
create function agentflow.submit_one_1(
    p_organization bigint, p_trace text, p_ring boolean, p_id uuid, p_type text, p_queue text, p_priority smallint, p_payload jsonb,
    p_max_attempts smallint, p_time_limit real, p_run_at timestamptz, p_key text, p_then jsonb, p_callback text, p_correlation text,
    p_idempotency_key text, p_retry uuid, p_head_start smallint,
    out is_sent boolean, out due_at timestamptz, out looked_at timestamptz, out made_at timestamptz, out limit_s real
)
language plpgsql
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
set plan_cache_mode = force_generic_plan
as $$
declare
    p_window integer;
begin
    is_sent := p_ring and (p_run_at is null or p_run_at <= clock_timestamp());
    if is_sent then
        p_window := agentflow.window_1(p_queue);
        is_sent := p_window > (
            select count(*) from (
                select 1 from agentflow.jobs s where s.queue = p_queue and s.organization_id = p_organization
                and s.state = 'queued' and s.sent_at is not null limit p_window
            ) x
        ) and not exists (
            select from agentflow.jobs o where o.queue = p_queue and o.priority = p_priority and o.state = 'queued'
            and o.organization_id = p_organization and o.wake_at <= clock_timestamp()
        );
    end if;
    insert into agentflow.jobs as j (id, organization_id, type, queue, priority, payload, max_attempts, time_limit_s, run_at,
        concurrency_key, then_jobs, callback_url, correlation_id, idempotency_key, retry_of, head_start_s, trace,
        wake_at, sent_at, sends)
    values (p_id, p_organization, p_type, p_queue, p_priority, p_payload, p_max_attempts, p_time_limit,
        coalesce(p_run_at, clock_timestamp()), p_key, p_then, p_callback, p_correlation, p_idempotency_key, p_retry, p_head_start,
        p_trace,
        case when is_sent then clock_timestamp() + interval '30 s' else coalesce(p_run_at, clock_timestamp()) end,
        case when is_sent then clock_timestamp() end, is_sent::integer)
    returning j.run_at, j.wake_at, j.created_at, j.time_limit_s into due_at, looked_at, made_at, limit_s;
end $$;
