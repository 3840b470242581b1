from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing

import numpy as np
import pytest
from edgefm.edge.spool import DAY_S, SPOOL_FILE, Spool
from edgefm.models.errors import StoreError
from hypothesis import given, settings
from hypothesis import strategies as st

NOW = 20_500 * DAY_S + 100.0  # in 2026


def image(seed: int, size: int = 1000) -> bytes:
    return np.random.default_rng(seed).bytes(size)


@pytest.fixture
def open_spool(tmp_path):
    spools = []

    def make(max_bytes: int = 10**9, retention_s: float = 30 * DAY_S) -> Spool:
        spools.append(Spool(tmp_path, max_bytes, retention_s))
        return spools[-1]

    yield make
    for spool in spools:
        spool.close()


def waiting(spool: Spool, environment: str = "yard") -> list[bytes]:
    return [sample.image for sample in spool.batch(environment, 10_000, 10**9, None)]


def test_what_waits_comes_back_in_another_life_the_most_uncertain_first(open_spool):
    spool = open_spool()
    for seed, margin in enumerate([0.3, 0.1, 0.2]):
        spool.add("yard", image(seed), margin, 0.02 if seed == 1 else 1.0, NOW)
    spool.add("street", image(9), 0.0, 1.0, NOW)
    spool.close()
    again = open_spool()
    assert waiting(again) == [image(1), image(2), image(0)] and waiting(again, "street") == [image(9)]
    assert [s.propensity for s in again.batch("yard", 2, 10**9, None)] == [0.02, 1.0]
    assert (again.count("yard"), again.count()) == (3, 4) and (again.dropped, again.expired) == (0, 0)


def test_content_that_waits_already_is_not_stored_twice(open_spool):
    spool = open_spool()
    for _ in range(3):
        spool.add("yard", image(0), 0.5, 1.0, NOW)
    spool.add("street", image(0), 0.5, 1.0, NOW)
    assert (spool.count("yard"), spool.count("street"), spool.dropped) == (1, 1, 0)
    (sample,) = spool.batch("yard", 10, 10**9, None)
    spool.settle([sample.id], [], 0, NOW)
    spool.add("yard", image(0), 0.5, 1.0, NOW)  # acknowledged, and seen again
    assert spool.count("yard") == 1


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 5)), max_size=30), st.integers(1, 100))
def test_past_the_bound_the_most_certain_go(tmp_path_factory, samples, bound):
    spool = Spool(tmp_path_factory.mktemp("spool"), bound, DAY_S)
    kept: list[tuple[int, int]] = []  # (margin, number)
    for number, (size, margin) in enumerate(samples):
        spool.add("yard", number.to_bytes(2, "big") * 20 + bytes(size), margin, 1.0, NOW)
        kept.append((margin, number))
        while sum(40 + samples[n][0] for _, n in kept) > bound:
            kept.remove(max(kept, key=lambda k: (k[0], -k[1])))
    images = waiting(spool)
    assert sorted(int.from_bytes(data[:2], "big") for data in images) == sorted(n for _, n in kept)
    assert spool.dropped == len(samples) - len(kept) and sum(map(len, images)) <= bound
    spool.close()


def test_the_bound_holds_for_what_an_earlier_life_left(open_spool):
    first = open_spool()
    for seed in range(10):
        first.add("yard", image(seed), seed / 10, 1.0, NOW)
    first.close()
    second = open_spool(max_bytes=3500)
    second.add("yard", image(20), 0.05, 1.0, NOW)
    assert waiting(second) == [image(0), image(20), image(1)] and second.dropped == 8


def test_a_batch_is_bounded_but_never_empty_for_size(open_spool):
    spool = open_spool()
    for seed in range(6):
        spool.add("yard", image(seed, 1000 * (seed + 1)), seed / 10, 1.0, NOW)
    sizes = lambda *bounds: [len(sample.image) for sample in spool.batch("yard", *bounds)]  # noqa: E731
    assert sizes(2, 10**9, None) == [1000, 2000]
    assert sizes(9, 3000, None) == [1000, 2000]
    assert sizes(9, 10, None) == [1000]
    assert sizes(9, 10**9, 6500) == [1000, 2000, 3000]  # what does not fit under the cap is passed over
    assert sizes(9, 10**9, 999) == []


