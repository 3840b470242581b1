from __future__ import annotations

import subprocess
import sys

import pytest
from edgefm.deploy.settings import load_config, parse_labels
from edgefm.edge.config import AgentConfig
from edgefm.models.errors import ConfigError


def _edgefm(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgefm.deploy.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_flags_go_over_the_file_over_the_defaults(tmp_path):
    path = tmp_path / "edgefm.toml"
    path.write_text('[agent]\nfps = 5\nenvironment = "yard"\n[agent.switcher]\naudit_share = 0.1\n')
    config = load_config(AgentConfig, "agent", path, {"fps": 7.0, "switcher.accuracy_target": 0.9, "labels": None})
    assert (config.fps, config.environment, config.deadline_ms) == (7.0, "yard", AgentConfig().deadline_ms)
    assert (config.switcher.audit_share, config.switcher.accuracy_target) == (0.1, 0.9)


@pytest.mark.parametrize(
    "text", ["[agent]\nfsp = 5\n", '[agent]\nfps = "fast"\n', "[agent\n", "[agent.switcher]\naudit_share = 2\n"]
)
def test_wrong_settings_are_named(tmp_path, text):
    path = tmp_path / "edgefm.toml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        load_config(AgentConfig, "agent", path, {})


def test_labels_come_from_text_or_file(tmp_path):
    (tmp_path / "labels").write_text("cat\n\ncup of coffee\n")
    assert parse_labels("cat, cup of coffee") == parse_labels(f"@{tmp_path / 'labels'}") == ("cat", "cup of coffee")


def test_errors_are_one_line_with_a_code_of_their_own(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    for code, arguments in (
        (4, ["agent", str(tmp_path / "nowhere")]),
        (4, ["agent", str(empty)]),
        (2, ["agent", str(empty), "--config", str(tmp_path / "none.toml")]),
        (7, ["labels", "list", "--cloud", "127.0.0.1:1"]),
    ):
        ended = _edgefm(*arguments)
        assert ended.returncode == code, ended
        assert ended.stderr.startswith("edgefm: ") and ended.stderr.count("\n") == 1
