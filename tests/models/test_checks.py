"""Checks that both sides share."""

from __future__ import annotations

import pytest
from edgefm.models.checks import check_environment_name
from edgefm.models.errors import InputError
from edgefm.proto.limits import MAX_NAME_LENGTH

LONGEST = "x" * MAX_NAME_LENGTH


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "a\\b", ".hidden", f"{LONGEST}x", "a\n", "a b", "é", "a\0"]
)
def test_names_that_could_leave_a_folder_are_refused(name: str):
    with pytest.raises(InputError, match="environment's name"):
        check_environment_name(name)


@pytest.mark.parametrize("name", ["a", "Yard_2.north-east", "0", LONGEST])
def test_ordinary_names_are_taken(name: str):
    assert check_environment_name(name) == name
