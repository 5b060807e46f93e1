"""What a producer hands in, and where: the same for every system."""

from __future__ import annotations

import os

RABBITMQ = os.environ.get("BENCH_RABBITMQ", "")
REDIS = os.environ.get("BENCH_REDIS", "")
POSTGRES = os.environ.get("BENCH_POSTGRES", "")
QUEUE = os.environ.get("BENCH_QUEUE", "bench")
#: About 200 bytes of JSON with the rest.
TEXT = "x" * 160
RESULT_TIMEOUT_S = 30.0
