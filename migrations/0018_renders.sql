-- Renders: what was sent to which ComfyUI server, how the servers are, and lines for a GPU whose length nobody but the servers knows.

-- Of all organizations: machines are the operator's. `well`: it may be given renders; said by whoever looked last.
create table agentflow.comfyui_servers (
    name text primary key,                            -- its address, without credentials
    pool text not null,
    slots smallint not null check (slots between 1 and 16),
    listed_at timestamptz not null default clock_timestamp(),   -- a worker has it in its settings
    looked_at timestamptz,
    seen_at timestamptz,                              -- its last answer
    well boolean not null default false,
    sick_until timestamptz,
    failures integer not null default 0,              -- in a row: each doubles the time until it is believed again
    problem text,
    version text,
    devices jsonb,                                    -- as /system_stats has them, in bytes
    queue integer,                                    -- prompts, anybody's
    nodes jsonb,                                      -- its /object_info
    nodes_at timestamptz
) with (fillfactor = 50);

-- A prompt: written before the server hears of it, since the server tells nobody apart who asks twice.
create table agentflow.renders (
    prompt_id uuid primary key,
    organization_id bigint not null,
    job_id uuid not null references agentflow.jobs on delete cascade,
    fence integer not null,                           -- of the attempt that made it
    server text not null,
    slot smallint not null,
    state text not null default 'taken' check (state in (
        'taken',                                      -- has a slot; nothing was sent
        'sending',                                    -- was sent, perhaps
        'sent',                                       -- the server has it
        'done',                                       -- ran to its end; its files are still to be fetched
        'collected',                                  -- and were: the job's result stands in `found`
        'failed', 'interrupted', 'timed_out', 'cancelled', 'gone',
        'lost',                                       -- had been sent, and the server knows nothing of it any more
        'unsent',                                     -- never arrived
        'given_up'                                    -- nobody can be asked; looked for when the server is back
    )),
    found jsonb,                                      -- what history said of one that is done, and then the job's result
    problem text,
    taken_at timestamptz not null default clock_timestamp(),
    sent_at timestamptz,
    ended_at timestamptz
) with (fillfactor = 70);
create unique index renders_live on agentflow.renders (job_id) where state in ('taken', 'sending', 'sent', 'done', 'collected');
create unique index renders_slot on agentflow.renders (server, slot) where state in ('taken', 'sending', 'sent');
create index renders_given_up on agentflow.renders (server) where state = 'given_up';
create index renders_jobs on agentflow.renders (job_id);

-- How long graphs of one shape take on a server, and their nodes: the share of the work that is done follows from that.
create table agentflow.render_times (
    shape text not null,
    server text not null,
    seconds real not null check (seconds >= 0),
    nodes jsonb not null,                             -- node -> seconds
    updated_at timestamptz not null default clock_timestamp(),
    primary key (shape, server)
) with (fillfactor = 50);

alter table agentflow.comfyui_servers enable row level security;
alter table agentflow.renders enable row level security;
alter table agentflow.render_times enable row level security;

-- A key may have no slots for now, and say how soon those who wait for one look again, should nobody wake them.
alter table agentflow.concurrency_keys drop constraint concurrency_keys_slots_check;
alter table agentflow.concurrency_keys add constraint concurrency_keys_slots_check check (slots between 0 and 1000);
alter table agentflow.concurrency_keys add column look_again_s real check (look_again_s > 0);

-- claim_keyed_1, and those who have to wait for a key with a time of its own look again after that.
create function agentflow.claim_keyed_2(p_ids uuid[], p_worker uuid, p_lease interval) returns setof agentflow.jobs
language plpgsql
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
begin
    return query select * from agentflow.claim_keyed_1(p_ids, p_worker, p_lease);
    update agentflow.jobs j                           -- of rows that were locked and parked a moment ago, here
    set wake_at = clock_timestamp() + make_interval(secs => k.look_again_s * (0.8 + random() / 5))
    from agentflow.concurrency_keys k
    where j.id = any (p_ids) and j.state || '' = 'queued' and j.wait_reason = 'busy' and k.key = j.concurrency_key
        and k.look_again_s is not null;
end $$;

-- A running job needs its key no more, and goes on without it: the next in line is rung. Null when the lease was lost.
create function agentflow.leave_key_1(p_id uuid, p_fence integer, p_worker uuid) returns uuid[]
language plpgsql
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
declare
    key text;
begin
    select j.concurrency_key into key from agentflow.jobs j where j.id = p_id;
    if key is null then
        return '{}';
    end if;
    perform agentflow.lock_keys_1(array[key]);
    update agentflow.jobs j set concurrency_key = null, slot = null
    where j.id = p_id and j.fence = p_fence and j.worker = p_worker and j.state || '' = 'running';
    if not found then
        return null;
    end if;
    return coalesce(agentflow.wake_line_1(array[key]), '{}');
end $$;

-- A running job that has no key is to wait in this line once it is parked; the caller parks it at once. Until then it counts as
-- one that holds a slot, under a number that no claim gives out. False when the lease was lost.
create function agentflow.enter_key_1(p_id uuid, p_fence integer, p_worker uuid, p_key text) returns boolean
language plpgsql
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
begin
    perform agentflow.lock_keys_1(array[p_key]);
    update agentflow.jobs j set concurrency_key = p_key, slot = (
        select least(0, min(r.slot)) - 1 from agentflow.jobs r where r.concurrency_key = p_key and r.state = 'running'
    )
    where j.id = p_id and j.fence = p_fence and j.worker = p_worker and j.state || '' = 'running' and j.concurrency_key is null;
    return found;
end $$;

-- The slots of a pool's line are those of its servers that are well. Returns whom to ring.
create function agentflow.count_gpus_1(p_pool text, p_look_again_s real) returns uuid[]
language plpgsql
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
declare
    line text := 'gpu:' || p_pool;
    number smallint;
begin
    perform agentflow.lock_keys_1(array[line]);       -- the next statement sees what the last one who counted has seen
    select coalesce(sum(s.slots), 0) into number from agentflow.comfyui_servers s
    where s.pool = p_pool and s.well and s.listed_at > clock_timestamp() - interval '5 min';
    insert into agentflow.concurrency_keys as k (key, slots, look_again_s) values (line, number, p_look_again_s)
    on conflict (key) do update set slots = excluded.slots, look_again_s = excluded.look_again_s
    where (k.slots, k.look_again_s) is distinct from (excluded.slots, excluded.look_again_s);
    return coalesce(agentflow.wake_line_1(array[line]), '{}');
end $$;
