from __future__ import annotations

import importlib.util
from pathlib import Path

from edgefm.proto import limits

PROTO = Path(__file__).resolve().parents[2] / "proto"


def test_committed_code_is_what_the_contract_generates(tmp_path):
    spec = importlib.util.spec_from_file_location("generate", PROTO / "generate.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.generate(tmp_path)
    assert len(made) == 4
    for file in made:
        assert file.read_bytes() == (PROTO / "v1" / file.name).read_bytes(), f"run `make proto`: {file.name} differs"


def test_a_message_has_room_for_the_largest_image_on_both_ends():
    assert limits.MAX_MESSAGE_BYTES > limits.MAX_IMAGE_BYTES
    for options in (limits.CHANNEL_OPTIONS, limits.SERVER_OPTIONS):
        for direction in ("send", "receive"):
            assert dict(options)[f"grpc.max_{direction}_message_length"] == limits.MAX_MESSAGE_BYTES
