from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Complaint:
    node: str | None
    input: str | None
    code: str
    message: str


def complaints(
    graph: Mapping[str, Any], object_info: Mapping[str, Any], *, places: Collection[tuple[str, str]] | None = None
) -> list[Complaint]:
    return [
        Complaint(id_, None, "missing_node_type", "unknown")
        for id_, node in graph.items()
        if node["class_type"] not in object_info
    ]
