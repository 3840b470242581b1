"""The command line: help and exit codes."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path

import click
import pytest
import typer.main
from edgefm.cloud.config import CloudConfig
from edgefm.deploy.cli import EXIT_CODES, INTERRUPTED, app
from edgefm.edge.config import AgentConfig, SwitcherConfig
from edgefm.models import errors
from edgefm.models.errors import EdgeFMError

NOBODY = "127.0.0.1:1"
ROOT = Path(__file__).parents[2]


# ---- help


def _commands(command: click.Command, path: str = "edgefm") -> Iterator[tuple[str, click.Command]]:
    yield path, command
    for name, sub in getattr(command, "commands", {}).items():
        yield from _commands(sub, f"{path} {name}")


COMMANDS = dict(_commands(typer.main.get_command(app)))


def test_every_command_is_in_the_documentation():
    written = "".join(page.read_text() for page in (ROOT / "README.md", *(ROOT / "deploy" / "docs").glob("*.md")))
    found = [name for name, command in COMMANDS.items() if not hasattr(command, "commands")]
    assert len(found) >= 30
    assert not [name for name in found if name not in written]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_flag_is_explained(name):
    command = COMMANDS[name]
    assert command.help and command.help.strip().endswith(".")
    for parameter in command.params:
        if not getattr(parameter, "hidden", False) and parameter.name != "help":
            assert getattr(parameter, "help", None), f"{name}: {parameter.name} has no help"


NESTED = {"objective", "accuracy_target", "latency_bound_ms", "audit_share"}
FLAG_NAMES = {"fm": "foundation_model"}


@pytest.mark.parametrize(("name", "kind"), [("edgefm cloud", CloudConfig), ("edgefm agent", AgentConfig)])
def test_the_defaults_that_help_shows_are_the_defaults(name, kind):
    def defaults(config: type) -> dict[str, object]:
        return {
            field.name: field.default if field.default is not MISSING else field.default_factory()
            for field in fields(config)
        }

    known = defaults(kind) | (defaults(SwitcherConfig) if kind is AgentConfig else {})
    checked = 0
    for parameter in COMMANDS[name].params:
        shown = re.search(r"\[([^\[\]]+)\]$", getattr(parameter, "help", None) or "")
        field = FLAG_NAMES.get(parameter.name or "", parameter.name or "")
        if shown and field in known and "'" not in shown[1]:
            default = known[field]
            assert not is_dataclass(default)
            assert shown[1] == (f"{default:g}" if isinstance(default, float) else str(default)), field
            checked += 1
    assert checked >= 5


def test_the_command_line_itself_loads_nothing_that_takes_long():
    code = (
        "import sys, edgefm.deploy.cli\n"
        "print([m for m in ('numpy', 'PIL', 'onnxruntime', 'grpc', 'google.protobuf', 'torch') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_is_printed(edgefm):
    for arguments in (["--help"], ["agent", "--help"], ["labels", "--help"], []):
        done = edgefm(*arguments)
        assert "Usage:" in done.stdout + done.stderr, arguments
        assert done.returncode == (0 if arguments else 2)
    top = edgefm("--help").stdout
    assert "Exit codes:" in top
    for word in ("cloud", "agent", "labels", "demo", "rollback"):
        assert re.search(rf"^\s+{word}\s+\w", top, re.MULTILINE), word


def test_version_is_printed(edgefm):
    done = edgefm("--version")
    assert done.returncode == 0 and re.fullmatch(r"edgefm \d+\.\d+\.\d+\S*\n", done.stdout)


# ---- exit codes


def _kinds(kind: type[EdgeFMError]) -> Iterator[type[EdgeFMError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from _kinds(below)


def test_every_error_has_the_code_that_help_promises():
    def code(kind: type[EdgeFMError]) -> int:
        return next(number for parent, number in EXIT_CODES if issubclass(kind, parent))

    families = {"ConfigError": 2, "MissingExtraError": 3, "InputError": 4, "ModelError": 5, "StoreError": 6}
    families |= {"CloudError": 7, "EdgeFMError": 1}
    for kind in _kinds(EdgeFMError):
        if kind.__module__ == errors.__name__:
            (family,) = [parent.__name__ for parent in kind.__mro__ if parent.__name__ in families][:1]
            assert code(kind) == families[family], kind
    promised = {int(number) for number in re.findall(r"\b(\d+) [a-z]", app.info.epilog or "")}
    assert {number for _, number in EXIT_CODES} | {0, INTERRUPTED} <= promised


@pytest.mark.parametrize(
    ("code", "arguments", "says"),
    [
        (4, ["agent", "nowhere"], "nowhere"),
        (4, ["agent", "camera:63"], "cannot open camera:63"),
        (2, ["agent", "images", "--mqtt", "mqtt://host"], "the topic is missing"),
        (2, ["agent", "images", "--mqtt", "mqtt://[::1/topic"], "the host is not an address"),
        (4, ["agent", "rtsp://me:secret@[::1/live"], "cannot open rtsp://..."),
        (2, ["agent", "images", "--fps", "nan"], "fps must be a finite number, got nan"),
        (2, ["agent", "images", "--stride", "2"], "stride"),
        (2, ["agent", "images", "--student", "auto"], "edgefm profile"),
        (2, ["select", "none.json"], "none.json"),
        (2, ["profile", "images", "--frame-size", "640"], "WIDTHxHEIGHT"),
        (2, ["profile", "images", "--latency-ms", "0"], "latency_ms"),
        (4, ["profile", "images"], "edgefm students export"),
        (4, ["agent", "empty"], "empty"),
        (2, ["agent", "images", "--config", "none.toml"], "none.toml"),
        (2, ["agent", "images", "--audit-share", "2"], "audit_share"),
        (2, ["agent", "images", "-e", "../../x"], "an environment's name"),
        (2, ["agent", "images", "-c", "narrow.toml"], "got window 49 and min_evidence 20"),
        (2, ["agent", "images", "-c", "wanting.toml"], "got window 50 and min_evidence 101"),
        (2, ["agent", "images", "--objective", "speed"], "speed"),
        (2, ["agent", "images", "--labels", "@none"], "none"),
        (6, ["agent", "images", "-o", "images/a.jpg/answers"], "images/a.jpg/answers"),
        (7, ["agent", "images", "--cloud", NOBODY, "-c", "fast.toml"], NOBODY),
        (2, ["agent", "images", "--spool-bytes", "0"], "spool_bytes"),
        (4, ["device", "rollback", "--state-dir", "nowhere"], "nowhere"),
        (4, ["device", "rollback", "--state-dir", "empty", "-e", "yard"], "empty is no agent's state folder"),
        (4, ["device", "rollback", "--state-dir", "state", "-e", "yrad"], "has no environment 'yrad'; it has yard"),
        (2, ["device", "rollback", "--state-dir", "state", "-e", "../../x"], "an environment's name"),
        (4, ["device", "purge", "--state-dir", "nowhere"], "nowhere"),
        (7, ["labels", "list", "--cloud", NOBODY], "cloud"),
        (2, ["labels", "describe", "owl", "dog", "--text", "A pet.", "--cloud", NOBODY], "--file alone"),
        (2, ["labels", "describe", "--text", "A pet.", "--cloud", NOBODY], "--file alone"),
        (
            4,
            ["labels", "describe", "--file", "none.txt", "--cloud", NOBODY],
            "cannot read the descriptions in none.txt",
        ),
        (7, ["rollback", "yard", "--cloud", NOBODY], "cloud"),
        (7, ["status", "--cloud", NOBODY], "cloud"),
        (2, ["--log-format", "xml", "status", "--cloud", NOBODY], "'xml'"),
        (2, ["cloud", "--max-queue", "1"], "max_queue"),
        (2, ["cloud", "--port", "0", "--fm", "clip"], "'clip'"),
        (2, ["cloud", "--port", "0", "--config", "cloud.toml"], "max_bach"),
        (5, ["cloud", "--port", "0", "--fm", "openclip:ViT-B-32//none.pt"], "/none.pt"),
        (6, ["bench", "students", "--data", "images", "--json", "images/a.jpg/r.json"], "images/a.jpg/r.json"),
        (4, ["demo", "--data", "nowhere"], "nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_errors_are_one_line_with_a_code_of_their_own(edgefm, tmp_path, image, code, arguments, says):
    (tmp_path / "empty").mkdir()
    (tmp_path / "state" / "environments" / "yard").mkdir(parents=True)
    (tmp_path / "fast.toml").write_text("[agent]\nconnect_timeout_s = 0.3\n")
    (tmp_path / "narrow.toml").write_text("[agent.switcher]\nwindow = 49\nmin_evidence = 20\n")
    (tmp_path / "wanting.toml").write_text("[agent.switcher]\nwindow = 50\nmin_evidence = 101\n")
    (tmp_path / "cloud.toml").write_text("[cloud]\nmax_bach = 3\n")
    ended = edgefm(*arguments, cwd=tmp_path)
    assert ended.returncode == code, ended
    assert ended.stderr.startswith("edgefm: ") and ended.stderr.count("\n") == 1 and says in ended.stderr, ended
    assert ended.stdout == ""
    assert [path.name for path in (tmp_path / "state" / "environments").iterdir()] == ["yard"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["agent"],
        ["agent", "x", "--fpps", "3"],
        ["agent", "x", "--fps", "fast"],
        ["clod"],
        ["labels", "add"],
        ["agent", "x", "--limit", "-1"],
        ["rollback", "yard", "--to", "-1"],
        ["profile", "x", "--threads", "0"],
    ],
)
def test_a_wrong_command_line_is_a_wrong_setting(edgefm, arguments):
    ended = edgefm(*arguments)
    assert ended.returncode == 2 and "Usage:" in ended.stderr and "Traceback" not in ended.stderr


def test_ctrl_c_has_its_code_and_no_traceback(start_process, tmp_path, image):
    (tmp_path / "slow.toml").write_text("[agent]\nconnect_timeout_s = 60\n")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # a cloud that never answers
        port = silent.getsockname()[1]
        command = ("agent", "images", "-c", "slow.toml", "--cloud", f"127.0.0.1:{port}")
        with (tmp_path / "err").open("wb") as err:
            process = start_process(*command, stdout=err, stderr=err, cwd=tmp_path)
        silent.settimeout(60)
        silent.accept()[0].close()  # the agent is up and asks
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        code, said = process.wait(20), (tmp_path / "err").read_text()
    assert code == INTERRUPTED and "Traceback" not in said, (code, said)
