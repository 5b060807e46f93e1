-- Documents of the knowledge base, and the pieces of text that are found in them.

create table agentflow.documents (
    id uuid primary key,
    organization_id bigint not null references agentflow.organizations,
    source_id text not null check (source_id <> ''),  -- the caller's name for it: handed in again, it is a new version of the same
    title text not null,
    kind text not null,                               -- pdf, docx, pptx, xlsx, html, markdown, text, csv, video; unknown: not read yet
    language text,                                    -- ISO 639-1 of most of the text
    storage_key text,                                 -- the file, where there is one
    filename text,                                    -- of an upload, as the caller named it
    content_type text,
    source_url text,
    video_id uuid,                                    -- where its source is the analysis of a video
    content_hash bytea check (length(content_hash) = 32),   -- SHA-256 of the file or text; null until it was read
    size_bytes bigint,
    text text,                                        -- the extracted text, to which all offsets refer
    chunker text,                                     -- name and version of what cut it
    version integer not null default 1,               -- raised whenever other content was stored
    facts jsonb not null default '{}',                -- pages, author, words …
    job_id uuid,                                      -- the job that read it last, or may write it now
    chain_id uuid,                                    -- the first job of the chain that was asked for last: that one, or an analysis
    error jsonb,                                      -- of the last attempt to read it, as in a job
    created_at timestamptz not null default clock_timestamp(),
    updated_at timestamptz not null default clock_timestamp(),
    read_at timestamptz,                              -- null: not yet readable
    unique (organization_id, source_id)
);
create index documents_list on agentflow.documents (organization_id, id);

create table agentflow.chunks (
    organization_id bigint not null,
    document_id uuid not null references agentflow.documents on delete cascade,
    position integer not null,                        -- 0, 1, 2 … in reading order
    key bytea not null check (length(key) = 32),      -- SHA-256 of the normalized text and the chunker's version
    text text not null,
    start_offset integer not null,                    -- of characters in the document's text: [start, end)
    end_offset integer not null,
    tokens integer not null,
    language text,
    place jsonb not null,                             -- {"page": 3, "heading": ["…"], "sheet": "…", "row": 7, "slide": 2, "start_s": 1.5, "end_s": 4}
    primary key (document_id, position)
);
create index chunks_by_key on agentflow.chunks (organization_id, key);

alter table agentflow.documents enable row level security;
alter table agentflow.chunks enable row level security;
