"""The tests' Kommo is one: aioamocrm, which others wrote, gets along with it; and it sends webhooks as Kommo does."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import httpx
import pytest
from aioamocrm import (
    AmoCRMClient,
    AuthError,
    ForbiddenError,
    LongLivedToken,
    NotFoundError,
    OAuth2,
    RateLimitError,
    RetryPolicy,
    ValidationError,
    parse_webhook,
)

from tests.http_server import Reply, serve
from tests.kommo_hooks import Hooks
from tests.kommo_server import ACCOUNT_ID, Account, kommo

ONCE = RetryPolicy(max_attempts=1)


@pytest.fixture
def account() -> Iterator[Account]:
    with kommo() as account:
        yield account


def asked(account: Account, ask: Callable[[AmoCRMClient], Awaitable[Any]], auth: Any = None) -> Any:
    async def whole() -> Any:
        auth_ = auth or LongLivedToken(account.token)
        async with AmoCRMClient(auth=auth_, base_url=account.server.url(""), rate_limit=None, retry=ONCE) as client:
            return await ask(client)

    return asyncio.run(whole())


def test_another_client_reads_all_pages_and_single_things(account: Account) -> None:
    account.page_cap = 3
    leads = [account.add("leads", name=f"L{n}", price=n) for n in range(8)]
    note = account.add("leads/notes", entity_id=leads[0], note_type="common", params={"text": "hi"})

    async def read(client: AmoCRMClient) -> Any:
        listed = [lead.id async for lead in client.leads.iterate(with_=["contacts"])]
        empty = [contact async for contact in client.contacts.iterate()]
        one = await client.leads.get(leads[3])
        notes = [each.id async for each in client.leads.notes.iterate()]
        fields = [each.id async for each in client.leads.custom_fields.iterate()]
        pipelines = [each.id for each in await client.pipelines.list()]
        users = [each.name async for each in client.users.iterate()]
        return listed, empty, (one.name, one.price), notes, fields, pipelines, users, (await client.account.get()).id

    assert asked(account, read) == (leads, [], ("L3", 3), [note], [900], [7], ["Ann"], ACCOUNT_ID)
    with pytest.raises(NotFoundError):
        asked(account, lambda client: client.leads.get(1))


def test_another_client_writes_and_one_wrong_item_refuses_the_batch(account: Account) -> None:
    made = asked(account, lambda client: client.leads.create([{"name": "a"}, {"name": "b"}]))
    asked(account, lambda client: client.leads.update([{"id": made[0].id, "name": "c"}]))

    with pytest.raises(ValidationError) as error:
        wrong = {"name": "e", "custom_fields_values": [{"field_id": 1, "values": [{"value": 1}]}]}
        asked(account, lambda client: client.leads.create([{"name": "d"}, wrong]))

    assert sorted(each["name"] for each in account.shown("leads").values()) == ["b", "c"]
    assert [(issue.request_id, issue.path) for issue in error.value.errors] == [
        ("1", "custom_fields_values.0.field_id")
    ]


def test_another_client_is_limited_and_then_blocked(account: Account) -> None:
    account.rate, account.most_violations = 3, 1

    async def ask(client: AmoCRMClient) -> None:
        for _ in range(20):
            await client.account.get()

    with pytest.raises(RateLimitError):
        asked(account, ask)
    account.rate = 0
    with pytest.raises(ForbiddenError):
        asked(account, ask)


def test_another_client_buys_tokens_and_a_refresh_token_works_once(account: Account) -> None:
    auth = OAuth2(*account.client.values())

    async def connect(client: AmoCRMClient) -> Any:
        first = await client.exchange_code(account.new_code())
        account.tokens.clear()  # the next call is answered 401, and buys another
        return first.refresh_token, (await client.account.get()).id

    refresh, number = asked(account, connect, auth)

    assert number == ACCOUNT_ID and account.grants[refresh].used
    body = {**account.client, "grant_type": "refresh_token", "refresh_token": refresh}
    for how in ({"json": body}, {"data": body}):
        answer = httpx.post(account.server.url("/oauth2/access_token"), **how)  # type: ignore[arg-type]
        assert (answer.status_code, answer.json()["hint"]) == (401, "Token has been revoked")
    account.tokens.clear()
    with pytest.raises(AuthError):
        asked(account, lambda client: client.account.get())


# ---- webhooks ----


def test_webhooks_are_read_by_another_client(account: Account) -> None:
    with serve() as receiver:
        receiver.on("/hook", Reply(200))
        hooks = Hooks(ACCOUNT_ID)
        hooks.subscribe(receiver.url("/hook"), ["status_lead", "add_company"])
        hooks.happened(0, "leads", "status", {"id": 5, "status_id": 142, "old_status_id": 7})
        hooks.happened(0, "contacts", "add", {"id": 6, "type": "company"})
        hooks.happened(0, "leads", "add", {"id": 7})  # nobody asked for it

        assert hooks.deliver(0) == 2

        read = [parse_webhook(request.body) for request in receiver.requests]
    assert [(event.entity, event.action, event.id) for each in read for event in each.events] == [
        ("leads", "status", 5),
        ("contacts", "add", 6),
    ]
    with pytest.raises(ValueError, match="unknown"):
        hooks.subscribe("http://x", ["add_everything"])


@pytest.mark.parametrize(("status", "attempts"), [(404, 3), (301, 3), (500, 5), (499, 5)])
def test_the_ladder_is_as_long_as_the_answer_deserves(status: int, attempts: int) -> None:
    with serve() as receiver:
        receiver.on("/hook", Reply(status))
        hooks = Hooks(ACCOUNT_ID)
        hook = hooks.subscribe(receiver.url("/hook"), ["add_lead"])
        hooks.happened(0, "leads", "add", {"id": 5})

        times = [now for now in range(0, 20_000, 100) if hooks.deliver(now)]

    assert times == [0, 300, 1200, 2100, 5700][:attempts]
    assert hook.deliveries[0].attempts == [status] * attempts


def test_who_fails_too_often_is_switched_off_and_hears_no_more() -> None:
    with serve() as receiver:
        receiver.on("/hook", Reply(500))
        hooks = Hooks(ACCOUNT_ID)
        hook = hooks.subscribe(receiver.url("/hook"), ["add_contact"])
        for n in range(105):
            hooks.happened(0, "contacts", "add", {"id": n})

        assert (hooks.deliver(0), hook.disabled) == (101, True)
        hooks.happened(1, "contacts", "add", {"id": 200})
        assert hooks.deliver(10_000) == 0


def test_who_is_too_slow_counts_as_down() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hooks = Hooks(ACCOUNT_ID, deadline_s=0.1)
        hook = hooks.subscribe(f"http://127.0.0.1:{silent.getsockname()[1]}/hook", ["add_lead"])
        hooks.happened(0, "leads", "add", {"id": 5})

        hooks.deliver(0)

    assert hook.deliveries[0].attempts == [499] and hook.deliveries[0].due == 300
