"""Training the tail of a student's backbone together with its head, by gradient on the whole loss of
`edgefm.cloud.learning`. Needs torch."""

from __future__ import annotations

import numpy as np
import torch

from ..models.backbones import Tail
from ..models.head import Head
from ..models.pool import LabelPool
from ..models.versions import quantise_fp16
from .config import CustomizationConfig

_BATCH = 64
_WARM_UP_STEPS = 20
_HEAD_RATE = 0.1
"""Learning rate of the head against the tail's: it starts at the solution for the features of before."""


def embed_with(tail: Tail, head: Head, activations: np.ndarray) -> np.ndarray:
    """(N, C, h, w) trunk activations -> (N, D) float32, L2-normalised."""
    with torch.no_grad():
        parts = [
            tail(torch.from_numpy(activations[i : i + _BATCH].astype(np.float32))).numpy()
            for i in range(0, len(activations), _BATCH)
        ]
    return head(np.concatenate(parts))


def train_tail(
    views: np.ndarray,
    targets: np.ndarray,
    weights: np.ndarray,
    pool: LabelPool,
    tail: Tail,
    head: Head,
    config: CustomizationConfig,
) -> tuple[Tail, Head]:
    """Trains tail and head together; deterministic for `config.seed`.

    Args:
        views: (N, V, C, h, w) trunk activations of V views of each sample; each epoch takes one view of each at random,
            and all views of a sample have the same target: what the FM said of the sample itself.
        targets: (N, D) float32, FM embeddings.
        weights: (N,) of the samples, of any scale.
        tail: where it starts; changed in place.
        head: where it starts, fitted to that tail's features.

    Returns:
        Both, rounded to fp16 as they will be stored.
    """
    generator = torch.Generator().manual_seed(config.seed)
    tail = tail.to(memory_format=torch.channels_last)  # a fifth faster on one thread
    count, choices = views.shape[:2]
    fm = torch.from_numpy(targets)  # (N, D)
    shares = torch.from_numpy((weights / weights.mean()).astype(np.float32))  # (N,)
    texts = torch.from_numpy(pool.embeddings)  # (K, D)
    tau = config.softness * pool.temperature
    beliefs = torch.softmax(fm @ texts.T / tau, dim=1)  # (N, K)
    weight = torch.from_numpy(head.weight.copy()).requires_grad_()
    bias = torch.from_numpy(head.bias.copy()).requires_grad_()
    optimizer = torch.optim.AdamW(
        [
            {"params": list(tail.parameters()), "lr": config.learning_rate},
            {"params": [weight, bias], "lr": config.learning_rate * _HEAD_RATE},
        ],
        weight_decay=0.0,
    )
    steps = config.epochs * -(-count // _BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / _WARM_UP_STEPS) * 0.5 * (1 + np.cos(np.pi * step / steps))
    )
    for _ in range(config.epochs):
        for batch in torch.randperm(count, generator=generator).split(_BATCH):
            view = torch.randint(choices, (len(batch),), generator=generator).numpy()
            activations = torch.from_numpy(views[batch.numpy(), view].astype(np.float32))  # (b, C, h, w)
            embeddings = torch.nn.functional.normalize(tail(activations) @ weight + bias, dim=1)  # (b, D)
            mse = (embeddings - fm[batch]).square().sum(dim=1)  # (b,)
            contrastive = torch.nn.functional.cross_entropy(
                embeddings @ texts.T / tau, beliefs[batch], reduction="none"
            )
            optimizer.zero_grad()
            (shares[batch] * (config.lambda_mse * mse + contrastive)).mean().backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        for parameter in tail.parameters():
            parameter.copy_(torch.from_numpy(quantise_fp16(parameter.numpy())))
    return tail.to(memory_format=torch.contiguous_format), Head(weight.detach().numpy(), bias.detach().numpy())
