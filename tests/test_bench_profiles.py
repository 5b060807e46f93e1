"""How ops/bench/profiles.py counts what its samplers saw."""

from __future__ import annotations

import pytest

from ops.bench.profiling import samplers

POSTGRES_LOG = """2026-01-01 10:00:00 UTC [7] LOG:  duration: 0.100 ms  parse <unnamed>: select 1
2026-01-01 10:00:00 UTC [7] LOG:  duration: 0.200 ms  bind <unnamed>: select 1
2026-01-01 10:00:00 UTC [7] LOG:  duration: 1.000 ms  execute <unnamed>: select 1
2026-01-01 10:00:00 UTC [7] LOG:  checkpoint starting: time
2026-01-01 10:00:01 UTC [8] LOG:  duration: 2.000 ms  statement: update t
\tset a = 1
2026-01-01 10:00:01 UTC [8] LOG:  duration: 2.500 ms  statement: update t set a = 1
2026-01-01 10:00:01 UTC [9] LOG:  duration: 9.000 ms  statement: select own
"""


def test_statements_are_counted_once_with_the_time_of_all_their_steps() -> None:
    found = samplers.statements(POSTGRES_LOG, own=9)

    assert found == {"select 1": (1, pytest.approx(1.3)), "update t set a = 1": (2, pytest.approx(4.5))}


@pytest.mark.parametrize(
    ("stack", "function"),
    [
        (["main (a.py:1)", "read (actors/x.py:5)", "loads (json/__init__.py:9)"], "read (actors/x.py:5)"),
        (["read (/srv/agentflow/x.py:5)", "f (numpy/x.py:1)"], "read (/srv/agentflow/x.py:5)"),
        (["main (a.py:1)", "_load (<frozen importlib._bootstrap>:3)", "f (b.py:2)"], "(imports)"),
        (["main (a.py:1)", "f (b.py:2)"], "f (b.py:2)"),
    ],
)
def test_what_a_library_takes_is_charged_to_who_called_it(stack: list[str], function: str) -> None:
    assert samplers.of_ours(stack) == function


@pytest.mark.parametrize(
    ("path", "thread", "name"),
    [
        ("/x/av.libs/libavcodec-d61378e8.so.63.1.102", "av:h264:df1", "libavcodec (h264 threads)"),
        ("/x/libavcodec-d61378e8.so.63.1.102", "python", "libavcodec"),
        ("/x/_multiarray_umath.cpython-313-x86_64-linux-gnu.so", "python", "_multiarray_umath"),
        ("/x/cv2.abi3.so", "python", "cv2"),
        ("/x/bin/postgres", "postgres", "postgres"),
        ("[kernel.kallsyms]", "python", "kernel"),
    ],
)
def test_a_module_is_named_without_its_version(path: str, thread: str, name: str) -> None:
    assert samplers.module_name(path, thread) == name
