"""Limits of the contract that both ends set explicitly, so that neither relies on a default of its gRPC release."""

from __future__ import annotations

PROTOCOL_VERSION = 1
MAX_IMAGE_BYTES = 8 * 1024 * 1024
"""Largest encoded image; a larger one is refused before it is decoded."""

MAX_MESSAGE_BYTES = MAX_IMAGE_BYTES + 64 * 1024
"""Largest message: an image and its envelope."""

FETCH_CHUNK_BYTES = 32 * 1024
MAX_LABELS_PER_CALL = 10_000
MAX_NAME_LENGTH = 64
MAX_REFUSALS_PER_CALL = 100
MAX_MESSAGES_PER_CALL = 100
"""Of a conversation with the language model."""
MAX_TEXT_LENGTH = 100_000
"""Characters of one of them."""
DEFAULT_PORT = 50061
MAX_PORT = 65_535
PUSHBACK_KEY = "grpc-retry-pushback-ms"
"""Trailing metadata of a refused upload: when to come again."""

CHANNEL_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_reconnect_backoff_ms", 5_000),
]
"""For the device's channels. A dead link is noticed within 40 s even with nothing to send, a living one within 5 s."""

SERVER_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.so_reuseport", 0),
]
"""For the server: a port that is in use is an error, not a silent second server."""
