"""The benchmark of descriptions on a few pictures: every cell is there, and what is scored is what was given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from edgefm.deploy.bench.labels import _other_names, bench_labels
from edgefm.deploy.tiny_imagenet import environments
from edgefm.models.errors import InputError
from rich.console import Console

CLASSES = ("lion", "pizza", "snail")


@pytest.fixture
def data(tmp_path: Path, make_picture) -> Path:
    for number, label in enumerate(CLASSES):
        (tmp_path / "val" / label).mkdir(parents=True)
        for seed in range(2):
            make_picture(10 * number + seed).save(tmp_path / "val" / label / f"{seed}.jpg")
    return tmp_path


def earlier(folder: Path, **changed: list[str]) -> Path:
    names = [*CLASSES, *(_other_names()[label] for label in CLASSES)]
    path = folder / "earlier.json"
    path.write_text(json.dumps({"descriptions": {**{name: [] for name in names}, **changed}}))
    return path


def test_the_other_names_are_of_the_classes_and_none_is_one_of_them():
    found = {label for some in environments() if some.name != "tiny-imagenet-world" for label in some.classes.values()}
    names = _other_names()
    assert set(names) == found and len(set(names.values())) == len(found) == 40
    assert not found & set(names.values())


def test_every_cell_is_scored(data: Path, tmp_path: Path):
    written = earlier(tmp_path, lion=["A lion is a large cat."], snail=["A snail is slow and has a shell."])
    result = bench_labels([data], Path("model.gguf"), written, Console(quiet=True))
    assert [row["names"] for row in result["rows"]] == ["own", "other"]
    own, other = result["rows"]
    assert own["images"] == 6 and (own["labels_described"], other["labels_described"]) == (2, 0)
    systems = {"label alone", "described", "described as another", "templates"}
    for row in result["rows"]:
        assert set(row["scores"]) == systems and "gains" not in row
        for name in systems - {"label alone"}:
            score = row["scores"][name]
            gain = score["accuracy"] - row["scores"]["label alone"]["accuracy"]
            assert score["minus_label_alone"] == pytest.approx(gain, abs=2e-4)
            assert score["interval"][0] <= score["minus_label_alone"] <= score["interval"][1]
        own_weight = row["accuracy_by_weight"]["description"]["0.5"]
        assert own_weight == row["scores"]["described"]["accuracy"]
    assert other["scores"]["described"]["minus_label_alone"] == 0  # nothing describes them
    assert set(result["all"]) == {"all", "own", "other"} and result["descriptions"]["lion"] == [
        "A lion is a large cat."
    ]


def test_other_data_and_other_results_are_refused(data: Path, tmp_path: Path, make_picture):
    (tmp_path / "none.json").write_text("{}")
    with pytest.raises(InputError, match="has no descriptions of all these labels"):
        bench_labels([data], Path("model.gguf"), tmp_path / "none.json", Console(quiet=True))
    (data / "val" / "kettle").mkdir()
    make_picture(99).save(data / "val" / "kettle" / "0.jpg")
    with pytest.raises(InputError, match="no other name is written down for 'kettle'"):
        bench_labels([data], Path("model.gguf"), earlier(tmp_path), Console(quiet=True))
