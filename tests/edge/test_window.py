from __future__ import annotations

from collections import deque

from edgefm.edge.window import Window
from hypothesis import given
from hypothesis import strategies as st


@given(st.integers(1, 7), st.lists(st.one_of(st.none(), st.tuples(st.floats(-1, 1), st.booleans())), max_size=40))
def test_holds_the_latest_rows(capacity, steps):
    """None clears. The order of the columns is free."""
    window, expected = Window(capacity, 2), deque(maxlen=capacity)
    for step in steps:
        if step is None:
            window.clear()
            expected.clear()
        else:
            window.add(*step)
            expected.append((step[0], float(step[1])))
        assert len(window) == len(expected)
        assert sorted(map(tuple, window.columns.T.tolist())) == sorted(expected)
