"""Descriptions as a text file: what is printed is what is read, and what is wrong with a file is said."""

from __future__ import annotations

from pathlib import Path

import pytest
from edgefm.deploy.label_file import lines, read
from edgefm.models.errors import InputError


def test_what_is_printed_is_what_is_read(tmp_path: Path):
    written = {"cup of coffee": ["A cup: with a handle.", "# Dark and hot"], "кот": ["Зверь"], "owl": []}
    path = tmp_path / "descriptions.txt"
    path.write_text("\n".join(lines(written)), encoding="utf-8")
    assert read(path) == written


def test_blank_lines_and_any_indentation_will_do(tmp_path: Path):
    path = tmp_path / "descriptions.txt"
    path.write_text("\nowl  \n\n\tA bird. \n  Large eyes\n\nfox")
    assert read(path) == {"owl": ["A bird.", "Large eyes"], "fox": []}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "has no label"),
        (b" \n\n", "has no label"),
        (b"  A bird.\nowl\n", "line 1: a description before the first label"),
        (b"owl\n  A bird.\nfox\nowl\n", "line 4: 'owl' is there twice"),
        (b"\xff\xfe", "cannot read"),
    ],
)
def test_a_file_that_is_wrong_says_where(tmp_path: Path, content, says):
    path = tmp_path / "descriptions.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=says):
        read(path)
    with pytest.raises(InputError, match="cannot read"):
        read(tmp_path / "none.txt")
