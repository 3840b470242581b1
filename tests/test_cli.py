"""The command line: help, settings from file and flags, and exit codes."""

from __future__ import annotations

import json
import math
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import MISSING, fields, is_dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import click
import pytest
import typer.main
from edgefm.cloud.config import CloudConfig, CustomizationConfig
from edgefm.deploy.cli import EXIT_CODES, INTERRUPTED, app
from edgefm.deploy.settings import load_config, parse_labels
from edgefm.edge.config import AgentConfig, SwitcherConfig
from edgefm.edge.local_state import StateLock
from edgefm.edge.spool import Spool
from edgefm.models import errors
from edgefm.models.errors import ConfigError, EdgeFMError
from edgefm.models.images import encode_jpeg
from jsonschema import Draft202012Validator

NOBODY = "127.0.0.1:1"


def _edgefm(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgefm.deploy.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=cwd)


# ---- settings


@pytest.fixture
def toml(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "edgefm.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_flags_go_over_the_file_over_the_defaults(toml):
    path = toml('[agent]\nfps = 5\nenvironment = "yard"\n[agent.switcher]\naudit_share = 0.1\nwindow = 80\n')
    flags = {"fps": 7.0, "switcher.accuracy_target": 0.9, "switcher.window": 90, "labels": None, "environment": None}
    config = load_config(AgentConfig, "agent", path, flags)
    assert (config.fps, config.environment, config.deadline_ms) == (7.0, "yard", AgentConfig().deadline_ms)
    switcher = config.switcher
    assert (switcher.audit_share, switcher.accuracy_target, switcher.window) == (0.1, 0.9, 90)
    assert switcher.min_evidence == SwitcherConfig().min_evidence


def test_without_file_and_flags_the_defaults_hold():
    assert load_config(AgentConfig, "agent", None, {"fps": None}) == AgentConfig()
    assert load_config(CloudConfig, "cloud", None, {}) == CloudConfig()


def test_flags_that_are_zero_or_empty_count(toml):
    path = toml("[agent]\nfps = 5\nlabels = ['cat']\n[agent.switcher]\naudit_share = 0.5\n")
    config = load_config(AgentConfig, "agent", path, {"fps": 0.0, "switcher.audit_share": 0.0, "labels": ()})
    assert (config.fps, config.switcher.audit_share, config.labels) == (0.0, 0.0, ())


def test_one_file_serves_cloud_and_agent(toml):
    path = toml(
        '[cloud]\ndata_dir = "/srv/edgefm"\nlabels = ["cat", "猫"]\n[cloud.customization]\nfirst_at = 50\n'
        '[agent]\nupload = "never"\n'
    )
    cloud, agent = (
        load_config(kind, name, path, {}) for kind, name in ((CloudConfig, "cloud"), (AgentConfig, "agent"))
    )
    assert cloud.data_dir == Path("/srv/edgefm") and cloud.labels == ("cat", "猫")
    assert cloud.customization == CustomizationConfig(first_at=50)
    assert agent == AgentConfig(upload="never")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[agent]\nfsp = 5\n", r"edgefm\.toml: \[agent\] has no setting 'fsp'; there are .*fps"),
        ("[agent.switcher]\nfoo = 5\n", r"\[agent\.switcher\] has no setting 'foo'; there are accuracy_target"),
        ("[agent]\naccuracy_target = 0.9\n", r"\[agent\] has no setting 'accuracy_target'"),
        ('[agent]\nfps = "fast"\n', r"agent\.fps: .*valid number.* \(got 'fast'\)"),
        ('[agent]\nupload = "some"\n', r"agent\.upload: .*'never', 'uncertain' or 'all'.* \(got 'some'\)"),
        ('[agent.switcher]\nobjective = "speed"\n', r"agent\.switcher\.objective: .*'accuracy_target' or"),
        ("[agent]\nswitcher = 5\n", r"agent\.switcher: .*\(got 5\)"),
        ("[agent.switcher]\naudit_share = 2\n", r"audit_share is a share in \[0, 1\], got 2"),
        ("[agent]\ndeadline_ms = 0\n", "deadline_ms .* must be positive"),
        ("[agent]\nfps = nan\n", "fps must be a finite number, got nan"),
        ("[agent.switcher]\nlatency_bound_ms = inf\n", "latency_bound_ms must be a finite number, got inf"),
        ("agent = 5\n", r"\[agent\] must be a table"),
        ("[agent\n", r"edgefm\.toml is not valid TOML"),
    ],
)
def test_wrong_settings_are_named(toml, text, message):
    with pytest.raises(ConfigError, match=message):
        load_config(AgentConfig, "agent", toml(text), {})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", [AgentConfig, SwitcherConfig, CloudConfig, CustomizationConfig])
