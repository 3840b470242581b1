"""The wheel carries every tracked file of the packages, and its base install is a device's: no torch."""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("edge", "cloud", "proto", "models", "deploy")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (made,) = out.glob("*.whl")
    return made


def test_the_wheel_has_the_tracked_files_and_no_others(wheel):
    listed = subprocess.run(["git", "ls-files", *FOLDERS], cwd=ROOT, check=True, capture_output=True, text=True)
    tracked = {f"edgefm/{name}" for name in listed.stdout.split() if not name.startswith("deploy/docs/")}
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == tracked


def test_the_base_install_runs_a_device_without_torch(wheel, tmp_path):
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", str(wheel)], check=True, capture_output=True)
    script = (
        "import importlib, pkgutil, sys, edgefm.edge as package\n"
        "for module in pkgutil.walk_packages(package.__path__, 'edgefm.edge.'): importlib.import_module(module.name)\n"
        "assert 'torch' not in sys.modules and importlib.util.find_spec('torch') is None\n"
    )
    subprocess.run([python, "-c", script], check=True, cwd=tmp_path)
    edgefm = tmp_path / "venv" / "bin" / "edgefm"
    helped = subprocess.run([edgefm, "--help"], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert "agent" in helped.stdout
    refused = subprocess.run([edgefm, "cloud"], check=False, capture_output=True, text=True, cwd=tmp_path)
    assert refused.returncode == 3 and "edgefm[cloud]" in refused.stderr
