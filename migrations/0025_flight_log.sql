-- What is remembered of jobs and webhooks after retention has deleted them: enough to tell what led to what. Written by the
-- statements that delete them, so that who hands jobs in or works on them pays nothing for it.

create table agentflow.flight_log (
    id uuid primary key,                              -- of the job or the webhook
    organization_id bigint not null,
    flight uuid not null,                             -- the trace that it belonged to: all that one cause set off
    kind text not null check (kind in ('job', 'event')),
    type text,
    state text not null,                              -- of a webhook its outcome, else its verdict
    code text,                                        -- of the error of a job
    attempts smallint not null,
    created_at timestamptz not null,
    started_at timestamptz,
    ended_at timestamptz,
    parent_id uuid,
    retry_of uuid,
    event_id uuid,                                    -- the webhook that a job handled, the document and video that it worked on,
    document_id uuid,                                 -- the schedule that handed it in
    video_id uuid,
    schedule_id uuid,
    endpoint_id uuid                                  -- where a webhook came to
);
create index flight_log_flight on agentflow.flight_log (flight, id);
create index flight_log_retries on agentflow.flight_log (retry_of) where retry_of is not null;
create index flight_log_video on agentflow.flight_log (organization_id, video_id) where video_id is not null;
alter table agentflow.flight_log enable row level security;

-- Jobs of a trace that another began. A job that begins its own stands in no such index: it is found by its id.
create index jobs_flight on agentflow.jobs (left(trace, 32), id) where trace is not null;

create index documents_file on agentflow.documents (storage_key) where storage_key is not null;

-- What callers call an id may be anything. A payload that names what it works on is short: a long one is not unpacked for this.
create function agentflow.as_uuid_1(p text) returns uuid language sql immutable parallel safe as $$
    select case when p ~ '^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$' then p::uuid end
$$;
create function agentflow.named_id_1(p jsonb, name text) returns uuid language sql immutable parallel safe as $$
    select case when pg_column_size(p) < 4000 then agentflow.as_uuid_1(p ->> name) end
$$;
