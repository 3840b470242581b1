"""Settings from file and flags."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path

import pytest
from edgefm.cloud.config import CloudConfig, CustomizationConfig
from edgefm.deploy.settings import load_config, parse_labels
from edgefm.edge.config import AgentConfig, SwitcherConfig
from edgefm.models.errors import ConfigError


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
        ("[agent.switcher]\ncaution = -1\n", "caution is a number of standard errors, 0 or more, got -1"),
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


@pytest.mark.parametrize("text", ["[agnt]\nfps = 5\n", "[agent]\nswitcher = 5\n"])
def test_misspelt_sections_and_tables_are_named(tmp_path, text):
    path = tmp_path / "edgefm.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"agnt|switcher"):
        load_config(AgentConfig, "agent", path, {"switcher.accuracy_target": 0.9})
