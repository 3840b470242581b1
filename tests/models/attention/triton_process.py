"""Runs a script on Triton in a process of its own: whether kernels are interpreted must be known before Triton is loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch

ON_GPU = torch.cuda.is_available()


def errors_of(script: str, cases: Sequence[Any]) -> list[list[float]]:
    """What the script prints of the cases; computed by Triton's interpreter where there is no GPU."""
    return json.loads(_printed(script, json.dumps(cases), interpreted=not ON_GPU))


def compiles(script: str) -> bool:
    """Without a GPU too; the script says `compiled` at its end."""
    return _printed(script, interpreted=False).strip() == "compiled"


def _printed(script: str, *arguments: str, interpreted: bool) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-W", "ignore", "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
