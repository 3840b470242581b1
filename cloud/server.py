"""Wires the service together and runs it until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import signal
from functools import partial

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from ..models.cache import write_atomic
from ..models.errors import ConfigError
from ..models.foundation import load_foundation_model
from ..models.students import student_profile
from ..proto.limits import SERVER_OPTIONS
from ..proto.v1 import edgefm_pb2 as pb
from ..proto.v1 import edgefm_pb2_grpc as rpc
from .batcher import DynamicBatcher
from .config import CloudConfig
from .environments import Environments
from .service import EdgeFMService, FmBatcher, embed_encoded

log = logging.getLogger("edgefm.cloud.server")
SERVICE = pb.DESCRIPTOR.services_by_name["EdgeFM"].full_name
GRACE_S = 2.0


class CloudServer:
    """The cloud FM service in this process and event loop.

    Raises (from `start`):
        ConfigError: the address cannot be bound, or there is no such FM or student.
        ModelError, StoreError: the FM, the store or the registry cannot be opened.
    """

    def __init__(self, config: CloudConfig) -> None:
        self._config = config
        self.port = 0

    async def start(self) -> None:
        config = self._config
        student_profile(config.student)  # a misspelt default is an error now, not when the first device comes
        model = await asyncio.get_running_loop().run_in_executor(None, load_foundation_model, config.foundation_model)
        self.environments = Environments(model, config)
        await self.environments.start()
        self._batcher: FmBatcher = DynamicBatcher(partial(embed_encoded, model), config.max_batch, config.max_delay_ms)
        self._batcher.start()
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        rpc.add_EdgeFMServicer_to_server(EdgeFMService(self.environments, self._batcher), self._server)
        self._health = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        address = f"{config.host}:{config.port}"
        try:
            self.port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise ConfigError(f"cannot listen on {address}: {error}; is another cloud running there?") from error
        await self._server.start()
        for name in ("", SERVICE):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        if config.port_file is not None:
            write_atomic(config.port_file, str(self.port).encode())
        log.info("event=serving address=%s:%d fm=%s data_dir=%s", config.host, self.port, model.name, config.data_dir)

    async def stop(self) -> None:
        await self._health.enter_graceful_shutdown()
        await self._server.stop(GRACE_S)
        await self._batcher.close()
        await self.environments.close()


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
        return
    starting.result()
    await stop
    log.info("event=stopping")
    await server.stop()
