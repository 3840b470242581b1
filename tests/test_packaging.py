"""The wheel carries every tracked file of the packages, and its base install is a device's: no torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("edge", "cloud", "proto", "models", "deploy")
NOT_PACKAGED = ("deploy/docs/",)
"""Tracked below the packages' folders, and no part of them."""


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory, tracked) -> Path:
    """Built from a copy of the tracked files: what an earlier build left in the tree stays out of it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), str(source)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (made,) = out.glob("*.whl")
    return made


def test_the_wheel_has_the_tracked_files_and_no_others(wheel, tracked):
    expected = {
        f"edgefm/{name}": (ROOT / name).read_bytes()
        for name in tracked
        if name.startswith(tuple(f"{folder}/" for folder in FOLDERS)) and not name.startswith(NOT_PACKAGED)
    }
    with zipfile.ZipFile(wheel) as archive:
        packed = {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}
    assert packed.keys() == expected.keys()
    assert packed == expected
    for kind in (".py", ".pyi", ".proto", ".npz", ".html", "py.typed"):
        assert any(name.endswith(kind) for name in packed), kind


def test_the_wheel_s_base_dependencies_are_a_device_s(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    needed = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    names = {line.split(";")[0].split(">")[0].split("=")[0].strip() for line in needed}
    assert {"numpy", "onnxruntime", "pillow", "grpcio", "protobuf"} <= names
    assert not names & {"torch", "torchvision", "timm", "open-clip-torch", "transformers", "onnx"}
    assert {"cloud", "demo", "video", "mqtt", "tensorrt", "dev"} <= set(metadata.get_all("Provides-Extra", []))


@pytest.fixture(scope="module")
def device(wheel, tmp_path_factory) -> Path:
    """A fresh environment with the wheel and its base dependencies only; its `bin` folder."""
    folder = tmp_path_factory.mktemp("device")
    venv.create(folder / "venv")
    bin_folder = folder / "venv" / "bin"
    command = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(bin_folder / "python"),
        "install",
        "--quiet",
        "--no-compile",
    ]
    command.append(str(wheel))
    installed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert installed.returncode == 0, installed.stderr
    return bin_folder


def _run(command: list[str | Path], folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs outside the checkout, so that nothing but the installed package can be found."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_a_device_imports_everything_of_the_edge_without_torch(device, tracked, tmp_path):
    script = """
import importlib, importlib.util, pkgutil, sys
import edgefm.edge as package

found = [module.name for module in pkgutil.walk_packages(package.__path__, "edgefm.edge.")]
for name in (*found, "edgefm.deploy.cli", "edgefm.deploy.settings", "edgefm.deploy.device"):
    importlib.import_module(name)
from edgefm.models.students import PROFILES, measured_accuracy
assert all(measured_accuracy(name) for name in PROFILES)
for name in ("torch", "torchvision", "timm", "open_clip", "transformers", "onnx", "cv2", "paho"):
    assert name not in sys.modules and importlib.util.find_spec(name) is None, name
print(package.__file__, *found)
"""
    done = _run([device / "python", "-c", script], tmp_path)
    assert done.returncode == 0, done.stderr
    file, *modules = done.stdout.split()
    assert Path(file).is_relative_to(device.parent)
    files = (Path(name) for name in tracked if name.startswith("edge/") and name.endswith(".py"))
    assert modules == sorted(f"edgefm.edge.{file.stem}" for file in files if file.stem != "__init__")


@pytest.mark.parametrize(
    ("arguments", "says"), [(["--help"], "agent"), (["agent", "--help"], "--accuracy-target"), (["--version"], "0.")]
)
def test_a_device_s_command_line_explains_itself(device, tmp_path, arguments, says):
    done = _run([device / "edgefm", *arguments], tmp_path)
    assert done.returncode == 0 and says in done.stdout and done.stderr == ""


@pytest.mark.parametrize(
    ("command", "extra"),
    [("cloud", "edgefm[cloud]"), ("demo", "edgefm[demo]"), ("students export .", "edgefm[cloud]")],
)
def test_what_needs_more_packages_says_which(device, tmp_path, command, extra):
    done = _run([device / "edgefm", *command.split()], tmp_path)
    assert done.returncode == 3 and done.stdout == ""
    assert extra in done.stderr and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_device_without_cloud_and_state_says_so(device, tmp_path):
    """As far as an agent gets with no cloud: every import of its run has been made."""
    (tmp_path / "images").mkdir()
    script = "from PIL import Image; Image.new('RGB', (8, 8)).save('images/a.png')"
    assert _run([device / "python", "-c", script], tmp_path).returncode == 0
    settings = tmp_path / "edgefm.toml"
    settings.write_text('[agent]\ncloud = "127.0.0.1:1"\nconnect_timeout_s = 0.5\n')
    done = _run([device / "edgefm", "agent", "images", "--config", settings], tmp_path)
    assert done.returncode == 7 and "127.0.0.1:1" in done.stderr, done
