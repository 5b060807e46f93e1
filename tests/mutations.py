"""Code of ours with text of it replaced, to see that tests notice: functions of the schema, of modules, methods."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Sequence
from typing import Any

import psycopg
import pytest

from tests.core_support import value


def mutate_function(conn: psycopg.Connection, name: str, *changes: tuple[str, str]) -> None:
    """Replace text in a function of the schema; each text must be there."""
    text = value(
        conn,
        "select pg_get_functiondef(p.oid) from pg_proc p join pg_namespace n on n.oid = p.pronamespace"
        " where n.nspname = 'agentflow' and p.proname = %s",
        name,
    )
    conn.execute(_changed(text, changes, name).encode())


def mutate_code(patch: pytest.MonkeyPatch, owner: Any, name: str, *changes: tuple[str, str]) -> None:
    """Replace text in the source of a function of a module, or of a method of a class."""
    function = getattr(owner, name)
    source = _changed(textwrap.dedent(inspect.getsource(function)), changes, name)
    namespace: dict[str, Any] = {}
    code = compile("from __future__ import annotations\n" + source, f"<mutated {name}>", "exec")
    exec(code, function.__globals__, namespace)  # noqa: S102 - our own source
    patch.setattr(owner, name, namespace[name])


def _changed(text: str, changes: Sequence[tuple[str, str]], name: str) -> str:
    for old, new in changes:
        # As many blanks and line ends as there are: a mutation does not depend on the layout.
        pattern = r"\s+".join(re.escape(word) for word in old.split())
        text, times = re.subn(pattern, lambda _, new=new: new, text)
        assert times, f"{name} has no {old!r}: the mutation tests nothing"
    return text
