"""The system under load as a customer has it, its servers and the outside services: started, and asked what they use."""

from __future__ import annotations

import json
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import httpx2
import psutil

from agentflow.prove.crew import Crew, Member
from agentflow.prove.ports import free_port
from agentflow.prove.servers import family, until
from ops.bench.comparison.servers import Servers, cpu_s, running
from ops.bench.mixing.letters import SHORT_MS, Customer
from ops.bench.peers.catalogue import ROOT, clean_environment
from tests.openrouter_server import KEY as MODEL_KEY

ADMIN_KEY: Final = "mix-operator-key-of-this-run"
STRIPE_SECRET: Final = "whsec_of_this_run"  # noqa: S105 - of a stand-in
#: As a customer would have them for a peak of 116 jobs a second: two workers, so that one may be lost, with the threads they come
#: with; one web process, as the Procfile starts it, with a connection for each of its threads.
WORKERS, THREADS, WEB_PROCESSES, CUSTOMERS, GPUS = 2, 25, 1, 20, 2
WEB_CONNECTIONS: Final = 16
#: What takes work in goes before what does it, as with CPUWeight=500 of systemd's unit: the nice value of web's group.
WEB_AUTOGROUP: Final = -7
_ANSWER_S: Final = 30.0


class Child:
    """A process of the benchmark's own that answers lines by lines of JSON."""

    def __init__(self, module: str, *arguments: str, log: Path) -> None:
        self._module = module
        with log.open("ab") as file:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                env=clean_environment(),
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                start_new_session=True,
            )

    def read(self, within_s: float = _ANSWER_S) -> dict[str, Any]:
        """Raises TimeoutError."""
        assert self.popen.stdout is not None
        ready, _, _ = select.select([self.popen.stdout], [], [], within_s)
        line = self.popen.stdout.readline() if ready else b""
        if not line:
            raise TimeoutError(f"{self._module} said nothing within {within_s:g} s")
        said: dict[str, Any] = json.loads(line)
        return said

    def ask(self) -> dict[str, Any]:
        """Raises TimeoutError, and OSError where it has ended."""
        assert self.popen.stdin is not None
        self.popen.stdin.write(b"\n")
        self.popen.stdin.flush()
        return self.read()

    def close(self) -> None:
        for process in family(self.popen.pid):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.popen.wait(20)


@dataclass
class Setting:
    """All that runs. `children`: the outside services, and who hands work in."""

    folder: Path
    servers: Servers
    crew: Crew
    vendors: Child
    places: dict[str, Any]
    customers: list[Customer]
    children: dict[str, Child] = field(default_factory=dict)

    @property
    def port(self) -> int:
        return self.crew.members["web"].port

    def families(self) -> dict[str, list[psutil.Process]]:
        """Our processes, then those of the benchmark itself; servers are in `Servers.cpu_s`."""
        found = {name: member.family() for name, member in self.crew.members.items()}
        return found | {name: family(child.popen.pid) for name, child in self.children.items()}

    def cpu_s(self) -> dict[str, float]:
        """Seconds of a processor so far, by member and server; `others` is what everything else on this machine used."""
        ours = {name: cpu_s(processes) for name, processes in self.families().items()}
        ours |= self.servers.cpu_s()
        ours["bench"] = cpu_s([psutil.Process()])
        times = psutil.cpu_times()
        idle = (
            times.idle
            + getattr(times, "iowait", 0.0)
            + getattr(times, "guest", 0.0)
            + getattr(times, "guest_nice", 0.0)
        )
        busy = sum(times) - idle  # with what the host took away: nobody here could have it
        return {**ours, "machine": busy}

    def close(self) -> None:
        for child in self.children.values():
            child.close()

    def starts(self) -> dict[str, int]:
        return {name: member.starts for name, member in self.crew.members.items()}


@contextmanager
def setting(logs: Path | None = None) -> Iterator[Setting]:
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="agentflow-mix-"))
        folder.chmod(0o755)
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        logs = logs or folder / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        servers = stack.enter_context(running())
        vendors = Child("ops.bench.mixing.vendors", str(folder), str(CUSTOMERS), str(GPUS), log=logs / "vendors.log")
        stack.callback(vendors.close)
        places = vendors.read(60)
        crew = Crew()
        stack.callback(crew.close)
        start(crew, environment(servers, folder, places), logs)
        made = Setting(folder, servers, crew, vendors, places, [], {"outside services": vendors})
        stack.callback(made.close)
        made.customers = customers(made.port, places)
        until(lambda: connected(servers), within_s=60, every_s=0.5)
        crew.watch()
        yield made


