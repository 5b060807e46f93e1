"""Signature schemes by the vectors of the vendors' documentation, and what must not pass."""

from __future__ import annotations

from typing import Any

import pytest

from agentflow.webhooks.config import Config, HmacScheme
from agentflow.webhooks.sources import SOURCES
from agentflow.webhooks.sources.delivery import Forged
from tests.webhook_support import SIGNERS, delivery, identity, verify
from web.endpoints import EndpointRequest

#: With a letter beyond ASCII, a blank and `1.0`: serialised anew it would be another body.
BODY_B = '{"name":"Zoë","n":1.0, "ok":true}'.encode()
SLACK_BODY = (
    b"token=xyzz0WbapA4vBCDEFasx0q6G&team_id=T1DC2JH3J&team_domain=testteamnow&channel_id=G8PSS9T3V&channel_name=foobar"
    b"&user_id=U2CERLKJA&user_name=roadrunner&command=%2Fwebhook-collect&text=&response_url=https%3A%2F%2Fhooks.slack.com"
    b"%2Fcommands%2FT1DC2JH3J%2F397700885554%2F96rGlfmibIGlgcZRskXaIFfN&trigger_id=398738663015.47445629121.803a0bc887a14d1"
    b"0d2c447fce8b6703c"
)
CHATS_BODY = b'{"account_id":"52fd2a28-d2eb-4bd8-b862-a67934927b38","time":1735689600,"message":{"text":"hi"}}'
NEW, OLD = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD", "whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYX"
BOTH = "v1,gJ0hz3d5OEHyeRUhflSj4FzBH/y1kISwOJOnGXd6M40= v1,FtOA5xapocblipebmQndbR7hor8EWxttze9JMBovCaw="


def _standard(message_id: str, timestamp: int, signature: str, prefix: str = "webhook") -> dict[str, str]:
    return {f"{prefix}-id": message_id, f"{prefix}-timestamp": str(timestamp), f"{prefix}-signature": signature}


VECTORS: list[tuple[str, str, dict[str, str], bytes, int]] = [
    (
        *("standard", "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"),
        _standard("msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="),
        *(b'{"test": 2432232314}', 1614265330),
    ),
    ("standard", NEW, _standard("msg_2KWPBgLlAfxdpx2AI54pPJ85f4W", 1674087231, BOTH), BODY_B, 1674087231),
    ("standard", OLD, _standard("msg_2KWPBgLlAfxdpx2AI54pPJ85f4W", 1674087231, BOTH), BODY_B, 1674087231),
    ("standard", NEW, _standard("msg_2KWPBgLlAfxdpx2AI54pPJ85f4W", 1674087231, BOTH, "svix"), BODY_B, 1674087231),
    (
        *("github", "It's a Secret to Everybody"),
        {"X-Hub-Signature-256": "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17"},
        *(b"Hello, World!", 0),
    ),
    (
        *("github", "gh-secret-1"),
        {"X-Hub-Signature-256": "sha256=c0df5d6145619fbcb7a1a360c94a0e43b99238c17f7456637226c4424d4fb2cb"},
        *(BODY_B, 0),
    ),
    (
        *("stripe", "whsec_test_secret"),
        {"Stripe-Signature": "t=1614265330,v1=42b3d2b2181207b6b299df380bf37599bb895dc182467ba12e046b1916c4cd19"},
        *(b'{"id":"evt_1","object":"event"}', 1614265330),
    ),
    (
        *("stripe", "whsec_test_1"),
        {
            "Stripe-Signature": "t=1674087231,v0=00,v1=00,"
            "v1=8a942ab9150844b66a5af9a32696786cee9263ee81a50c62cadd2bd80b2662d4"
        },
        *(BODY_B, 1674087231),
    ),
    (
        *("slack", "8f742231b10e8888abcd99yyyzzz85a5"),
        {
            "X-Slack-Request-Timestamp": "1531420618",
            "X-Slack-Signature": "v0=a2114d57b48eac39b9ad189dd8316235a7b4a8d21a10bd27519666489c69b503",
        },
        *(SLACK_BODY, 1531420618),
    ),
    (
        *("slack", "slack-secret-1"),
        {
            "X-Slack-Request-Timestamp": "1674087231",
            "X-Slack-Signature": "v0=b0203843949d1ba4d8e7a2e23daaf7f0db5658749ba817608c25b4b0c174bc93",
        },
        *(BODY_B, 1674087231),
    ),
    ("telegram", "tg_Secret-123", {"X-Telegram-Bot-Api-Secret-Token": "tg_Secret-123"}, b"{}", 0),
    (
        *("kommo_chats", "5a44c5dff55f3c15a4cce8d7c4cc27e207c7e189"),
        *({"X-Signature": "b1715650b15ba0093d41a00d61790ee5d08d93f6"}, CHATS_BODY, 0),
    ),
    (
        *("generic", "gh-secret-1"),
        *({"X-Signature": "c0df5d6145619fbcb7a1a360c94a0e43b99238c17f7456637226c4424d4fb2cb"}, BODY_B, 0),
    ),
]
IDS = [f"{vector[0]}-{number}" for number, vector in enumerate(VECTORS)]
TIMED = {"standard", "stripe", "slack"}