def test_what_failed_comes_last_and_only_what_is_done_leaves(open_spool):
    spool = open_spool()
    for seed in range(4):
        spool.add("yard", image(seed), seed / 10, 1.0, NOW)
    batch = spool.batch("yard", 3, 10**9, None)
    spool.settle([batch[1].id], [batch[0].id], 0, NOW)
    assert waiting(spool) == [image(2), image(3), image(0)]


def test_age_ends_waiting_and_a_clock_that_goes_back_does_not_make_it_endless(open_spool):
    spool = open_spool(retention_s=10 * DAY_S)
    spool.add("yard", image(0), 0.1, 1.0, NOW)
    spool.add("yard", image(1), 0.1, 1.0, NOW + 5 * DAY_S)
    spool.expire(NOW + 10 * DAY_S)
    assert spool.count() == 2
    spool.expire(NOW + 11 * DAY_S)
    assert waiting(spool) == [image(1)] and spool.expired == 1
    spool.expire(NOW - 1000 * DAY_S)  # from here on it waits anew
    spool.expire(NOW - 991 * DAY_S)
    assert spool.count() == 1
    spool.expire(NOW - 989 * DAY_S)
    assert spool.count() == 0 and spool.expired == 2


def test_every_day_has_its_own_bytes_whatever_the_clock_does(open_spool):
    spool = open_spool()
    spool.settle([], [], 700, NOW)
    spool.settle([], [], 50, NOW + DAY_S)
    spool.settle([], [], 5, NOW + 40_000 * DAY_S)  # a clock gone wrong
    assert spool.sent_on_day(NOW + DAY_S) == 50  # and right again
    spool.settle([], [], 1, NOW - 5)  # the same day
    spool.close()
    again = open_spool()
    assert [again.sent_on_day(NOW + day * DAY_S) for day in (-1, 0, 1, 2)] == [0, 701, 50, 0]


