"""What may take the running student's place: a head fitted in closed form, or a tail trained with it, and which of the two goes
before the gate.

The service's runs (`customize`) and the laboratory's (`edgefm.deploy.bench.learner`) both come here; they differ in where the
samples lie. Torch is loaded only to train a tail: loading takes longer than fitting a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..models.head import Head
from ..models.pool import LabelPool
from .config import CustomizationConfig
from .learning import Judgement, fit_closed_form, judge, lowest_risk, newest_and_others

if TYPE_CHECKING:
    from ..models.backbones import Tail

_NONE = np.empty(0, int)


class Samples(Protocol):
    """N samples that the FM has labelled, in order of arrival."""

    @property
    def targets(self) -> np.ndarray:
        """(N, D) float32, the FM's embeddings."""
        ...

    @property
    def weights(self) -> np.ndarray:
        """(N,), see `sample_weights`."""
        ...

    @property
    def features(self) -> np.ndarray:
        """(N, F) float32, of the pretrained backbone."""
        ...

    @property
    def received_at(self) -> np.ndarray:
        """(N,) ascending, of any unit."""
        ...

    def trunk_views(self, rows: np.ndarray, views: int) -> np.ndarray:
        """(len(rows), views, C, h, w) float16 trunk activations; the first view is the sample itself."""
        ...


@dataclass(frozen=True)
class Candidate:
    """Weights that might become a version. `tail`: None is the pretrained."""

    method: str
    judgement: Judgement
    head: Head
    tail: Tail | None


def best_candidate(
    samples: Samples,
    train: np.ndarray,
    held_out: np.ndarray,
    pool: LabelPool,
    backbone: str,
    version0: Head,
    config: CustomizationConfig,
    beside: np.ndarray = _NONE,
) -> Candidate:
    """Of lowest risk on the held-out samples. Equal arguments give equal weights on one machine.

    Args:
        train, held_out, beside: rows of the samples. `beside` teach the tail alone, and do not count towards `tail_from`.
    """
    head = fit_closed_form(
        samples.features[train], samples.targets[train], samples.weights[train], version0, config.prior_samples
    )
    candidates = [Candidate("head", _judge(samples, head(samples.features[held_out]), held_out, pool), head, None)]
    if len(samples.features) - len(beside) >= config.tail_from:
        taught = np.concatenate((newest_and_others(train, samples.received_at[train], config), beside))
        candidates.append(_with_tail(samples, taught, held_out, pool, backbone, head, config))
    return candidates[lowest_risk([candidate.judgement for candidate in candidates])]


def _with_tail(
    samples: Samples,
    taught: np.ndarray,
    held_out: np.ndarray,
    pool: LabelPool,
    backbone: str,
    head: Head,
    config: CustomizationConfig,
) -> Candidate:
    import torch

    from ..models.backbones import Tail
    from .tail_training import embed_with, train_tail

    torch.use_deterministic_algorithms(True)
    # It would fill new memory, which is written anyhow: an eighth of a step, for the same bits.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore
    torch.manual_seed(config.seed)
    if config.threads:
        torch.set_num_threads(config.threads)
    tail, head = train_tail(
        samples.trunk_views(taught, config.views),
        samples.targets[taught],
        samples.weights[taught],
        pool,
        Tail(backbone),
        head,
        config,
    )
    embeddings = embed_with(tail, head, samples.trunk_views(held_out, 1)[:, 0])
    return Candidate("head+tail", _judge(samples, embeddings, held_out, pool), head, tail)


def _judge(samples: Samples, embeddings: np.ndarray, rows: np.ndarray, pool: LabelPool) -> Judgement:
    return judge(embeddings, samples.targets[rows], samples.weights[rows], pool)