def environment(servers: Servers, folder: Path, places: dict[str, Any]) -> dict[str, str]:
    """As shipped, but for what names servers and services."""
    allowed = [*(crm["host"] for crm in places["kommo"]), places["receiver_host"]]
    return {
        **clean_environment(),
        "AGENTFLOW_ENV": "production",
        "AGENTFLOW_HOME": str(folder / "home"),
        "DATABASE_URL": servers.joined.database_url,
        "REDIS_URL": servers.redis_url("everysec"),
        "RABBITMQ_URL": servers.rabbitmq.url,
        "STORAGE_URL": (folder / "storage").as_uri(),
        "STORAGE_SHARED": "true",
        "ADMIN_API_KEY": ADMIN_KEY,
        "ENCRYPTION_KEY": uuid4().hex,
        "OPENROUTER_API_KEY": MODEL_KEY,
        "OPENROUTER_BASE_URL": places["openrouter"],
        "COMFYUI_URL": ",".join(places["comfyui"]),
        "FETCH_ALLOW": ",".join(allowed),
        "JOB_CONCURRENCY": str(THREADS),
        "WEB_CONCURRENCY": str(WEB_PROCESSES),
    }


def start(crew: Crew, environment: dict[str, str], logs: Path) -> None:
    """As the Procfile does. Raises SystemExit."""
    python = [sys.executable, "-m"]
    web = [*python, "gunicorn", "-c", str(ROOT / "web/gunicorn_config.py"), "web.wsgi:app"]
    own = {"DATABASE_POOL_SIZE": str(WEB_CONNECTIONS)}
    crew.add(Member("web", web, {**environment, **own}, logs / "web.log", free_port()))
    crew.add(Member("scheduler", [*python, "scheduler"], environment, logs / "scheduler.log"))
    worker = [*python, "dramatiq", "actors", "--processes", "1", "--threads", str(THREADS)]
    for number in range(1, WORKERS + 1):
        crew.add(Member(f"worker {number}", worker, environment, logs / f"worker-{number}.log"))
    for name, member in crew.members.items():
        if not crew.wait_ready(name):
            raise SystemExit(f"{name} did not start:\n{member.log.read_text()[-3000:]}")
    for process in crew.members["web"].family():
        with suppress(OSError):  # a kernel without them, or none of our business: in a container
            Path(f"/proc/{process.pid}/autogroup").write_text(str(WEB_AUTOGROUP))


def customers(port: int, places: dict[str, Any]) -> list[Customer]:
    """Made by the API. Raises SystemExit."""
    headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
    with httpx2.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=60) as http:

        def post(path: str, slug: str, body: dict[str, Any]) -> dict[str, Any]:
            answer = http.post(path, json=body, headers={"X-Organization": slug} if slug else {})
            if answer.status_code != 201:
                raise SystemExit(f"{path}: {answer.status_code} {answer.text}")
            said: dict[str, Any] = answer.json()
            return said

        return [customer(f"customer-{n}", crm, places["receiver"], post) for n, crm in enumerate(places["kommo"], 1)]


def customer(
    slug: str, crm: dict[str, Any], receiver: str, post: Callable[[str, str, dict[str, Any]], dict[str, Any]]
) -> Customer:
    """An organization with a key, endpoints for webhooks and an account at Kommo. `post` takes a path, whose it is (empty:
    nobody's) and a body."""
    post("/api/organizations", "", {"slug": slug})
    key = post("/api/keys", slug, {"name": "app", "scopes": ["submit", "read"]})["key"]
    account = post("/api/crm/accounts", slug, {"host": crm["host"], "token": crm["token"]})["id"]

    def endpoint(source: str, name: str, secret: str | None, **config: Any) -> tuple[str, str]:
        body = {"source": source, "name": name, "config": config, **({"secret": secret} if secret else {})}
        made = post("/api/webhook-endpoints", slug, body)
        return made["path"], secret or made["secret"]

    answered = {"kind": "job", "type": "ping", "payload": {"sleep_ms": SHORT_MS}}
    return Customer(
        key=key,
        account=account,
        leads=tuple(crm["leads"]),
        bot=endpoint("generic", "bot", None, action=answered, delivery_id="/id"),
        payments=endpoint("stripe", "payments", STRIPE_SECRET),
        forwarded=endpoint("stripe", "forwarded", STRIPE_SECRET, action={"kind": "forward", "url": receiver}),
        crm=endpoint("kommo", "crm", None, account_id=account)[0],
    )


def connected(servers: Servers) -> bool:
    """Every account has answered, and what was in it is mirrored."""
    with servers.connect() as conn:
        row = conn.execute(
            "select (select count(*) from agentflow.crm_accounts where state <> 'connected')"
            " + (select count(*) from agentflow.jobs where state in ('queued', 'running'))"
        ).fetchone()
    return row is not None and row[0] == 0


def wait_quiet(servers: Servers, types: Sequence[str], created_before: float, within_s: float) -> bool:
    """Until no job of these types that was handed in before (unix time) waits or runs."""
    query = (
        "select 1 from agentflow.jobs where state in ('queued', 'running') and type = any (%s)"
        " and created_at < to_timestamp(%s) limit 1"
    )
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        with suppress(Exception), servers.connect() as conn:  # asked again, whatever it was: it is the end of an hour
            if conn.execute(query, (list(types), created_before)).fetchone() is None:
                return True
        time.sleep(1)
    return False
