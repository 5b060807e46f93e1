-- Workflows of organizations: each version of a graph with its parameters. A version is never changed.
create table agentflow.workflows (
    organization_id bigint not null references agentflow.organizations,
    name text collate "C" not null check (name <> ''),
    version integer not null check (version > 0),
    definition jsonb,                                 -- null: deleted; the row stays, so that no number is given twice
    digest bytea not null check (length(digest) = 32),          -- SHA-256 of the content
    created_at timestamptz not null default clock_timestamp(),
    primary key (organization_id, name, version)
);

alter table agentflow.workflows enable row level security;
