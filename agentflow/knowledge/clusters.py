"""Which names mean one thing: groups of entities, from what was decided of pairs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from uuid import UUID

from agentflow.knowledge import matching


@dataclass(frozen=True, slots=True)
class Member:
    id: UUID
    type: str
    name: str


@dataclass(frozen=True, slots=True)
class Match:
    """What was decided of two entities. `weak`: the shorter name is joined only where it fits one group."""

    one_id: UUID
    other_id: UUID
    same: bool
    weak: bool = False


def roots(members: Sequence[Member], matches: Iterable[Match]) -> dict[UUID, UUID]:
    """Each member's root: the first of its group by id. The order of the arguments does not matter.

    No group holds two that were decided not to be the same, or whose names contradict each other, whatever third is like
    both.
    """
    return _Groups(members, matches).roots()


class _Groups:
    def __init__(self, members: Sequence[Member], matches: Iterable[Match]) -> None:
        self._members = {member.id: member for member in members}
        self._of = {member.id: {member.id} for member in members}
        known = [match for match in matches if {match.one_id, match.other_id} <= self._members.keys()]
        self._apart = {frozenset((match.one_id, match.other_id)) for match in known if not match.same}
        self._same = sorted((match for match in known if match.same), key=lambda match: (match.one_id, match.other_id))

    def roots(self) -> dict[UUID, UUID]:
        for match in self._same:
            if not match.weak:
                self._join(match.one_id, match.other_id)
        self._join_short_names()
        return {id_: min(group) for id_, group in self._of.items()}

    def _join_short_names(self) -> None:
        """The fuller names first, so that J. A. Smith knows where he belongs when J. Smith asks him."""
        fuller: defaultdict[UUID, set[UUID]] = defaultdict(set)
        for match in self._same:
            if match.weak:
                short, full = sorted((match.one_id, match.other_id), key=self._fullness)
                fuller[short].add(full)
        for short in sorted(fuller, key=self._fullness, reverse=True):
            fits = fuller[short]
            fullest = [full for full in fits if not fuller.get(full, set()) & fits]
            groups = {frozenset(self._of[full]) for full in fullest}
            if len(groups) == 1:
                self._join(short, min(next(iter(groups))))

    def _fullness(self, id_: UUID) -> tuple[int, UUID]:
        return len(self._members[id_].name), id_

    def _join(self, one: UUID, other: UUID) -> None:
        first, second = self._of[one], self._of[other]
        if first is second or any(self._are_apart(a, b) for a in first for b in second):
            return
        first |= second
        for id_ in second:
            self._of[id_] = first

    def _are_apart(self, one: UUID, other: UUID) -> bool:
        if frozenset((one, other)) in self._apart:
            return True
        a, b = self._members[one], self._members[other]
        return matching.compare(a.type, a.name, b.name) == "different"
