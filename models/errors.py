"""Every error EdgeFM raises on purpose.

    EdgeFMError
    ├── ConfigError          a setting, flag or TOML file is wrong
    │   └── NoLanguageModelError    the cloud runs without one
    ├── MissingExtraError    an optional dependency is not installed
    ├── InputError           what the user or a peer handed in is wrong
    │   ├── EnvironmentMissingError  no device has registered there
    │   ├── ImageError       an image cannot be decoded or is too large
    │   ├── LabelError       a label or a description is empty, overlong, reserved, or given twice
    │   │   ├── LabelExistsError    it is in the pool already
    │   │   └── LabelMissingError   it is not in the pool
    │   └── TraceError       a bandwidth trace is malformed
    ├── ModelError           a model file is missing, corrupt or of the wrong version
    ├── KernelError          compiled kernels cannot be built or loaded here
    ├── StoreError           the disk under the store, registry or state folder fails
    └── CloudError           the cloud cannot be reached or refuses
        ├── DeadlineError    the cloud did not answer in time
        └── OverloadedError  its queue is full; come again after `retry_after_ms`

Foreign errors (grpc, onnxruntime, sqlite3, PIL) are translated once, in the module that calls them. A message says
what was wrong, with which value, and what to do.
"""

from __future__ import annotations

from typing import Literal

UnreadableReason = Literal["empty", "not-an-image", "truncated", "damaged", "too-many-pixels", "cannot-read"]
"""Why a sample could not be read; `cannot-read` is the file system's or the camera's refusal. Counts are kept by it."""


class EdgeFMError(Exception):
    """Base of all deliberate errors; its text is meant for the user."""


class ConfigError(EdgeFMError):
    pass


class NoLanguageModelError(ConfigError):
    pass


class MissingExtraError(EdgeFMError):
    pass


class InputError(EdgeFMError):
    pass


class EnvironmentMissingError(InputError):
    pass


class ImageError(InputError):
    def __init__(self, message: str, reason: UnreadableReason = "damaged") -> None:
        super().__init__(message)
        self.reason: UnreadableReason = reason


class LabelError(InputError):
    pass


class LabelExistsError(LabelError):
    pass


class LabelMissingError(LabelError):
    pass


class TraceError(InputError):
    pass


class ModelError(EdgeFMError):
    pass


class KernelError(EdgeFMError):
    pass


class StoreError(EdgeFMError):
    pass


class CloudError(EdgeFMError):
    pass


class DeadlineError(CloudError):
    pass


class OverloadedError(CloudError):
    def __init__(self, message: str, retry_after_ms: int) -> None:
        super().__init__(message)
        self.retry_after_ms = retry_after_ms


def disk_reason(error: OSError) -> str:
    """Why the system refused a path to be made or written, in words."""
    if isinstance(error, (FileExistsError, NotADirectoryError)):
        return "a part of that path is a file, not a folder"
    return error.strerror or str(error)
