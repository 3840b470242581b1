from __future__ import annotations

import pytest
from edgefm.edge.refusals import Refusal, Refusals
from edgefm.models.versions import BlobRef

POOLS = [BlobRef.of("pool.npz", bytes([number])) for number in range(150)]


def refusal(number: int, kind: str = "WORSE") -> Refusal:
    return Refusal.of(POOLS[number], kind, "a reason")  # pyright: ignore[reportArgumentType]


def test_refusals_outlive_the_process_and_damage_is_given_another_chance(tmp_path):
    refusals = Refusals(tmp_path / "refused.json")
    refusals.add(refusal(0))
    refusals.add(refusal(1, "DAMAGED"))
    assert [refusals.refuses(pool) for pool in POOLS[:3]] == [True, True, False]
    again = Refusals(tmp_path / "refused.json")
    assert [again.refuses(pool) for pool in POOLS[:3]] == [True, False, False]


def test_each_is_reported_once(tmp_path):
    refusals = Refusals(tmp_path / "refused.json")
    refusals.add(refusal(0))
    told = refusals.unreported()
    refusals.add(refusal(1))
    refusals.mark_reported(told)
    assert Refusals(tmp_path / "refused.json").unreported() == [refusal(1)]


def test_the_list_is_bounded_and_names_each_once(tmp_path):
    refusals = Refusals(tmp_path / "refused.json")
    for number in [*range(150), 149]:
        refusals.add(refusal(number))
    kept = Refusals(tmp_path / "refused.json").unreported()
    assert kept == [refusal(number) for number in range(50, 150)]


@pytest.mark.parametrize("text", ["", "{", '{"refusals": 3}', '{"other": []}'])
def test_a_damaged_list_is_forgotten_with_a_warning(tmp_path, caplog, text):
    path = tmp_path / "refused.json"
    path.write_text(text)
    refusals = Refusals(path)
    assert "event=refusals_forgotten" in caplog.text and refusals.unreported() == []
    refusals.add(refusal(0))
    assert Refusals(path).refuses(POOLS[0])


def test_a_disk_that_refuses_costs_the_memory_beyond_this_run_only(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    refusals = Refusals(tmp_path / "file" / "refused.json")
    refusals.add(refusal(0))
    assert refusals.refuses(POOLS[0]) and "event=refusals_not_written" in caplog.text


def test_a_refusal_in_words(tmp_path):
    assert str(refusal(0)) == f"pool {POOLS[0].sha256[:16]}: worse: a reason"
    assert (
        str(Refusal(key="k", kind="ROLLED_BACK", reason="r", student_version=0)) == "student version 0: rolled back: r"
    )
