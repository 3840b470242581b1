"""What the rivals that split the FM, or leave it early, learn from the same stream and say of the same images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...cloud.config import CustomizationConfig
from ...cloud.learning import held_out_mask
from ...models.foundation import FoundationModel, load_foundation_model
from ..bench.learner import Place
from .exits import ExitRecording, ExitRule, choose_rule, fit_exits, look, on_device, record, send
from .fm_stages import StageCosts, StagedFM, measure
from .looks import Look, spread
from .study import StudySettings

_REPEATS = 40


@dataclass(frozen=True)
class Rival:
    """Exits taught with the samples of one seed: what they say of the scoring images, and when they answer."""

    recording: ExitRecording
    rule: ExitRule


def teach_rivals(look_at: Look, settings: StudySettings, scoring: int, seeds: int) -> list[Rival]:
    """The rivals of every seed; in a process of its own, on one thread. The samples of a seed are those of `study`."""
    model, most = load_foundation_model("synclip"), max(settings.counts)
    place = Place.open(look_at.data, model, most + settings.evidence)
    fm, chosen = StagedFM(model, 1), spread(len(place.scoring), scoring)
    stream = look(fm, place.stream_under(look_at.condition, most + settings.evidence))
    encoded = place.scoring_under(look_at.condition, chosen.tolist())
    scored, sent = look(fm, encoded), send(fm, encoded)
    rivals = []
    for seed in range(seeds):
        order = np.random.default_rng(seed).permutation(len(stream))
        held_out = held_out_mask(np.arange(most), CustomizationConfig())
        exits = fit_exits(stream.at(order[:most]), held_out, place.pool)
        rule = choose_rule(exits, stream.at(order[most : most + settings.evidence]), place.pool, settings.target)
        rivals.append(Rival(record(exits, scored, sent, place.truth[chosen], place.pool), rule))
    return rivals


def measure_stages(model: FoundationModel, encoded: Sequence[bytes], place: Place) -> StageCosts:
    """What the FM's pieces cost on this machine, with exits of the right size behind them."""
    fm = StagedFM(model, 0)
    samples = look(fm, encoded)
    exits = fit_exits(samples, np.arange(len(encoded)) % 5 == 0, place.pool)
    return measure(fm, encoded, on_device(exits, place.pool), _REPEATS)