def test_a_kill_in_the_middle_of_writing_loses_nothing_that_was_added(tmp_path):
    code = (
        "import sys, itertools\n"
        "from pathlib import Path\n"
        "from edgefm.edge.spool import Spool\n"
        "spool = Spool(Path(sys.argv[1]), 10**9, 1e9)\n"
        "for number in itertools.count():\n"
        "    spool.add('yard', number.to_bytes(4, 'big') * 2000, 0.1, 1.0, 1e9)\n"
        "    print(number, flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(200):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        said = 200 + len(process.stdout.read().split())
    spool = Spool(tmp_path, 10**9, 1e9)
    assert spool.count() in (said, said + 1) and spool.dropped == 0
    spool.close()


def test_a_damaged_file_is_set_aside_and_a_fresh_one_begun(tmp_path, open_spool, caplog):
    (tmp_path / SPOOL_FILE).write_bytes(image(5, 20_000))
    spool = open_spool()
    assert "event=spool_damaged" in caplog.text
    spool.add("yard", image(0), 0.1, 1.0, NOW)
    assert waiting(spool) == [image(0)] and spool.dropped == 0
    aside = tmp_path / f"{SPOOL_FILE}.damaged"
    assert aside.read_bytes() == image(5, 20_000)
    spool.expire(time.time())
    assert aside.exists()
    spool.expire(time.time() + 31 * DAY_S)  # retention holds for it too
    assert not aside.exists()


def test_a_file_of_another_format_is_set_aside(tmp_path, open_spool):
    with closing(sqlite3.connect(tmp_path / SPOOL_FILE)) as db:
        db.execute("CREATE TABLE samples (id)")
    spool = open_spool()
    spool.add("yard", image(0), 0.1, 1.0, NOW)
    assert waiting(spool) == [image(0)] and (tmp_path / f"{SPOOL_FILE}.damaged").exists()


def test_pages_that_rot_cost_their_samples_and_nothing_else(tmp_path, open_spool):
    spool = open_spool()
    for seed in range(100):
        spool.add("yard", image(seed), seed / 100, 1.0, NOW)
    spool.close()
    path = tmp_path / SPOOL_FILE
    path.write_bytes(path.read_bytes()[:4096] + image(7, path.stat().st_size - 4096))
    again = open_spool()
    for seed in range(200, 210):  # none of these raises; the first may find the damage
        again.add("yard", image(seed), 0.5, 1.0, NOW)
        again.batch("yard", 4, 10**9, None)
    assert again.count() >= 9 and (tmp_path / f"{SPOOL_FILE}.damaged").exists()


FULL = """
import resource, sys
from pathlib import Path
from edgefm.edge.spool import Spool
spool = Spool(Path(sys.argv[1]), 10**9, 1e9)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
for number in range(100):
    spool.add("yard", number.to_bytes(4, "big") * 2500, 0.1, 1.0, 1e9)
dropped = spool.dropped
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
before = spool.count()
for number in range(100, 120):
    spool.add("yard", number.to_bytes(4, "big") * 2500, 0.1, 1.0, 1e9)
print(dropped, before, spool.count(), spool.dropped)
"""


def test_a_disk_that_takes_no_more_drops_and_counts_and_is_used_again_when_it_does(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=True)
    dropped, before, after, dropped_in_all = map(int, done.stdout.split())
    assert 0 < before < 60 and dropped == 100 - before
    assert after == before + 20 and dropped_in_all == dropped and "event=spool_failed" in done.stderr


def test_a_folder_that_cannot_hold_it_costs_samples_and_no_run(tmp_path):
    (tmp_path / "file").write_text("in the way")
    spool = Spool(tmp_path / "file", 1000, 1e9)
    spool.add("yard", b"x", 0.1, 1.0, NOW)
    assert (spool.dropped, spool.count(), spool.batch("yard", 9, 10, None)) == (1, 0, [])
    with pytest.raises(StoreError, match="cannot purge"):
        spool.purge()


def test_purging_leaves_nothing_but_the_day_s_bytes(tmp_path, open_spool):
    spool = open_spool()
    secrets = [b"secret-%02d " % number * 500 for number in range(30)]
    for number, secret in enumerate(secrets):
        spool.add("yard" if number % 2 else "street", secret, 0.1, 1.0, NOW)
    spool.settle([], [], 70, NOW)
    (tmp_path / f"{SPOOL_FILE}.damaged").write_bytes(secrets[0])
    found = lambda: any(b"secret-" in path.read_bytes() for path in tmp_path.iterdir())  # noqa: E731
    assert found()
    assert spool.purge() == 30 and spool.count() == 0 and not found()
    assert spool.sent_on_day(NOW) == 70
    spool.add("yard", image(1), 0.1, 1.0, NOW)
    assert waiting(spool) == [image(1)]


def test_threads_share_it(open_spool):
    spool = open_spool()

    def write(part: int) -> None:
        for seed in range(50):
            spool.add("yard", image(1000 * part + seed), 0.1, 1.0, NOW)

    threads = [threading.Thread(target=write, args=(part,)) for part in range(3)]
    for thread in threads:
        thread.start()
    taken = 0
    while taken < 150:
        batch = spool.batch("yard", 16, 10**9, None)
        spool.settle([sample.id for sample in batch], [], 0, NOW)
        taken += len(batch)
    for thread in threads:
        thread.join()
    assert spool.count() == 0 and spool.dropped == 0


def test_the_file_is_plain_sqlite_in_wal_mode(tmp_path, open_spool):
    open_spool().add("yard", image(0), 0.1, 1.0, NOW)
    with closing(sqlite3.connect(tmp_path / SPOOL_FILE)) as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert db.execute("SELECT count(*), sum(size_bytes) FROM samples").fetchone() == (1, 1000)


def test_what_was_stamped_before_the_clock_was_set_begins_to_wait_when_it_is(open_spool):
    spool = open_spool(retention_s=10 * DAY_S)
    spool.add("yard", image(0), 0.1, 1.0, 500.0)  # 1970
    spool.expire(9 * DAY_S)  # still 1970: ages count there as anywhere
    assert spool.count() == 1 and spool.newest_s() == 500.0
    spool.expire(NOW)
    spool.expire(NOW + 9 * DAY_S)
    assert spool.count() == 1 and spool.newest_s() == NOW
    spool.expire(NOW + 11 * DAY_S)
    assert spool.count() == 0 and spool.expired == 1 and spool.newest_s() == 0.0


def test_a_damaged_file_from_the_future_is_kept_no_longer_than_others(tmp_path, open_spool):
    aside = tmp_path / f"{SPOOL_FILE}.damaged"
    aside.write_bytes(b"of 2106")
    os.utime(aside, (NOW + 29_000 * DAY_S,) * 2)
    spool = open_spool()
    spool.expire(NOW)
    assert aside.exists()
    spool.expire(NOW + 31 * DAY_S)
    assert not aside.exists()
