-- How many more messages of each organization may be outstanding in a queue: its cap of threads (its share of those that are not
-- kept for critical jobs, one in four of a process), and as many jobs as they do in about 50 ms, less what runs and what was sent already. Those of 50 ms are on top of the cap: they lie before the threads that end
-- short jobs, which otherwise wait until a verdict is written and another is rung for. Jobs so long that the cap's threads do none in
-- 50 ms get no more than the cap. A job costs what is measured until its verdict is written, or what those that run have taken so
-- far: long ones after short ones are seen at once. Replaced in place, since what it promises is the same: workers of the release
-- before are served by it, too.
create or replace function agentflow.room_1(p_queue text, p_organizations bigint[], p_window integer)
returns table (organization_id bigint, room integer)
language sql stable
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
    with staff as (
        select greatest(1, floor(s.share * coalesce(sum(w.threads - w.threads / 4), 0))) as threads, s.share
        from (select agentflow.share_1() as share) s left join agentflow.workers w
            on w.seen_at > clock_timestamp() - interval '60 s' and w.stopped_at is null and p_queue = any (w.queues)
        group by s.share
    ), busy as materialized (
        select j.organization_id, count(*) filter (where j.queue = p_queue) as here, count(*) as anywhere,
            avg(extract(epoch from clock_timestamp() - j.started_at)::float8) filter (where j.queue = p_queue) as taken_s
        from agentflow.jobs j where j.state = 'running' group by 1
    )
    select o.id, greatest(0, least(
        case when staff.share < 1 then
            staff.threads + floor(staff.threads * 0.05 / greatest(coalesce(l.cost_s, 0.02), b.taken_s)) - coalesce(b.here, 0)
        else p_window end,
        coalesce(c.running - coalesce(b.anywhere, 0), p_window),
        p_window) - sent.n)::integer
    from unnest(p_organizations) o(id) cross join staff
    left join busy b on b.organization_id = o.id
    left join agentflow.lanes l on l.queue = p_queue and l.organization_id = o.id
    left join lateral (
        select c.running from agentflow.caps c where c.organization_id in (o.id, 0) and c.type = ''
        order by c.organization_id desc limit 1
    ) c on true
    cross join lateral (
        select count(*) as n from (
            select from agentflow.jobs j where j.queue = p_queue and j.organization_id = o.id and j.state = 'queued'
            and j.sent_at is not null and j.wake_at > clock_timestamp() limit p_window
        ) x
    ) sent
$$;
