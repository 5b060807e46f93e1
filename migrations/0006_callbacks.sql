-- Telling callers what became of their jobs: secrets to sign with, a log of every attempt, replays, and a batch's callback.

-- Apart from everything else that an organization may read: no query of the API returns a secret after it was made.
create table agentflow.callback_secrets (
    id uuid primary key,
    organization_id bigint not null references agentflow.organizations,
    sealed text not null,                             -- as agentflow/secrets.py writes it: encrypted where ENCRYPTION_KEY is set
    created_at timestamptz not null default clock_timestamp(),
    expires_at timestamptz                            -- of one that was replaced: it signs along until then
);
create index callback_secrets_list on agentflow.callback_secrets (organization_id, created_at);

create table agentflow.callback_attempts (
    id uuid primary key,
    organization_id bigint not null,
    callback_id uuid not null references agentflow.jobs on delete cascade,   -- the job of type deliver_callback
    attempt smallint not null,
    at timestamptz not null default clock_timestamp(),
    duration_ms integer not null,
    status smallint,                                  -- null: there was no answer
    error text,                                       -- null: it was delivered
    response text                                     -- how the answer's body began
);
create index callback_attempts_list on agentflow.callback_attempts (callback_id, id);

-- A replay is one more callback of the same job.
drop index agentflow.jobs_callback;
create unique index jobs_callback on agentflow.jobs (parent_id) where type = 'deliver_callback' and retry_of is null;

alter table agentflow.batches add column callback_url text;

-- A trigger and not a part of what settles and cancels: those are versioned, and whichever version counts a batch's last job,
-- the callback is written in its transaction. The relay rings for it. Of the batch `parent_id` is the id: there is one callback.
create function agentflow.batch_ended_1() returns trigger language plpgsql as $$
begin
    insert into agentflow.jobs (id, organization_id, type, queue, priority, payload, max_attempts, time_limit_s, parent_id, wake_at)
    values (agentflow.uuid7_1(), new.organization_id, 'deliver_callback', 'default', 0,
        jsonb_build_object('batch_id', new.id, 'url', new.callback_url), 10, 60, new.id, clock_timestamp());
    return null;
end $$;
create trigger batch_ended after update on agentflow.batches for each row
    when (old.finished_at is null and new.finished_at is not null and new.callback_url is not null)
    execute function agentflow.batch_ended_1();
create trigger batch_ended_at_once after insert on agentflow.batches for each row
    when (new.finished_at is not null and new.callback_url is not null)
    execute function agentflow.batch_ended_1();

alter table agentflow.callback_secrets enable row level security;
alter table agentflow.callback_attempts enable row level security;
