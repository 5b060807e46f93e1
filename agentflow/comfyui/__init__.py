"""Renders on ComfyUI servers: what is asked for (`requests`, `workflows`, `graphs`, `preflight`), which server has room, what was sent to it, what became of that, and the files that came out.

Postgres knows each prompt before the server does (`prompts`); the server's `/history` and `/queue` are the truth of what became
of it (`client`), its websocket only makes that quick (`socket`). `supervisor` is one render, `keeper` looks after the servers.
"""
