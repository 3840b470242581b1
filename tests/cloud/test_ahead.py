from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from edgefm.cloud.ahead import ahead


def test_items_come_in_their_order():
    assert list(ahead(range(100))) == list(range(100)) and list(ahead([None, None])) == [None, None]
    assert not list(ahead([]))


def test_the_next_is_made_while_the_last_is_used():
    made = threading.Event()

    def items() -> Iterator[int]:
        yield 1
        made.set()
        yield 2

    coming = ahead(items())
    assert next(coming) == 1 and made.wait(5)
    assert list(coming) == [2]


def test_an_error_comes_in_place_of_its_item():
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("unreadable")

    coming = ahead(items())
    assert next(coming) == 1
    with pytest.raises(ValueError, match="unreadable"):
        next(coming)


def test_who_stops_early_leaves_no_thread():
    before = threading.active_count()
    coming = ahead(iter(int, 1))
    next(coming)
    coming.close()
    assert threading.active_count() == before
