"""The keeper of one home: keeps Postgres and Valkey running while anybody uses the home, then stops them and leaves.

Run by path, `python -I -S keeper.py HOME RUN POSTGRES VALKEY UID GID`, and only from the standard library: it sits in
memory for as long as the servers do, so it also keeps away from modules as large as subprocess, socket or pathlib.

Who lives is told by flock on files in HOME/locks. They are never unlocked: closing the file, or dying, is leaving.
    users      each process that uses the home holds it shared; whoever gets it exclusively knows that nobody is left
    keeper     held by the keeper: there is one
    postgres   inherited by the server and all its processes: free means that truly none of them lives, so that
    valkey     what a dead one left behind may be deleted. The file's text is the server's process number.
"""

# pathlib and contextlib would cost more memory than all the rest of the keeper:
# ruff: noqa: PTH108, PTH116, PTH123, SIM105

from __future__ import annotations

import fcntl
import os
import signal
import sys
import time

TICK_S = 0.5
LOG_MAX_BYTES = 10 * 1024 * 1024
LOG_KEPT_BYTES = 1024 * 1024

# Not our own environment: PGPORT, PGDATESTYLE or LD_LIBRARY_PATH would change the servers, and secrets would leak.
SERVER_ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"}

#: Of control groups, versions 2 and 1, as they are seen in a container.
MEMORY_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")

# Small: 31 MB for everything instead of 60. One machine, one home: no replication, no parallel queries, no TCP.
POSTGRES_SETTINGS = {
    "listen_addresses": "",
    "port": "5432",
    "unix_socket_permissions": "0700",
    "max_connections": "100",
    "io_method": "sync",
    "wal_level": "minimal",
    "max_wal_senders": "0",
    "max_parallel_workers": "0",
    "max_logical_replication_workers": "0",
    "autovacuum_max_workers": "1",
    "huge_pages": "off",
    "jit": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
}

# Nothing on disk: what Valkey holds can be made again from Postgres.
VALKEY_SETTINGS = {
    "--port": "0",
    "--unixsocketperm": "700",
    "--save": "",
    "--appendonly": "no",
    "--daemonize": "no",
    "--maxmemory-policy": "noeviction",
}

# A terminal's Ctrl-C or hang-up and a service manager's SIGTERM to the whole group must not leave the servers alone.
IGNORED_SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)


def memory_mb() -> int:
    """Of the machine, or of the container."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for limit in MEMORY_LIMITS:
        try:
            with open(limit, encoding="ascii") as file:
                found.append(int(file.read()))
        except (OSError, ValueError):  # no container, another version, or "max"
            continue
    return min(found) // 2**20


def buffers_mb(memory: int) -> int:
    """What Postgres keeps of its files: a sixteenth of the memory, and no more than knowledge bases of 100,000 passages need. It
    takes up what was read, not at once."""
    return max(32, min(512, memory // 16))


def main(home: str, run: str, postgres: str, valkey: str, uid: str, gid: str) -> None:
    """Return in the caller's child once a keeper is in its place: this one, gone to the background, or another."""
    os.umask(0o077)
    keeper = lock_within(f"{home}/locks/keeper", seconds=0.2)
    if keeper is None:
        return
    if os.fork():
        os._exit(0)  # the child goes on with the lock; nobody has to wait for a child that leaves one day
    for signum in IGNORED_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    servers = [
        postgres_server(home, run, postgres, None if uid == "-1" else (int(uid), int(gid))),
        valkey_server(home, run, valkey),
    ]
    try:
        users = keep(home, servers)
        for server in servers:
            server.stop()
    except FileNotFoundError:  # somebody deleted the home
        for server in servers:
            server.kill()
    else:
        # In this order: whoever waits for `users` starts a keeper at once, which must not find this one's lock.
        os.close(keeper)
        os.close(users)


def postgres_server(home: str, run: str, binary: str, account: tuple[int, int] | None) -> Server:
    data = f"{home}/pg18"
    given = {**POSTGRES_SETTINGS, "shared_buffers": f"{buffers_mb(memory_mb())}MB"}
    settings = [word for name, value in given.items() for word in ("-c", f"{name}={value}")]
    return Server(
        home,
        "postgres",
        [binary, "-D", data, "-k", run, *settings],
        folder=data,
        account=account,
        # Both name a process, whose number may be somebody else's by now: Postgres would refuse to start.
        leftovers=[f"{data}/postmaster.pid", f"{run}/.s.PGSQL.5432.lock"],
        # Fast (closes the connections), immediate (recovers at the next start), and what no process survives.
        stop_signals=[(signal.SIGINT, 60.0), (signal.SIGQUIT, 10.0), (signal.SIGKILL, 10.0)],
    )


def valkey_server(home: str, run: str, binary: str) -> Server:
    folder = f"{home}/valkey"
    settings = [word for pair in VALKEY_SETTINGS.items() for word in pair]
    return Server(
        home,
        "valkey",
        [binary, "--dir", folder, "--unixsocket", f"{run}/valkey.sock", *settings],
        folder=folder,
        account=None,
        leftovers=[],
        stop_signals=[(signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0)],
    )


