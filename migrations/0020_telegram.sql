-- The Telegram bot: whose it is, what people asked it for, and the one message that tells each of them what became of it.

create table agentflow.telegram_bots (
    bot_id bigint primary key,                        -- Telegram's number of it, with which its token begins
    organization_id bigint not null references agentflow.organizations,
    endpoint_id uuid not null unique references agentflow.webhook_endpoints,   -- of its updates, also of those that are polled
    username text not null,
    created_at timestamptz not null default clock_timestamp()
);

create table agentflow.telegram_requests (
    id uuid primary key,
    organization_id bigint not null,
    bot_id bigint not null references agentflow.telegram_bots,
    chat_id bigint not null,                          -- negative for groups; beyond 32 bits
    user_id bigint not null,
    language text not null check (language in ('en', 'ru')),
    origin text not null,                             -- message:55, album:1300…, press:4382…: what makes one request, not two
    message_id bigint not null,                       -- the message that it answers
    state text not null
        check (state in ('collecting', 'asking', 'rendering', 'delivered', 'failed', 'cancelled', 'dropped', 'unreachable')),
    prompt text,
    render_job_id uuid,
    answer_id bigint,                                 -- the bot's message about it, once Telegram has named its number
    answer_sends integer not null default 0,          -- how often one was sent, or may have been
    answer_sender uuid,                               -- the job that is sending one now …
    answer_sending_at timestamptz,                    -- … since then; who died in between is not waited for
    answers_lost integer not null default 0,          -- how many of those that were recorded are gone
    created_at timestamptz not null default clock_timestamp(),
    ended_at timestamptz,
    constraint ended check ((state in ('collecting', 'asking', 'rendering')) = (ended_at is null)),
    constraint sending check ((answer_sender is null) = (answer_sending_at is null))
);
create unique index telegram_requests_once on agentflow.telegram_requests (bot_id, chat_id, origin);
create index telegram_requests_open on agentflow.telegram_requests (bot_id, user_id, created_at) where ended_at is null;
create index telegram_requests_age on agentflow.telegram_requests (created_at);

-- What is to be rendered; of an album one row for each of its messages, in whatever order they come.
create table agentflow.telegram_pictures (
    request_id uuid not null references agentflow.telegram_requests on delete cascade,
    organization_id bigint not null,
    message_id bigint not null,
    file_id text not null,                            -- as Telegram gives it to this bot
    storage_key text,                                 -- once it was fetched
    primary key (request_id, message_id)
);
create index telegram_pictures_files on agentflow.telegram_pictures (organization_id, storage_key);

alter table agentflow.telegram_bots enable row level security;
alter table agentflow.telegram_requests enable row level security;
alter table agentflow.telegram_pictures enable row level security;
