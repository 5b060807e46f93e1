"""Download of a URL that a user gave us, without becoming the user's way into our network (SSRF).

Built on httpcore2, the engine of httpx2, and not on its client: only there may the network backend be ours. Names are
resolved once, inside the connect, and the address that passed the check is the one connected to; and every wait of the
connection, for name, connect, handshake, head and body, counts against one deadline. The client would also log each URL
with its query, follow the environment's proxies and decode bodies.
"""

from agentflow.fetch.answers import MAX_RETRY_AFTER_S, POST_ANSWER_BYTES, Fetched, Posted
from agentflow.fetch.connection import MAX_ADDRESSES, STOP_CHECK_S
from agentflow.fetch.guard import FetchRefused, Guard
from agentflow.fetch.transfer import CHECK_TIMEOUT_S, MAX_REDIRECTS, check_url, download, post
from agentflow.fetch.urls import MAX_URL_CHARS

__all__ = [
    "CHECK_TIMEOUT_S",
    "MAX_ADDRESSES",
    "MAX_REDIRECTS",
    "MAX_RETRY_AFTER_S",
    "MAX_URL_CHARS",
    "POST_ANSWER_BYTES",
    "STOP_CHECK_S",
    "FetchRefused",
    "Fetched",
    "Guard",
    "Posted",
    "check_url",
    "download",
    "post",
]
