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
SOURCES = [f"edgefm/proto/v1/{name}.proto" for name in ("edgefm", "language")]


def generate(out: Path) -> list[Path]:
    """Writes `NAME_pb2.py`, `NAME_pb2_grpc.py` and their stubs of each contract into `out`; returns the files."""
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
            *SOURCES,
        ]
        subprocess.run(command, check=True)
        out.mkdir(parents=True, exist_ok=True)
        made = sorted((Path(tmp) / SOURCES[0]).parent.iterdir())
        return [Path(shutil.copy(file, out / file.name)) for file in made]


if __name__ == "__main__":
    for written in generate(Path(sys.argv[1])):
        print(written)
