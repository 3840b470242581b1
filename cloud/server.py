"""Wires the service together and runs it until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import signal
from typing import TYPE_CHECKING

import grpc
import grpc.aio
import numpy as np
from grpc_health.v1 import health as grpc_health
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from PIL import Image
from prometheus_client import start_http_server

from ..models.cache import write_atomic
from ..models.errors import ConfigError, EdgeFMError
from ..models.foundation import FoundationModel, load_foundation_model
from ..models.images import encode_jpeg
from ..models.pool import LabelPool
from ..models.students import student_profile
from ..proto.limits import SERVER_OPTIONS
from ..proto.v1 import edgefm_pb2 as pb
from ..proto.v1 import edgefm_pb2_grpc as rpc
from ..proto.v1 import language_pb2 as language_pb
from ..proto.v1 import language_pb2_grpc as language_rpc
from .batcher import DynamicBatcher
from .config import CloudConfig
from .enrichment import Describer
from .environments import Environments
from .health import HealthWatch
from .malformed import MalformedRequests
from .metrics import CloudMetrics
from .recent import RecentAnswers
from .recognition import FmBatcher, Query, preparer, recogniser
from .service import EdgeFMService

if TYPE_CHECKING:  # it needs PyTorch, which a cloud without a language model does not load
    from .language.engine import LanguageEngine

log = logging.getLogger("edgefm.cloud.server")
SERVICE = pb.DESCRIPTOR.services_by_name["EdgeFM"].full_name
LANGUAGE = language_pb.DESCRIPTOR.services_by_name["Language"].full_name
GRACE_S = 2.0
ENRICHMENT = "enrichment"
"""Whose turn a label's description takes at the language model."""


class CloudServer:
    """The cloud FM service in this process and event loop.

    Raises (from `start`):
        ConfigError: an address cannot be bound, or there is no such FM or student.
        ModelError, StoreError: the FM, the store or the registry cannot be opened.
    """

    def __init__(self, config: CloudConfig, describer: Describer | None = None) -> None:
        """`describer`: writes what labels look like; None: the language model does, where one is set."""
        self._config = config
        self._describer = describer
        self._opened = contextlib.AsyncExitStack()
        self.port = 0
        self.metrics_port: int | None = None

    async def start(self) -> None:
        """What a later step fails after is closed again."""
        try:
            await self._start()
        except BaseException:
            await self._opened.aclose()
            raise

    async def stop(self) -> None:
        await self._opened.aclose()

    async def _start(self) -> None:
        config, opened = self._config, self._opened
        student_profile(config.student)  # a misspelt default is an error now, not when the first device comes
        metrics = CloudMetrics()
        if config.metrics_port is not None:
            self.metrics_port = self._serve_metrics(metrics)
        await self._check_port()  # before the FM is loaded

        language = await self._language_engine()
        model = await asyncio.get_running_loop().run_in_executor(None, load_foundation_model, config.foundation_model)
        describer = self._describer
        if describer is None and language is not None:
            from .language.service import describe

            describer = functools.partial(describe, language, owner=ENRICHMENT)
        self.environments = Environments(model, config, describer)
        opened.push_async_callback(self.environments.close)
        await self.environments.start()

        batcher: FmBatcher = DynamicBatcher(
            preparer(model), recogniser(model), config.max_batch, config.max_delay_ms, config.max_queue
        )
        batcher.start()
        opened.push_async_callback(batcher.close)

        canary = Query(encode_jpeg(Image.new("RGB", (64, 64))), _canary_pool(model), 1)
        servicer = grpc_health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue]
        health = HealthWatch(
            ("", SERVICE),
            servicer.set,
            self.environments.keeper,
            batcher,
            canary=lambda: batcher.submit(canary),
            period_s=config.health_period_s,
            language=language,
            language_names=() if language is None else (LANGUAGE,),
        )

        def batch_computed(size: int, seconds: float, error: EdgeFMError | None) -> None:
            metrics.batch_computed(size, seconds)
            health.batch_computed(error)

        batcher.on_batch = batch_computed
        await health.start()
        opened.push_async_callback(health.close)
        metrics.watch(self.environments, batcher, health)

        names, recent = [SERVICE], RecentAnswers()
        server = grpc.aio.server(interceptors=[MalformedRequests((SERVICE, LANGUAGE))], options=SERVER_OPTIONS)
        rpc.add_EdgeFMServicer_to_server(EdgeFMService(self.environments, batcher, health, metrics, recent), server)
        if language is not None:
            from .language.service import LanguageService

            names.append(LANGUAGE)
            language_service = LanguageService(language, self.environments, recent, config.language)
            language_rpc.add_LanguageServicer_to_server(language_service, server)
            metrics.watch_language(language)
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        reflection.enable_server_reflection((*names, grpc_health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        self.port = self._bind(server)
        await server.start()
        opened.push_async_callback(server.stop, GRACE_S)
        opened.push_async_callback(servicer.enter_graceful_shutdown)
        if config.port_file is not None:
            write_atomic(config.port_file, str(self.port).encode())
        log.info(
            "event=serving address=%s:%d fm=%s language=%s data_dir=%s",
            *(config.host, self.port, model.name, config.language.model, config.data_dir),
        )

    async def _language_engine(self) -> LanguageEngine | None:
        if self._config.language.model is None:
            return None

        def load() -> LanguageEngine:
            from .language.load import load_engine  # takes seconds, as the model does

            return load_engine(self._config.language, self._config.data_dir)

        engine = await asyncio.get_running_loop().run_in_executor(None, load)
        engine.start()
        self._opened.push_async_callback(engine.close)
        return engine

    async def _check_port(self) -> None:
        """Binds and lets go: a gRPC server that never starts would keep its port."""
        config = self._config
        try:
            probe = await asyncio.get_running_loop().create_server(
                asyncio.Protocol, config.host.strip("[]"), config.port
            )
        except OSError as error:
            address = f"{config.host}:{config.port}"
            raise ConfigError(
                f"cannot listen on {address}: {error.strerror}; is another cloud running there?"
            ) from error
        probe.close()
        await probe.wait_closed()

    def _bind(self, server: grpc.aio.Server) -> int:
        address = f"{self._config.host}:{self._config.port}"
        try:
            return server.add_insecure_port(address)
        except RuntimeError as error:
            raise ConfigError(f"cannot listen on {address}: {error}; is another cloud running there?") from error

    def _serve_metrics(self, metrics: CloudMetrics) -> int:
        config = self._config
        try:
            http, thread = start_http_server(config.metrics_port or 0, config.metrics_host, metrics.registry)
        except OSError as error:
            address = f"{config.metrics_host}:{config.metrics_port}"
            raise ConfigError(f"cannot serve metrics on {address}: {error.strerror}") from error

        def close() -> None:
            http.shutdown()
            http.server_close()
            thread.join()

        self._opened.callback(close)
        log.info("event=serving_metrics address=%s:%d", config.metrics_host, http.server_port)
        return http.server_port


def _canary_pool(model: FoundationModel) -> LabelPool:
    return LabelPool(("canary",), np.zeros((1, model.dim), np.float32), model.name)


async def serve(config: CloudConfig) -> None:
    """Runs until SIGINT or SIGTERM."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, stopped.set)
    server = CloudServer(config)
    starting = asyncio.create_task(server.start())
    stop = asyncio.create_task(stopped.wait())
    await asyncio.wait((starting, stop), return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        return
    starting.result()
    await stop
    log.info("event=stopping")
    await server.stop()