def test_no_float_setting_takes_what_is_no_number(kind, value):
    names = [field.name for field in fields(kind) if isinstance(field.default, float)]
    assert names
    for name in names:
        with pytest.raises(ConfigError, match=f"{name} must be a finite number, got {value}"):
            kind(**{name: value})


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "latin.toml").write_bytes(b'[agent]\nenvironment = "caf\xe9"\n')
    for path, message in (
        (tmp_path / "none.toml", r"none\.toml: No such file"),
        (tmp_path, "cannot read the settings"),
        (tmp_path / "latin.toml", r"latin\.toml is not valid TOML"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(AgentConfig, "agent", path, {})


def test_labels_come_from_text_or_file(tmp_path):
    (tmp_path / "labels").write_text("cat\n\n cup of coffee \n猫\n", encoding="utf-8")
    assert parse_labels("cat, cup of coffee,,猫,") == parse_labels(f"@{tmp_path / 'labels'}")
    assert parse_labels("cat, cup of coffee") == ("cat", "cup of coffee")
    assert parse_labels(None) is None and parse_labels("") == ()
    with pytest.raises(ConfigError, match=r"cannot read the labels from .*none"):
        parse_labels(f"@{tmp_path / 'none'}")


# ---- help


def _commands(command: click.Command, path: str = "edgefm") -> Iterator[tuple[str, click.Command]]:
    yield path, command
    for name, sub in getattr(command, "commands", {}).items():
        yield from _commands(sub, f"{path} {name}")


COMMANDS = dict(_commands(typer.main.get_command(app)))


def test_the_commands_are_these():
    assert {name for name, command in COMMANDS.items() if not hasattr(command, "commands")} == {
        f"edgefm {name}"
        for name in (
            "cloud",
            "agent",
            "demo",
            "replay",
            "evaluate",
            "report",
            "rollback",
            "device rollback",
            "device purge",
            "status",
            "labels list",
            "labels add",
            "labels remove",
            "bench students",
            "bench learning",
            "bench returning",
            "bench easy",
            "bench agent",
            "bench service",
            "bench memory",
            "bench link",
            "bench soak",
            "students export",
            "profile",
            "select",
            "trace info",
            "trace convert",
            "data tiny-imagenet",
        )
    }


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


def test_help_is_printed():
    for arguments in (["--help"], ["agent", "--help"], ["labels", "--help"], []):
        done = _edgefm(*arguments)
        assert "Usage:" in done.stdout + done.stderr, arguments
        assert done.returncode == (0 if arguments else 2)
    top = _edgefm("--help").stdout
    assert "Exit codes:" in top
    for word in ("cloud", "agent", "labels", "demo", "rollback"):
        assert re.search(rf"^\s+{word}\s+\w", top, re.MULTILINE), word


def test_version_is_printed():
    done = _edgefm("--version")
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


@pytest.fixture
def image(tmp_path, make_picture) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(encode_jpeg(make_picture(0)))
    return folder


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
        (7, ["rollback", "yard", "--cloud", NOBODY], "cloud"),
        (7, ["status", "--cloud", NOBODY], "cloud"),
        (2, ["--log-format", "xml", "status", "--cloud", NOBODY], "'xml'"),
        (2, ["cloud", "--max-queue", "1"], "max_queue"),
        (2, ["cloud", "--port", "0", "--fm", "clip"], "'clip'"),
        (2, ["cloud", "--port", "0", "--config", "cloud.toml"], "max_bach"),
        (5, ["cloud", "--port", "0", "--fm", "openclip:ViT-B-32//none.pt"], "/none.pt"),
        (6, ["bench", "students", "--data", "nowhere", "--json", "images/a.jpg/r.json"], "images/a.jpg/r.json"),
        (4, ["demo", "--data", "nowhere"], "nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_errors_are_one_line_with_a_code_of_their_own(tmp_path, image, code, arguments, says):
    (tmp_path / "empty").mkdir()
    (tmp_path / "state" / "environments" / "yard").mkdir(parents=True)
    (tmp_path / "fast.toml").write_text("[agent]\nconnect_timeout_s = 0.3\n")
    (tmp_path / "narrow.toml").write_text("[agent.switcher]\nwindow = 49\nmin_evidence = 20\n")
    (tmp_path / "wanting.toml").write_text("[agent.switcher]\nwindow = 50\nmin_evidence = 101\n")
    (tmp_path / "cloud.toml").write_text("[cloud]\nmax_bach = 3\n")
    ended = _edgefm(*arguments, cwd=tmp_path)
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
def test_a_wrong_command_line_is_a_wrong_setting(arguments):
    ended = _edgefm(*arguments)
    assert ended.returncode == 2 and "Usage:" in ended.stderr and "Traceback" not in ended.stderr


def test_ctrl_c_has_its_code_and_no_traceback(tmp_path, image):
    (tmp_path / "slow.toml").write_text("[agent]\nconnect_timeout_s = 60\n")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # a cloud that never answers
        port = silent.getsockname()[1]
        command = [sys.executable, "-m", "edgefm.deploy.cli", "agent", "images", "-c", "slow.toml"]
        command += ["--cloud", f"127.0.0.1:{port}"]
        with subprocess.Popen(
            command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            silent.settimeout(60)
            silent.accept()[0].close()  # the agent is up and asks
            time.sleep(0.3)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=20)
    assert process.returncode == INTERRUPTED and "Traceback" not in err, (process.returncode, out, err)


# ---- a real cloud, a real agent


class _Stalling(BaseHTTPRequestHandler):
    """A network camera that sends one picture in a hundred copies, and then nothing more."""

    picture = b""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(self.picture)}\r\n\r\n".encode()
        self.wfile.write((head + self.picture + b"\r\n") * 100)
        self.rfile.read()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def stalling_stream(make_picture) -> Iterator[str]:
    _Stalling.picture = encode_jpeg(make_picture(0))
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Stalling)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/live"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_signal_ends_a_run_cleanly(start_cloud, stalling_stream, tmp_path, image):
    cloud = start_cloud("--labels", "tabby cat, dog", "--student", "lite0-64")
    (image / "list.txt").write_text("a.jpg\n" * 1000)
    for number, source, code in (
        (signal.SIGINT, str(image / "list.txt"), INTERRUPTED),
        (signal.SIGTERM, stalling_stream, 0),
    ):
        answers = tmp_path / f"{code}.jsonl"
        command = [sys.executable, "-m", "edgefm.deploy.cli", "agent", source, "--fps", "20", "-o", str(answers)]
        command += ["--cloud", cloud.target]
        with subprocess.Popen(
            command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            deadline = time.monotonic() + 60
            while not answers.exists() or not answers.read_text():
                assert process.poll() is None and time.monotonic() < deadline, process.communicate()
                time.sleep(0.05)
            process.send_signal(number)
            out, err = process.communicate(timeout=30)
        assert process.returncode == code and "Traceback" not in err, (process.returncode, out, err)
        summary = json.loads(out)
        assert 0 < summary["frames"] == len(answers.read_text().splitlines()) < 1000


def test_labels_and_an_agent_from_the_command_line(start_cloud, make_broker, tmp_path, image, make_picture):
    cloud = start_cloud("--labels", "tabby cat, dog", "--student", "lite0-64")
    for seed in range(1, 4):
        (image / f"{seed}.jpg").write_bytes(encode_jpeg(make_picture(seed)))

    def labels(*arguments: str) -> subprocess.CompletedProcess[str]:
        return _edgefm("labels", *arguments, "--cloud", cloud.target)

    assert labels("list").stdout.splitlines() == ["tabby cat", "dog"]
    config = tmp_path / "agent.toml"
    config.write_text(f'[agent]\ncloud = "{cloud.target}"\nenvironment = "nowhere"\nfps = 50\n')
    (image / "list.txt").write_text("1.jpg\ngone.jpg\n2.jpg\n3.jpg\na.jpg\n")
    source = [image / "list.txt", "--limit", "4"]
    ran = _edgefm("agent", *source, "-c", config, "-e", "yard", "-o", "out/answers.jsonl", cwd=tmp_path)
    assert ran.returncode == 0, ran
    summary = json.loads(ran.stdout)
    assert summary["frames"] == 4 and summary["unreadable_by_reason"] == {"cannot-read": 1}
    assert 'event=unreadable sample=gone.jpg reason=cannot-read detail="cannot read ' in ran.stderr
    answers = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    schema = Draft202012Validator(json.loads(_edgefm("agent", "--schema").stdout))
    for answer in answers:
        schema.validate(answer)
    assert len(answers) == 3 and {answer["environment"] for answer in answers} == {"yard"}  # the flag over the file

    broker = make_broker()
    broker.start()
    mqtt = ["--mqtt", f"mqtt://127.0.0.1:{broker.port}/yard"]
    ran = _edgefm("agent", image, "-c", config, "-e", "yard", "--limit", "2", *mqtt, cwd=tmp_path)
    assert json.loads(ran.stdout)["mqtt_published"] == 2, ran
    assert not (tmp_path / "answers.jsonl").exists()  # no file unless one is asked for

    costs = {"threads": 1, "preprocess_ms": 1, "session_p50_ms": 2, "session_p95_ms": 3, "peak_rss_mb": 150}
    costs |= {"student": "lite0-96"}
    (tmp_path / "device.json").write_text(json.dumps({"source": "by hand", "device": "x", "students": [costs]}))
    shown = _edgefm("select", tmp_path / "device.json", "--latency-ms", "4")
    assert shown.returncode == 0 and "taken" in shown.stdout, shown
    refused = _edgefm("select", tmp_path / "device.json", "--latency-ms", "3.9")
    assert refused.returncode == 2 and "no student fits 3.9 ms a frame" in refused.stderr, refused
    auto = ["--student", "auto", "--device-profile", "device.json", "--state-dir", "auto", "-e", "auto"]
    ran = _edgefm("agent", image, "-c", config, *auto, "--limit", "1", cwd=tmp_path)
    assert ran.returncode == 0, ran
    manifest = json.loads((tmp_path / "auto" / "environments" / "auto" / "student.json").read_text())
    assert manifest["profile"] == "lite0-96"  # the cloud's default is another
    state = [tmp_path / "auto", "--threads", "1", "--runs", "20", "--frame-size", "64x64", "-o", "measured.json"]
    measured = _edgefm("profile", *state, cwd=tmp_path)
    assert measured.returncode == 0 and "taken: the" in measured.stdout, measured
    found = json.loads((tmp_path / "measured.json").read_text())
    assert [cost["student"] for cost in found["students"]] == ["lite0-96"]

    added = labels("add", "owl", "quantum entanglement", "-e", "yard")
    assert added.returncode == 0 and added.stdout.startswith("4 labels, pool ")
    assert added.stderr.startswith("warning: 'quantum entanglement' is out of") and added.stderr.count("\n") == 1
    assert labels("list", "-e", "yard").stdout.splitlines() == ["tabby cat", "dog", "owl", "quantum entanglement"]
    assert labels("list").stdout.splitlines() == ["tabby cat", "dog"]
    for code, arguments, says in (
        (4, ["add", "owl", "-e", "yard"], "owl"),
        (4, ["remove", "fox", "-e", "yard"], "fox"),
        (4, ["add", " ", "-e", "yard"], "non-empty"),
    ):
        refused = labels(*arguments)
        assert refused.returncode == code and says in refused.stderr and refused.stderr.startswith("edgefm: "), refused
    assert labels("remove", "dog", "-e", "yard").stdout.startswith("3 labels, pool ")
    state = tmp_path / "edgefm-agent"
    with closing(Spool(state, 10**6, 10**6)) as spool:
        spool.add("yard", b"waits", 0.1, 1.0, time.time())
    lock = StateLock(state)
    busy = _edgefm("device", "purge", "--state-dir", state)
    assert busy.returncode == 6 and "another agent is using" in busy.stderr, busy
    lock.release()
    assert _edgefm("device", "purge", "--state-dir", state).stdout == "1 waiting samples deleted\n"
    stay = _edgefm("device", "rollback", "--state-dir", state, "-e", "yard")
    assert stay.returncode == 4 and "holds no earlier student" in stay.stderr, stay
    back = _edgefm("rollback", "yard", "--cloud", cloud.target)
    assert back.returncode == 4 and back.stderr.startswith("edgefm: "), back  # version 0 has no parent


@pytest.mark.parametrize("text", ["[agnt]\nfps = 5\n", "[agent]\nswitcher = 5\n"])
def test_misspelt_sections_and_tables_are_named(tmp_path, text):
    path = tmp_path / "edgefm.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"agnt|switcher"):
        load_config(AgentConfig, "agent", path, {"switcher.accuracy_target": 0.9})
