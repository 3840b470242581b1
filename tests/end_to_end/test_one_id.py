"""Two agents by one name, at once and in one environment: a cloned card, or a device replaced and not switched off."""

from __future__ import annotations

import json
from pathlib import Path

import grpc
from edgefm.models.images import encode_jpeg
from edgefm.proto.v1 import edgefm_pb2 as pb
from edgefm.proto.v1 import edgefm_pb2_grpc as rpc

FRAMES = 80


def test_both_are_answered_each_with_its_own(start_cloud, start_process, make_picture, tmp_path: Path):
    cloud = start_cloud("--labels", "cat, rocket, daisy, cup", "--student", "lite0-64")
    agents = []
    for name, first in (("one", 0), ("two", 1000)):
        folder = tmp_path / name
        (folder / "pictures").mkdir(parents=True)
        for number in range(FRAMES):
            (folder / "pictures" / f"{name}-{number}.jpg").write_bytes(encode_jpeg(make_picture(first + number)))
        command = ["agent", folder / "pictures", "-o", folder / "answers.jsonl", "--cloud", cloud.target]
        command += ["--device-id", "twin", "--environment", "yard", "--deadline-ms", "20000", "--fps", "40"]
        with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
            agents.append(start_process(*command, "--state-dir", folder / "state", stdout=out, stderr=err))
    assert [agent.wait(120) for agent in agents] == [0, 0]
    summaries = [json.loads((tmp_path / name / "out").read_text()) for name in ("one", "two")]
    with grpc.insecure_channel(cloud.target) as channel:
        stub = rpc.EdgeFMStub(channel)
        for name, summary in zip(("one", "two"), summaries, strict=True):
            lines = (tmp_path / name / "answers.jsonl").read_text().splitlines()
            answers = {record["sample_id"]: record for record in map(json.loads, lines)}
            assert answers.keys() == {f"{name}-{number}.jpg" for number in range(FRAMES)}
            # A new student's answers come from the FM; where the link is slow for a moment, the sample is uploaded later.
            assert summary["frames"] == summary["cloud"] + summary["fallback"] == FRAMES
            assert summary["cloud"] > FRAMES / 2
            told = {sample: record for sample, record in answers.items() if record["route"] == "cloud"}
            # Asked again, one by one, the FM says of each picture what its own agent was told.
            for sample_id, record in told.items():
                image = (tmp_path / name / "pictures" / sample_id).read_bytes()
                query = pb.RecognizeRequest(query_id=1, environment="yard", image=image)
                (alone,) = stub.Recognize(iter([query]), timeout=60)
                assert record["label"] == ("unknown" if alone.unknown else alone.matches[0].label)
                assert abs(record["similarity"] - alone.matches[0].similarity) < 1e-3
        (status,) = stub.Status(pb.StatusRequest(environment="yard"), timeout=60).environments
    left = sum(summary["uploads_left"] for summary in summaries)
    assert status.samples_stored + left == 2 * FRAMES  # none was taken for the other's
