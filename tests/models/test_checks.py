"""Checks that both sides share."""

from __future__ import annotations

import pytest
from edgefm.models.checks import check_environment_name, check_target
from edgefm.models.errors import ConfigError, InputError
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


@pytest.mark.parametrize("target", ["127.0.0.1:50061", "cloud.example:1", "[::1]:65535", "dns:///cloud:443"])
def test_an_address_is_host_and_port(target: str):
    assert check_target(target) == target


@pytest.mark.parametrize("target", ["127.0.0.1", "nonsense", ":50061", "host:0", "host:65536", "::1", "host:port", ""])
def test_another_address_is_refused(target: str):
    with pytest.raises(ConfigError, match="host:port"):
        check_target(target)