@pytest.mark.parametrize(("source", "secret", "headers", "body", "at"), VECTORS, ids=IDS)
def test_a_vector_verifies_and_nothing_near_it_does(
    source: str, secret: str, headers: dict[str, str], body: bytes, at: int
) -> None:
    verify(source, [secret], delivery(headers, body, at))
    verify(source, ["whsec_" + "A" * 32, secret], delivery(headers, body, at))  # the newer one is another's

    def refused(headers: dict[str, str] = headers, body: bytes = body, now: float = at, secret: str = secret) -> None:
        with pytest.raises(Forged) as error:
            verify(source, [secret], delivery(headers, body, now))
        assert secret not in str(error.value)

    signature = next(name for name in headers if "ignature" in name.lower() or "Token" in name)
    refused(secret="whsec_" + "B" * 32)
    refused(headers={name: value for name, value in headers.items() if name != signature})
    refused(headers={**headers, signature: ""})
    if " " not in headers[signature]:
        refused(headers={**headers, signature: f"{headers[signature]},{headers[signature]}"})  # came twice
    refused(headers={**headers, signature: "ÿ" + headers[signature].replace(" ", "ÿ")})
    if source != "telegram":
        refused(body=body + b" ")
        refused(body=bytes([body[0] ^ 1]) + body[1:])
        refused(body=b"\xff\xfe" + body)
    if source in TIMED:
        verify(source, [secret], delivery(headers, body, at + 300))
        verify(source, [secret], delivery(headers, body, at - 300))
        refused(now=at + 301)
        refused(now=at - 301)
    if source in ("github", "slack", "kommo_chats"):
        refused(headers={**headers, signature: headers[signature].upper()})


def test_timestamps_that_are_none_are_refused() -> None:
    for text in ("", "now", "1e3", "-5", "٣", "9" * 13, "16142653.30"):
        with pytest.raises(Forged):
            verify("slack", ["s"], delivery({"X-Slack-Request-Timestamp": text, "X-Slack-Signature": "v0=00"}, b""))
        with pytest.raises(Forged):
            verify("stripe", ["s"], delivery({"Stripe-Signature": f"t={text},v1=00"}, b""))
    with pytest.raises(Forged, match="one t="):
        verify("stripe", ["s"], delivery({"Stripe-Signature": "t=1,t=1,v1=00"}, b"", 1))


@pytest.mark.parametrize("signature", ["v2,AAAA", "v1a,AAAA", "v1", "v1,", "v1,***", ",", " ", "v1,ÿÿ"])
def test_other_versions_and_what_is_no_signature_are_refused(signature: str) -> None:
    with pytest.raises(Forged):
        verify("standard", [NEW], delivery(_standard("m", 5, signature), b"{}", 5))


