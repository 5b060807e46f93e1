"""How much memory a large upload costs the web process.

    .venv/bin/python ops/bench/upload.py [--gigabytes 2]

Starts the web process alone on a home of its own, sends a body of that size to POST /api/videos in pieces, and samples the
memory of the whole process tree (PSS) every 0.1 s. Writes ops/bench/results/upload.json.
"""

from __future__ import annotations

import argparse
import http.client
import json
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from idle import BIN, ROOT, family, get, machine, pss_mb, running

from agentflow.prove.ports import free_port

PIECE = b"\x00\x01\x02\x03" * (1 << 18)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    options = parser.parse_args()
    size = int(options.gigabytes * (1 << 30)) // len(PIECE) * len(PIECE)
    home = Path(tempfile.mkdtemp(prefix="agentflow-bench-"))
    home.chmod(0o755)
    try:
        figures = {"machine": machine(), **upload(home, size)}
    finally:
        shutil.rmtree(home, ignore_errors=True)
    (ROOT / "ops/bench/results/upload.json").write_text(json.dumps(figures, indent=2) + "\n")
    for name, value in figures.items():
        print(f"{name:32} {value}")


def upload(home: Path, size: int) -> dict[str, object]:
    port = free_port()
    with running([str(BIN / "gunicorn"), "-c", "web/gunicorn_config.py", "web.wsgi:app"], home, port) as process:
        key = (home / "admin.key").read_text().strip()
        for _ in range(20):
            get(port, "/openapi.json", None)
        send(port, key, len(PIECE))
        before = pss_mb(family(process.pid))
        samples: list[float] = []
        done = threading.Event()

        def sample() -> None:
            while not done.wait(0.1):
                samples.append(pss_mb(family(process.pid)))

        watcher = threading.Thread(target=sample)
        watcher.start()
        started = time.perf_counter()
        try:
            send(port, key, size)
        finally:
            done.set()
            watcher.join()
        seconds = time.perf_counter() - started
        return {
            "upload GB": round(size / 1e9, 2),
            "PSS before MB": before,
            "PSS peak MB": max(samples),
            "growth MB": round(max(samples) - before, 1),
            "MB per second": round(size / 1e6 / seconds),
        }


def send(port: int, key: str, size: int) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(size // len(PIECE)):
            yield PIECE

    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    headers = {
        "Authorization": f"Bearer {key}",
        "Content-Type": "application/octet-stream",
        "Content-Length": str(size),
    }
    connection.request("POST", "/api/videos?filename=large.bin", pieces(), headers)
    answer = connection.getresponse()
    text = answer.read().decode()
    assert answer.status == 201, text
    connection.close()


if __name__ == "__main__":
    main()
