"""What became of a prompt, from its entry in `/history`: files, or which of the ways in which it can fail.

`success` alone says little: blocked nodes leave a prompt without outputs, and an interrupted one counts as `error`. The last
message of `status.messages` tells them apart.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

Kind = Literal["done", "no_output", "partly_failed", "node_error", "out_of_memory", "interrupted"]

#: What a node's raw text may have at most to be kept.
MOST_TEXT: Final = 1_000_000
_SAID: Final = 500
_OUT_OF_MEMORY: Final = ("outofmemoryerror", "out of memory", "allocation on device")


@dataclass(frozen=True, slots=True)
class Ended:
    """`files` and `texts` are those of the nodes that count; `ran` is false where all but the saving came from the cache."""

    kind: Kind
    said: str = ""
    files: tuple[dict[str, str], ...] = ()  # node, filename, subfolder, type
    texts: tuple[tuple[str, str], ...] = ()  # node, text
    seconds: float = 0.0
    ran: bool = True

    def as_json(self) -> dict[str, Any]:
        """Of one that is done, to be kept: the server forgets it when it starts anew, its files stay."""
        return {
            "files": list(self.files),
            "texts": [list(t) for t in self.texts],
            "seconds": self.seconds,
            "ran": self.ran,
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Ended:
        texts = tuple((node, text) for node, text in found["texts"])
        return cls("done", files=tuple(found["files"]), texts=texts, seconds=found["seconds"], ran=found["ran"])


def understand(
    entry: Mapping[str, Any], graph: Mapping[str, Any], wanted: frozenset[str] | None, saving: Collection[str] = ()
) -> Ended:
    """`wanted`: the nodes whose outputs count; None: all. `saving`: those that have outputs, as far as that is known: a server
    that was asked for all of them may have left out some, and said so in an answer that was lost."""
    status = entry.get("status")
    status = status if isinstance(status, dict) else {}
    messages = _messages(status)
    outputs = entry.get("outputs")
    outputs = outputs if isinstance(outputs, dict) else {}
    counted = {node: each for node, each in outputs.items() if wanted is None or node in wanted}
    files, texts = tuple(_best(list(_files(counted)))), tuple(_texts(counted))
    seconds = _seconds(messages)
    if status.get("status_str") != "success":
        kind, said = _failure(messages)
        if kind == "node_error" and files:
            kind, said = (
                "partly_failed",
                f"{said}; nodes {', '.join(sorted({f['node'] for f in files}))} had ended before",
            )
        return Ended(kind, said, seconds=seconds)
    if left_out := set(saving) - _targets(entry, saving):
        return Ended("partly_failed", f"the server left out nodes {', '.join(sorted(left_out))}", seconds=seconds)
    if not files and not texts:
        return Ended("no_output", "", seconds=seconds)
    return Ended("done", "", files, texts, seconds, ran=_ran(messages, graph))


def _targets(entry: Mapping[str, Any], otherwise: Collection[str]) -> set[str]:
    """The output nodes that it ran for."""
    item = entry.get("prompt")
    return set(item[4]) if isinstance(item, list) and len(item) > 4 and isinstance(item[4], list) else set(otherwise)


def _messages(status: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    listed = status.get("messages")
    return [
        (str(each[0]), each[1])
        for each in (listed if isinstance(listed, list) else ())
        if isinstance(each, list | tuple) and len(each) == 2 and isinstance(each[1], dict)
    ]


def _failure(messages: list[tuple[str, dict[str, Any]]]) -> tuple[Kind, str]:
    for name, data in reversed(messages):
        where = f"node {data.get('node_id')} {data.get('node_type') or ''}".strip()
        if name == "execution_interrupted":
            return "interrupted", f"interrupted at {where}"
        if name == "execution_error":
            said = " ".join(str(data.get("exception_message") or "").split())[:_SAID]
            kind = str(data.get("exception_type") or "")
            is_memory = any(each in f"{kind} {said}".lower() for each in _OUT_OF_MEMORY)
            return "out_of_memory" if is_memory else "node_error", f"{where}: {kind.rpartition('.')[2]}: {said}"
    return "node_error", "the server does not say why"


def _files(outputs: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """Whatever names a file, under whichever key: `images`, `gifs`, `audio`, `3d`, and those of nodes not known yet."""
    for node, of_node in outputs.items():
        for listed in of_node.values() if isinstance(of_node, dict) else ():
            for each in listed if isinstance(listed, list) else ():
                if isinstance(each, dict) and isinstance(each.get("filename"), str) and each["filename"]:
                    yield {
                        "node": str(node),
                        "filename": each["filename"],
                        "subfolder": str(each.get("subfolder") or ""),
                        "type": str(each.get("type") or "output"),
                    }


def _best(files: list[dict[str, str]]) -> list[dict[str, str]]:
    """Files that were saved; previews where nothing was. What went in is no output."""
    files = list({tuple(sorted(each.items())): each for each in files}.values())
    saved = [each for each in files if each["type"] == "output"]
    return saved or [each for each in files if each["type"] == "temp"]


def _texts(outputs: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for node, of_node in outputs.items():
        listed = of_node.get("text") if isinstance(of_node, dict) else None
        for each in listed if isinstance(listed, list) else [listed]:
            if isinstance(each, str) and each:
                yield str(node), each[:MOST_TEXT]


def _seconds(messages: list[tuple[str, dict[str, Any]]]) -> float:
    times = [data["timestamp"] for _, data in messages if isinstance(data.get("timestamp"), int | float)]
    return max(0.0, (times[-1] - times[0]) / 1000) if len(times) > 1 else 0.0


def _ran(messages: list[tuple[str, dict[str, Any]]], graph: Mapping[str, Any]) -> bool:
    listed = [data.get("nodes") for name, data in messages if name == "execution_cached"]
    cached = {str(node) for nodes in listed if isinstance(nodes, list) for node in nodes}
    saving = {node for node, each in graph.items() if "filename_prefix" in (each.get("inputs") or {})}
    return not cached or not graph.keys() - saving <= cached