@pytest.mark.parametrize(
    ("scheme", "headers"),
    [
        (HmacScheme(header="X-Sig", prefix="sha256="), {"X-Sig": f"sha256={'{hex}'}"}),
        (HmacScheme(header="X-Sig", encoding="base64"), {"X-Sig": "{base64}"}),
        (HmacScheme(header="X-Sig", algorithm="sha512", encoding="hex"), {"X-Sig": "{sha512}"}),
        (HmacScheme(header="X-Sig", timestamp_header="X-Time", separator=":"), {"X-Sig": "{timed}", "X-Time": "100"}),
    ],
)
def test_a_generic_senders_scheme_is_up_to_the_endpoint(scheme: HmacScheme, headers: dict[str, str]) -> None:
    import base64
    import hmac

    body, key = b"\x00\xff raw", b"generic-secret"
    values = {
        "hex": hmac.new(key, body, "sha256").hexdigest(),
        "base64": base64.b64encode(hmac.new(key, body, "sha256").digest()).decode(),
        "sha512": hmac.new(key, body, "sha512").hexdigest(),
        "timed": hmac.new(key, b"100:" + body, "sha256").hexdigest(),
    }
    filled = {name: value.format(**values) for name, value in headers.items()}
    config = Config(hmac=scheme)

    verify("generic", ["generic-secret"], delivery(filled, body, 100), config)

    for wrong in ({**filled, "X-Sig": "zz"}, {**filled, "X-Sig": filled["X-Sig"][:-2]}, {}):
        with pytest.raises(Forged):
            verify("generic", ["generic-secret"], delivery(wrong, body, 100), config)
    if scheme.timestamp_header:
        with pytest.raises(Forged):
            verify("generic", ["generic-secret"], delivery(filled, body, 401), config)


@pytest.mark.parametrize(
    ("source", "headers", "body", "expected"),
    [
        ("standard", {"webhook-id": "msg_1"}, b'{"type": "user.created"}', ("msg_1", "user.created")),
        ("standard", {"svix-id": "msg_2"}, b"[]", ("msg_2", None)),
        ("github", {"X-GitHub-Delivery": "g-1", "X-GitHub-Event": "ping"}, b"not json", ("g-1", "ping")),
        ("stripe", {}, b'{"id": "evt_1", "type": "invoice.paid"}', ("evt_1", "invoice.paid")),
        ("slack", {}, b'{"event_id": "Ev1", "event": {"type": "message"}}', ("Ev1", "message")),
        ("slack", {"Content-Type": "application/x-www-form-urlencoded"}, SLACK_BODY, (
            "398738663015.47445629121.803a0bc887a14d10d2c447fce8b6703c", "/webhook-collect")),
        ("telegram", {}, b'{"update_id": 10001, "message": {}}', ("10001", "message")),
        ("kommo_chats", {}, b'{"message": {"message": {"id": "m-1"}}}', ("m-1", "message")),
        ("kommo", {"Content-Type": "application/x-www-form-urlencoded"}, b"leads%5Badd%5D%5B0%5D%5Bid%5D=5",
            (None, "leads.add")),
        ("telegram", {}, b'{"update_id": ' + b"9" * 5000 + b"}", (None, None)),
        ("stripe", {}, b'{"id": {"a": 1}, "type": true}', (None, None)),
        ("stripe", {}, b"[" * 5000, (None, None)),
    ],
)  # fmt: skip
def test_what_a_sender_calls_its_deliveries(
    source: str, headers: dict[str, str], body: bytes, expected: tuple[Any, Any]
) -> None:
    found = identity(source, delivery(headers, body))

    assert (found.delivery_id, found.type) == expected


def test_a_generic_senders_ids_stand_where_the_endpoint_says() -> None:
    config = Config(delivery_id="header:X-Id", type="/meta/0/~1kind")

    found = identity("generic", delivery({"X-Id": "7"}, b'{"meta": [{"/kind": "k"}]}'), config)

    assert (found.delivery_id, found.type) == ("7", "k")


@pytest.mark.parametrize(
    ("source", "secret"),
    [
        ("standard", ""),
        ("standard", "whsec_"),
        ("standard", "whsec_AAAA"),
        ("standard", "not-whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYX"),
        ("standard", "whsec_***"),
        ("github", ""),
        ("stripe", ""),
        ("slack", "short"),
        ("telegram", "has a blank in it"),
        ("kommo", "anything"),
        ("kommo_chats", ""),
        ("generic", "line\nbreak-in-it"),
    ],
)
def test_an_empty_or_impossible_secret_is_not_taken(source: str, secret: str) -> None:
    with pytest.raises(ValueError):
        SOURCES[source].check_secret(secret)


def test_every_source_is_known_to_the_api_and_has_a_sender_here() -> None:
    names = set(EndpointRequest.model_fields["source"].annotation.__args__)  # type: ignore[union-attr]

    assert names == set(SOURCES) == set(SIGNERS)
    for source in SOURCES.values():
        if source.secret == "ours":
            source.check_secret(source.make_secret())
        else:
            with pytest.raises(ValueError):
                source.make_secret()
