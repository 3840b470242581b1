"""The same FM behind LitServe, as its documentation would have it; started as `python -m` by the service benchmark.

One worker (EdgeFM's cloud has one FM), batches as large and waiting as long as EdgeFM's, ZeroMQ between HTTP server and worker
(`fast_queue`, LitServe's own advice for many requests). A POST's body is the encoded image. Decoding, preprocessing,
embedding and the comparison with the pool are EdgeFM's own functions; that they run one after another in the worker is
LitServe's design.
"""

# No `annotations` from __future__: FastAPI reads those of `decode_request`.

import sys
from collections.abc import Sequence
from typing import Annotated

import litserve
from fastapi import Body

from ...cloud.config import CloudConfig
from ...cloud.recognition import Prepared, Query, Recognised, preparer, recogniser
from ...models.foundation import build_pool, load_foundation_model

TOP_K = 5


class FmApi(litserve.LitAPI):
    """The FM's answer to an image: the best labels and their similarities."""

    def __init__(self, fm: str, labels: Sequence[str], config: CloudConfig) -> None:
        super().__init__(max_batch_size=config.max_batch, batch_timeout=config.max_delay_ms / 1e3)
        self._labels = tuple(labels)
        self._fm = fm

    def setup(self, device: str) -> None:
        model = load_foundation_model(self._fm)
        self._pool = build_pool(model, self._labels)
        self._prepare, self._recognise = preparer(model), recogniser(model)

    def decode_request(self, request: Annotated[bytes, Body(media_type="application/octet-stream")]) -> Prepared:  # pyright: ignore
        return self._prepare(Query(request, self._pool, TOP_K))

    def predict(self, x: list[Prepared]) -> list[Recognised]:  # pyright: ignore
        return self._recognise(x)

    def encode_response(self, output: Recognised) -> dict[str, object]:  # pyright: ignore
        labels = [output.pool.labels[index] for index in output.indices]
        return {"label": labels[0], "labels": labels, "similarities": output.similarities.tolist()}


def main() -> None:
    """Arguments: the port, the FM, then the labels."""
    port, fm, *labels = sys.argv[1:]
    server = litserve.LitServer(FmApi(fm, labels, CloudConfig()), accelerator="cpu", devices=1, fast_queue=True)
    server.run(host="127.0.0.1", port=int(port), num_api_servers=1, generate_client_file=False, log_level="warning")


if __name__ == "__main__":
    main()
