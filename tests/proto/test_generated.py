"""The committed code is what the contract generates."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROTO = Path(__file__).resolve().parents[2] / "proto"
WRITTEN_BY_HAND = {"__init__.py", "py.typed", "edgefm.proto", "language.proto"}


def test_committed_code_is_what_the_contract_generates(tmp_path):
    command = [sys.executable, str(PROTO / "generate.py"), str(tmp_path / "v1")]
    done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    made = sorted((tmp_path / "v1").iterdir())
    assert done.stdout.split() == [str(file) for file in made]
    committed = {file.name for file in (PROTO / "v1").iterdir() if file.is_file()} - WRITTEN_BY_HAND
    assert {file.name for file in made} == committed and len(made) == 8
    for file in made:
        assert file.read_bytes() == (PROTO / "v1" / file.name).read_bytes(), f"run `make proto`: {file.name} differs"
