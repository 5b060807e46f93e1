from __future__ import annotations

from typing import Any

Graph = dict[str, dict[str, Any]]
