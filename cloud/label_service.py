"""The calls with which an operator edits labels and their descriptions."""

from __future__ import annotations

from collections.abc import AsyncIterator

from ..models.errors import InputError, LabelError, LabelMissingError
from ..models.pool import LabelPool
from ..proto.v1 import edgefm_pb2 as pb
from ..proto.v1 import edgefm_pb2_grpc as rpc
from .environments import Environments
from .label_pools import BASE
from .wire import Context, abort, check_count, translated


class LabelService(rpc.EdgeFMServicer):
    """Part of the service; see `proto/v1/edgefm.proto` for what each call promises."""

    def __init__(self, environments: Environments) -> None:
        self._environments = environments

    async def ListLabels(self, request: pb.ListLabelsRequest, context: Context) -> pb.LabelPool:  # noqa: N802
        try:
            if not request.environment and not self._environments.has_base:
                return pb.LabelPool()
            return self._message(request.environment, self._environments.pool(request.environment or BASE)[0])
        except InputError as error:
            await abort(context, error)

    async def AddLabels(self, request: pb.AddLabelsRequest, context: Context) -> pb.LabelPool:  # noqa: N802
        await check_count(request.labels, context)
        describe = request.describe if request.HasField("describe") else None
        change = self._environments.add_labels(request.environment or BASE, request.labels, describe)
        return self._message(request.environment, await translated(change, context))

    async def RemoveLabels(self, request: pb.RemoveLabelsRequest, context: Context) -> pb.LabelPool:  # noqa: N802
        await check_count(request.labels, context)
        change = self._environments.remove_labels(request.environment or BASE, request.labels)
        return self._message(request.environment, await translated(change, context))

    async def DescribeLabels(  # noqa: N802
        self, request: pb.DescribeLabelsRequest, context: Context
    ) -> pb.LabelPool:
        await check_count(request.labels, context)
        name = request.environment or BASE
        await translated(self._environments.enrichment.ask(name, request.labels), context)
        return self._message(request.environment, self._environments.pool(name)[0])

    async def SetDescriptions(  # noqa: N802
        self, request: pb.SetDescriptionsRequest, context: Context
    ) -> pb.LabelPool:
        await check_count(request.labels, context)
        given = {each.label: tuple(each.texts) for each in request.labels}
        if len(given) < len(request.labels):
            await abort(
                context, LabelError("a label is described twice in one call; give all its descriptions at once")
            )
        change = self._environments.set_descriptions(request.environment or BASE, given)
        return self._message(request.environment, await translated(change, context))

    async def ListDescriptions(  # noqa: N802
        self, request: pb.ListDescriptionsRequest, context: Context
    ) -> AsyncIterator[pb.LabelDescriptions]:
        name, label = request.environment or BASE, " ".join(request.label.split())
        try:
            pool = self._environments.pool(name)[0]
            if label and label not in pool.labels:
                raise LabelMissingError(f"not in the pool of {name}: {label}")
        except InputError as error:
            await abort(context, error)
        enrichment = self._environments.enrichment
        waiting = enrichment.waiting(name)
        for each in (label,) if label else pool.labels:
            yield pb.LabelDescriptions(
                label=each,
                texts=pool.descriptions.get(each, ()),
                pending=each in waiting,
                failure=enrichment.failure(name, each),
            )

    def _message(self, environment: str, pool: LabelPool) -> pb.LabelPool:
        return pb.LabelPool(
            environment=environment,
            pool_version=pool.version,
            labels=pool.labels,
            warnings=pool.warnings,
            described=len(pool.descriptions),
            pending=len(self._environments.enrichment.waiting(environment or BASE)),
        )
