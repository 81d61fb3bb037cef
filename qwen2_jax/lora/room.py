"""The places that adapters take on the devices, of several kinds: which are free and which are whose."""

from collections.abc import Iterable, Mapping

Needs = Mapping[str, int]
"""How many places of each kind."""
Places = Mapping[str, list[int]]


class Room:
    """A fixed number of places of each kind."""

    def __init__(self, counts: Needs) -> None:
        self._counts = dict(counts)
        self._free = {kind: list(range(count))[::-1] for kind, count in counts.items()}

    def short(self, needs: Needs, given_back: Needs | None = None) -> list[str]:
        """Return the kinds of which too few places are free, or would be if others gave theirs back."""
        others = given_back or {}
        return [kind for kind, count in needs.items() if count > len(self._free[kind]) + others.get(kind, 0)]

    def lacking(self, needs: Needs, held: Needs | None = None) -> str | None:
        """Return the first kind of which there are too few even if all were free that are not `held` for good."""
        held = held or {}
        return next((kind for kind, count in needs.items() if count + held.get(kind, 0) > self._counts[kind]), None)

    def take(self, needs: Needs) -> dict[str, list[int]]:
        """Take places of which none is `short`."""
        return {kind: [self._free[kind].pop() for _ in range(count)] for kind, count in needs.items()}

    def give_back(self, places: Places) -> None:
        """Make places free again."""
        for kind, numbers in places.items():
            self._free[kind] += numbers

    def check_integrity(self, held: Iterable[Places]) -> None:
        """Raise `AssertionError` unless every place is free or in one of `held`."""
        holders = list(held)
        for kind, count in self._counts.items():
            numbers = [number for places in holders for number in places.get(kind, [])]
            if sorted(numbers + self._free[kind]) != list(range(count)):
                raise AssertionError(f"{kind}: {numbers} are held, {self._free[kind]} free, of {count}")
