"""The adapters on the devices: who has which places, and who leaves for another's sake. For the engine's thread."""

from collections import Counter, OrderedDict
from collections.abc import Iterator

from qwen2_jax.lora.entry import AdapterEntry, Holding
from qwen2_jax.lora.room import Needs, Room


class Residents:
    """The adapters that have places, the least recently used first."""

    def __init__(self, counts: Needs) -> None:
        """There are so many places of each kind."""
        self._room = Room(counts)
        self._entries: OrderedDict[AdapterEntry, None] = OrderedDict()
        self._held: dict[Holding, Counter[str]] = {Holding.IDLE: Counter(), Holding.PINNED: Counter()}

    def __len__(self) -> int:
        """Return how many adapters are there."""
        return len(self._entries)

    def __iter__(self) -> Iterator[AdapterEntry]:
        """Go through them, the least recently used first."""
        return iter(self._entries)

    def lacking(self, needs: Needs, *, beside_pinned: bool = False) -> str | None:
        """Return the first kind of which there are too few places in all, or beside those of pinned adapters."""
        return self._room.lacking(needs, self._held[Holding.PINNED] if beside_pinned else None)

    def has_room(self, needs: Needs) -> bool:
        """Return whether so many places are free, or would be without the adapters that nobody uses."""
        return not self._room.short(needs, self._held[Holding.IDLE])

    def make_room(self, needs: Needs) -> int:
        """Free places where `has_room`: idle adapters leave that have what is short; return how many."""
        gone = 0
        for other in [other for other in self._entries if other.holding is Holding.IDLE]:
            short = self._room.short(needs)
            if not short:
                break
            if any(other.needs.get(kind, 0) for kind in short):
                self.evict(other)
                gone += 1
        return gone

    def give_places(self, entry: AdapterEntry) -> None:
        """Give an adapter the places that it needs, and that are free."""
        entry.places = self._room.take(entry.needs)
        self._entries[entry] = None

    def evict(self, entry: AdapterEntry) -> None:
        """Take an adapter's places. Steps that read them were launched before any that will overwrite them."""
        self._room.give_back(entry.places)
        entry.places, entry.group, entry.vocab_group = {}, None, None
        del self._entries[entry]
        self.update(entry)

    def touch(self, entry: AdapterEntry) -> None:
        """Take note that an adapter is used, or no longer."""
        if entry in self._entries:
            self._entries.move_to_end(entry)
        self.update(entry)

    def update(self, entry: AdapterEntry) -> None:
        """Count an adapter's places where they belong now."""
        before, entry.holding = entry.holding, entry.now_holding
        if before in self._held:
            self._held[before].subtract(entry.needs)
        if entry.holding in self._held:
            self._held[entry.holding].update(entry.needs)

    def check_integrity(self) -> None:
        """Raise `AssertionError` if a place is lost, someone else's too, or miscounted."""
        self._room.check_integrity(entry.places for entry in self._entries)
        if any(entry.pins < 0 for entry in self._entries):
            raise AssertionError("an adapter was released more often than acquired")
        for holding, counts in self._held.items():
            places = Counter[str]()
            for entry in self._entries:
                places.update(entry.needs if entry.now_holding is holding else {})
            if +counts != +places:
                raise AssertionError(f"places of {holding.name} adapters are counted as {counts}, and are {places}")
