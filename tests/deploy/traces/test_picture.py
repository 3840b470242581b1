"""The picture of a trace."""

from __future__ import annotations

from pathlib import Path

import pytest
from edgefm.deploy.traces import summarize_trace, synthetic_trace, with_outage
from edgefm.deploy.traces.picture import save_picture
from edgefm.models.errors import ConfigError, StoreError
from PIL import Image

TRACE = with_outage(synthetic_trace(7), 20.0, 4.0)
SUMMARY = summarize_trace(TRACE)


def test_a_png_is_readable_in_grey(tmp_path: Path) -> None:
    save_picture(TRACE, SUMMARY, tmp_path / "trace.png")
    with Image.open(tmp_path / "trace.png") as image:
        assert image.width > 900 and image.height > 300
        grey = image.convert("L")
    assert len({level for count, level in grey.getcolors() or [] if count > 400}) >= 3  # ground, filled, lines


def test_an_svg_has_its_axes_units_and_outages_as_text_and_is_the_same_each_time(tmp_path: Path) -> None:
    for name in ("one.svg", "two.SVG"):
        save_picture(TRACE, SUMMARY, tmp_path / name)
    text = (tmp_path / "one.svg").read_text(encoding="utf-8")
    for shown in ("rate (Mbit/s)", "time (s)", "outages", "mean of 500 ms", "95th percentile", "8.5 % of the time"):
        assert shown in text, shown
    assert text == (tmp_path / "two.SVG").read_text(encoding="utf-8")


def test_other_names_and_a_disk_that_refuses(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ends in \.png or \.svg; got .*trace\.gif"):
        save_picture(TRACE, SUMMARY, tmp_path / "trace.gif")
    (tmp_path / "trace.png").mkdir()
    with pytest.raises(StoreError, match="cannot write"):
        save_picture(TRACE, SUMMARY, tmp_path / "trace.png")
