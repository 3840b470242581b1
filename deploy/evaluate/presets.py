"""The experiments by name, in the order of a report."""

from __future__ import annotations

from ...models.errors import ConfigError
from . import bandwidth, crossover, environment_change, latency_accuracy, margins, open_set, students, uploads
from .experiment import Experiment

PRESETS: dict[str, Experiment] = {
    module.EXPERIMENT.name: module.EXPERIMENT
    for module in (environment_change, latency_accuracy, crossover, bandwidth, uploads, students, open_set, margins)
}


def chosen_presets(names: str) -> list[Experiment]:
    """By names separated by commas, or `all`. Raises `ConfigError` for one that there is not."""
    wanted = list(PRESETS) if names == "all" else [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in PRESETS:
            raise ConfigError(f"there is no experiment {name!r}; there are {', '.join(PRESETS)}")
    return [PRESETS[name] for name in dict.fromkeys(wanted)]
