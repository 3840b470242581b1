"""The fair queue against the simplest thing that could be right: a list of every owner's items."""

from __future__ import annotations

import numpy as np
import pytest
from edgefm.cloud.fair_queue import FairQueue


def test_random_pushes_pops_and_removals_keep_turns_and_order():
    rng = np.random.default_rng(11)
    queue: FairQueue[int] = FairQueue()
    owners: dict[str, list[int]] = {}  # in order of their next turn
    for item in range(5000):
        action = rng.uniform()
        if action < 0.55:
            owner = str(rng.integers(8))
            queue.push(owner, item)
            owners.setdefault(owner, []).append(item)
        elif owners and action < 0.9:
            owner = next(iter(owners))
            items = owners.pop(owner)
            assert queue.pop() == items.pop(0)
            if items:
                owners[owner] = items
        elif owners:
            owner = list(owners)[rng.integers(len(owners))]
            gone = owners[owner].pop(rng.integers(len(owners[owner])))
            queue.remove(owner, gone)
            if not owners[owner]:
                del owners[owner]
        assert len(queue) == sum(map(len, owners.values()))
        assert all(queue.waiting(str(owner)) == len(owners.get(str(owner), [])) for owner in range(8))
        heaviest, most = queue.heaviest()
        assert most == max(map(len, owners.values()), default=0)
        if most:
            assert len(owners[heaviest]) == most and queue.newest(heaviest) == owners[heaviest][-1]
    assert len(queue) > 100  # it was no walk on an empty queue


def test_an_empty_queue_has_nobody():
    queue: FairQueue[int] = FairQueue()
    assert queue.heaviest() == ("", 0)
    with pytest.raises(KeyError):
        queue.pop()
