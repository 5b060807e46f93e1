"""Renders on ComfyUI servers: what is asked for, which server has room, what was sent to it and what became of that, and the
files that came out.

A request (`requests`, `workflows`, `graphs`) is checked against what a server has (`preflight`). Postgres knows each prompt
before the server does (`prompts`); the server's `/history` and `/queue` are the truth of what became of it (`client`), its
websocket only makes that quick (`socket`). `supervisor` is one render, `keeper` looks after the servers.
"""
