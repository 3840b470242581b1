"""A queue that owners share: each owner's items in order, the owners in turn."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

Item = TypeVar("Item", bound=Hashable)


class FairQueue(Generic[Item]):
    """Round robin by item: an owner with a thousand waiting gets no more turns than an owner with one.

    Every operation takes constant time but `heaviest`, which looks at all owners.
    """

    def __init__(self) -> None:
        self._owners: OrderedDict[str, OrderedDict[Item, None]] = OrderedDict()  # in order of their next turn
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def waiting(self, owner: str) -> int:
        return len(self._owners.get(owner, ()))

    def push(self, owner: str, item: Item) -> None:
        self._owners.setdefault(owner, OrderedDict())[item] = None
        self._size += 1

    def pop(self) -> Item:
        """The oldest item of the owner whose turn it is; `KeyError` when nothing waits."""
        owner, items = self._owners.popitem(last=False)
        item, _ = items.popitem(last=False)
        if items:
            self._owners[owner] = items  # its next turn is the last
        self._size -= 1
        return item

    def remove(self, owner: str, item: Item) -> None:
        items = self._owners[owner]
        del items[item]
        if not items:
            del self._owners[owner]
        self._size -= 1

    def heaviest(self) -> tuple[str, int]:
        """The owner with the most items, and how many; nobody has none."""
        return max(((owner, len(items)) for owner, items in self._owners.items()), key=lambda x: x[1], default=("", 0))

    def newest(self, owner: str) -> Item:
        return next(reversed(self._owners[owner]))
