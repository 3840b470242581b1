"""Atomic writes and files made once."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from edgefm.models.cache import cache_dir, cached_arrays, cached_file, write_atomic
from edgefm.models.errors import ModelError, StoreError


def test_writes_and_replaces_and_leaves_nothing_beside(tmp_path):
    path = tmp_path / "new" / "folder" / "file"
    for content in (b"first", b"", b"third" * 100_000):
        write_atomic(path, content)
        assert path.read_bytes() == content
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_a_failure_leaves_the_target_and_no_litter(tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "inside").write_text("kept")
    with pytest.raises(StoreError, match=r"cannot write .*target: .*; free space or choose another folder"):
        write_atomic(target, b"data")  # a folder cannot be replaced by a file: the last step fails
    assert (target / "inside").read_text() == "kept"
    assert [entry.name for entry in tmp_path.iterdir()] == ["target"]


def test_a_full_disk_leaves_the_target_and_no_litter(tmp_path):
    """A limit on file size fails the write half-way, as a full disk does."""
    import resource
    import signal

    path = tmp_path / "file"
    write_atomic(path, b"old")
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(StoreError, match="File too large"):
            write_atomic(path, b"new" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_a_file_is_an_error_of_the_store(tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(StoreError, match="cannot write"):
        write_atomic(tmp_path / "file" / "below", b"data")
    assert (tmp_path / "file").read_text() == "kept"


def test_a_reader_sees_one_whole_version_or_another(tmp_path):
    path, stop = tmp_path / "file", threading.Event()
    whole = {bytes([n]) * 50_000 for n in range(4)}
    write_atomic(path, min(whole))

    def write(content: bytes) -> None:
        while not stop.is_set():
            write_atomic(path, content)

    writers = [threading.Thread(target=write, args=(content,)) for content in whole]
    for writer in writers:
        writer.start()
    try:
        seen = {path.read_bytes() for _ in range(300)}
    finally:
        stop.set()
        for writer in writers:
            writer.join()
    assert seen <= whole
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_cached_file_is_made_once(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEFM_CACHE", str(tmp_path / "cache"))
    made = []

    def make() -> bytes:
        made.append(1)
        return b"slow to make"

    assert cached_file("thing", make) == cached_file("thing", make) == tmp_path / "cache" / "thing"
    assert (tmp_path / "cache" / "thing").read_bytes() == b"slow to make" and len(made) == 1
    assert cached_file("another", make).name == "another" and len(made) == 2


def test_where_the_cache_is(tmp_path, monkeypatch):
    monkeypatch.delenv("EDGEFM_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "edgefm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "edgefm"
    monkeypatch.setenv("EDGEFM_CACHE", "here")
    assert cache_dir() == Path("here")


def test_what_is_no_file_is_written_into_and_stays_what_it_is(tmp_path):
    """As root, a rename would put a file in the place of /dev/stdout."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    write_atomic(pipe, b"through")
    assert os.read(reader, 100) == b"through" and pipe.is_fifo()
    os.close(reader)


def test_arrays_are_made_once_and_a_damaged_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEFM_CACHE", str(tmp_path))
    made = []

    def make() -> dict[str, np.ndarray]:
        made.append(1)
        return {"names": np.array(["a cat", "ñ"]), "rows": np.eye(2, dtype=np.float32)}

    for _ in range(2):
        read = cached_arrays("some.npz", make)
        assert read["names"].tolist() == ["a cat", "ñ"] and np.array_equal(read["rows"], np.eye(2))
        assert read["rows"].dtype == np.float32
    assert made == [1]
    whole = (tmp_path / "some.npz").read_bytes()
    for damaged in (b"", b"no archive", whole[:-30], whole[: len(whole) // 2]):
        (tmp_path / "some.npz").write_bytes(damaged)
        with pytest.raises(ModelError, match=r"some\.npz is damaged .*; delete it"):
            cached_arrays("some.npz", make)


def test_of_processes_that_want_it_at_once_one_makes_it(tmp_path):
    code = (
        "import os, sys, time\n"
        "from edgefm.models.cache import cached_file\n"
        "def make():\n"
        "    print('making', flush=True)\n"
        "    time.sleep(1)\n"
        "    return b'made'\n"
        "assert cached_file('some', make).read_bytes() == b'made'\n"
    )
    environment = {**os.environ, "EDGEFM_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", code]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(3)]
    said = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0] and "".join(said) == "making\n"
    assert [path.name for path in tmp_path.iterdir()] == ["some"]


def test_who_waited_makes_it_where_the_first_one_failed(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEFM_CACHE", str(tmp_path))

    def fail() -> bytes:
        raise ModelError("no weights")

    with pytest.raises(ModelError):
        cached_file("some", fail)
    assert cached_file("some", lambda: b"made").read_bytes() == b"made"
