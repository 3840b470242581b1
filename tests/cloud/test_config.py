"""Settings that make no sense are refused with their name and value, before anything runs."""

from __future__ import annotations

import pytest
from edgefm.cloud.config import CloudConfig, CustomizationConfig, DriftConfig, LanguageConfig
from edgefm.models.errors import ConfigError


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (CustomizationConfig, "first_at", 0),
        (CustomizationConfig, "views", 0),
        (CustomizationConfig, "epochs", -1),
        (CustomizationConfig, "growth", 0.5),
        (CustomizationConfig, "growth", 1.0),
        (CustomizationConfig, "held_out", 0.0),
        (CustomizationConfig, "held_out", 1.0),
        (CustomizationConfig, "learning_rate", -1e-3),
        (CustomizationConfig, "softness", 0.0),
        (CustomizationConfig, "prior_samples", -1.0),
        (CustomizationConfig, "lambda_mse", float("nan")),
        (DriftConfig, "tolerance", float("nan")),
        (DriftConfig, "least_shift", float("inf")),
        (DriftConfig, "tolerance", -0.5),
        (LanguageConfig, "places", 0),
        (LanguageConfig, "rank_weight", -0.1),
        (LanguageConfig, "rank_weight", float("nan")),
        (CloudConfig, "port", 65_536),
        (CloudConfig, "metrics_port", -1),
    ],
)
def test_what_makes_no_sense_is_refused(kind: type, name: str, value: float):
    with pytest.raises(ConfigError, match=rf"{name}.*{value}"):
        kind(**{name: value})


def test_the_bounds_themselves_are_taken():
    assert CustomizationConfig(first_at=1, views=1, epochs=1, growth=1.01, prior_samples=0.0).views == 1
    assert DriftConfig(tolerance=0.0, least_shift=0.0).tolerance == 0.0
    assert CloudConfig(port=65_535, metrics_port=0).port == 65_535