def keep(home: str, servers: list[Server]) -> int:
    """Keep the servers running until nobody uses the home. Returns the lock that keeps new users waiting."""
    logs = [f"{home}/logs/{name}.log" for name in ("postgres", "valkey", "keeper")]
    while True:
        users = lock(f"{home}/locks/users", fcntl.LOCK_EX | fcntl.LOCK_NB)
        if users is not None:
            return users
        for log in logs:
            trim(log)
        for server in servers:
            server.start_if_dead()
        time.sleep(TICK_S)
        reap(servers)


class Server:
    """One server of the home. Not necessarily a child: it may have outlived the keeper that started it."""

    def __init__(
        self,
        home: str,
        name: str,
        argv: list[str],
        *,
        folder: str,
        account: tuple[int, int] | None,
        leftovers: list[str],
        stop_signals: list[tuple[int, float]],
    ) -> None:
        self.lock_path = f"{home}/locks/{name}"
        self.log_path = f"{home}/logs/{name}.log"
        self.argv = argv
        self.folder = folder
        self.account = account
        self.leftovers = leftovers
        self.stop_signals = stop_signals
        self.child: int | None = None
        self.started_at = float("-inf")
        self.pause_s = 0.0

    def start_if_dead(self) -> bool:
        """Start the server unless a process of it lives; at most every 10 s if it dies again and again."""
        if time.monotonic() < self.started_at + self.pause_s:
            return False
        held = lock(self.lock_path, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if held is None:
            return False
        died_young = time.monotonic() < self.started_at + 10.0
        self.pause_s = min(max(self.pause_s * 2, TICK_S), 10.0) if died_young else 0.0
        self.started_at = time.monotonic()
        for path in self.leftovers:
            remove(path)
        self.child = os.fork()
        if self.child == 0:
            self.become(held)
        os.close(held)
        return True

    def become(self, held: int) -> None:
        """In the child: turn into the server, which inherits the lock. Never returns."""
        try:
            log = os.open(self.log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
            os.dup2(log, 1)
            os.dup2(log, 2)
            # Ignoring is inherited (Python itself ignores SIGPIPE), and so would be passed on to all they start.
            for signum in (*IGNORED_SIGNALS, signal.SIGPIPE):
                signal.signal(signum, signal.SIG_DFL)
            # Same length always and no truncation: needs no new block, so it works on a full disk.
            os.pwrite(held, b"%-10d\n" % os.getpid(), 0)
            os.set_inheritable(held, True)
            os.chdir(self.folder)
            if self.account is not None:
                uid, gid = self.account
                os.setgroups([])
                os.setgid(gid)
                os.setuid(uid)
            os.execve(self.argv[0], self.argv, SERVER_ENVIRONMENT)  # noqa: S606
        except OSError as err:
            os.write(2, os.fsencode(f"cannot start {self.argv[0]}: {err}\n"))
        finally:
            os._exit(127)

    def stop(self) -> None:
        """Stop the server and return when none of its processes lives any more."""
        for signum, patience_s in self.stop_signals:
            if self.gone(within_s=0.0):
                return
            self.signal(signum)
            if self.gone(within_s=patience_s):
                return

    def gone(self, *, within_s: float) -> bool:
        held = lock_within(self.lock_path, seconds=within_s)
        if held is None:
            return False
        os.close(held)
        return True

    def signal(self, signum: int) -> None:
        with open(self.lock_path, "rb") as file:
            text = file.read().strip()
        if text:  # empty: killed in the moment before it could write
            send_signal(int(text), signum)

    def kill(self) -> None:
        """For a home whose files are gone, the locks with them: only our own child can be known."""
        if self.child is not None:
            send_signal(self.child, signal.SIGQUIT if len(self.stop_signals) > 2 else signal.SIGKILL)


def lock(path: str, how: int) -> int | None:
    """The descriptor that holds the lock, or None if LOCK_NB is in `how` and others hold it. Not inherited by exec."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, how)
    except BlockingIOError:
        os.close(fd)
        return None
    except BaseException:
        os.close(fd)
        raise
    return fd


def lock_within(path: str, *, seconds: float, how: int = fcntl.LOCK_EX) -> int | None:
    """Like `lock`, asking again for some seconds (flock itself has no time limit)."""
    end = time.monotonic() + seconds
    while True:
        fd = lock(path, how | fcntl.LOCK_NB)
        if fd is not None or time.monotonic() >= end:
            return fd
        time.sleep(0.02)


def trim(path: str) -> None:
    """Move the end of a long log to `….log.1` and empty it. The servers append, so they just go on."""
    try:
        if os.stat(path).st_size <= LOG_MAX_BYTES:
            return
        with open(path, "rb+") as log, open(f"{path}.1", "wb") as old:
            log.seek(-LOG_KEPT_BYTES, os.SEEK_END)
            old.write(log.read(LOG_KEPT_BYTES))
            log.truncate(0)
    except OSError:
        pass  # no log yet, or a full disk: a log is not worth a server


def remove(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def send_signal(pid: int, signum: int) -> None:
    try:
        os.kill(pid, signum)
    except (ProcessLookupError, PermissionError):
        pass


def reap(servers: list[Server]) -> None:
    """Take dead children out of the process table. From then on their numbers may be somebody else's."""
    try:
        while pid := os.waitpid(-1, os.WNOHANG)[0]:
            for server in servers:
                if server.child == pid:
                    server.child = None
    except ChildProcessError:
        pass


if __name__ == "__main__":
    main(*sys.argv[1:7])
