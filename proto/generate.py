"""Regenerates the Python code of the contract: `python proto/generate.py OUT_DIR`.

Needs `grpcio-tools` and `mypy-protobuf` (the `dev` extra pins both, since generated code differs between releases).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
SOURCE = "edgefm/proto/v1/edgefm.proto"


def generate(out: Path) -> list[Path]:
    """Writes `edgefm_pb2.py`, `edgefm_pb2_grpc.py` and their stubs into `out`; returns the files."""
    with tempfile.TemporaryDirectory() as tmp:
        # The plugins of mypy-protobuf lie beside the interpreter, which need not be on PATH.
        plugins = [
            f"--plugin=protoc-gen-{name}={Path(sys.executable).parent / f'protoc-gen-{name}'}"
            for name in ("mypy", "mypy_grpc")
        ]
        outs = [f"--{kind}_out={tmp}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
        command = [
            sys.executable,
            "-m",
            "grpc_tools.protoc",
            f"-Iedgefm/proto={HERE}",
            *plugins,
            *outs,
            SOURCE,
        ]
        subprocess.run(command, check=True)
        out.mkdir(parents=True, exist_ok=True)
        made = sorted((Path(tmp) / SOURCE).parent.iterdir())
        return [Path(shutil.copy(file, out / file.name)) for file in made]


if __name__ == "__main__":
    for written in generate(Path(sys.argv[1])):
        print(written)
