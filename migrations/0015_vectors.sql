-- Vectors of chunks, by the model that made them; and the words of chunks, for the search by words.

create table agentflow.embedding_models (
    id smallint generated always as identity primary key,
    provider text not null check (provider in ('local', 'openrouter', 'server')),
    name text not null check (name <> ''),
    dimensions integer not null check (dimensions between 1 and 4000),      -- an index takes 4000 numbers of 16 bits
    passage_prefix text not null default '',          -- the task: what stands before a text that is to be found …
    query_prefix text not null default '',            -- … and before one that is looked for
    state text not null check (state in ('active', 'backfilling', 'old')),
    created_at timestamptz not null default clock_timestamp(),
    unique (provider, name, dimensions, passage_prefix, query_prefix)
);
create unique index embedding_models_active on agentflow.embedding_models (state) where state = 'active';
create unique index embedding_models_backfilling on agentflow.embedding_models (state) where state = 'backfilling';
alter table agentflow.embedding_models enable row level security;

-- 'russian' stems words of Latin letters as English ones, so one configuration serves both languages in one text. A hyphen before
-- a digit would make a negative number of it: AF-4017 is to be found as AF 4017, too.
alter table agentflow.chunks add column lexemes tsvector not null generated always as (
    to_tsvector('pg_catalog.russian', regexp_replace(text, '-(?=\d)', ' ', 'g'))
) stored;
create index chunks_by_lexeme on agentflow.chunks using gin (lexemes);

-- Makes what needs pgvector, once that is there: null, or why not. Without it everything else of AgentFlow works.
create function agentflow.prepare_vectors_1() returns text
language plpgsql
as $$
declare
    extension_schema text;
    version text;
begin
    if to_regclass('agentflow.vectors') is not null then
        return null;
    end if;
    perform pg_advisory_xact_lock(hashtextextended('agentflow.vectors', 7));
    if not exists (select from pg_extension where extname = 'vector') then
        begin
            create schema if not exists agentflow_extensions;
            create extension vector with schema agentflow_extensions;
        exception when others then                    -- not installed at the server, or this role may not create it
            return sqlerrm;
        end;
    end if;
    select n.nspname, e.extversion into extension_schema, version
    from pg_extension e join pg_namespace n on n.oid = e.extnamespace where e.extname = 'vector';
    if string_to_array(regexp_replace(version, '[^0-9.].*', ''), '.')::integer[] < '{0,8}'::integer[] then
        return format('pgvector %s is too old', version);
    end if;
    -- Plain: 4000 numbers of 16 bits fit into a page, and an exact search need not fetch each vector from elsewhere.
    execute format(
        'create table if not exists agentflow.vectors (
            organization_id bigint not null,
            model_id smallint not null,                -- no foreign key: its row goes last, and would be looked for in all of them
            chunk_key bytea not null,
            vector %I.halfvec storage plain,          -- of length 1; null: the model refuses the text
            error jsonb,                              -- and why
            created_at timestamptz not null default clock_timestamp(),
            primary key (organization_id, model_id, chunk_key),
            check ((vector is null) <> (error is null))
        )', extension_schema);
    alter table agentflow.vectors enable row level security;
    return null;
end $$;
select agentflow.prepare_vectors_1();
