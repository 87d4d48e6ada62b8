"""LMDB files are whole or absent, and can be read from any process."""

import ctypes
import errno
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import lmdb
import pytest

from loading import lmdb_io
from loading.lmdb_io import (
    DATA_FILE,
    NUM_SAMPLES,
    LmdbReader,
    LmdbWriter,
    find_lmdbs,
    image_key,
    label_key,
    mask_key,
)
from utils import UserError

ROOT = Path(__file__).resolve().parents[1]


def _write(path, count=3, **options):
    with LmdbWriter(path, **options) as writer:
        for i in range(1, count + 1):
            writer.append(b"image %d" % i, f"wörd{i}")


def _interrupt(path, error=RuntimeError, **options):
    """Write two samples and leave the writer by an exception."""
    with LmdbWriter(path, **options) as writer:
        writer.append(b"1", "a")
        writer.append(b"2", "b")
        assert writer.partial.exists()
        raise error


def _run(code, *arguments):
    """Run Python code in a process of its own."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_what_is_written_is_read(tmp_path):
    _write(tmp_path / "a" / "b")
    reader = LmdbReader(tmp_path / "a" / "b")
    assert len(reader) == 3
    assert reader.get(image_key(2)) == b"image 2"
    assert reader.get(label_key(3)).decode() == "wörd3"
    assert reader.get("nothing") is None
    assert list(reader.keys("label-")) == [label_key(i) for i in (1, 2, 3)]
    assert os.listdir(tmp_path / "a") == ["b"]
    assert os.listdir(tmp_path / "a" / "b") == [DATA_FILE]


def test_keys_are_the_published_ones():
    keys = (image_key(1), label_key(23), mask_key(999_999_999), NUM_SAMPLES)
    assert keys == ("image-000000001", "label-000000023", "mask-999999999", "num-samples")


def test_map_grows_and_no_room_is_reserved(tmp_path):
    with LmdbWriter(tmp_path / "big") as writer:
        for i in range(1, 41):
            writer.put(image_key(i), bytes([i]) * (3 << 20))  # 120 MiB, twice the first map
        writer.put(NUM_SAMPLES, "40")
    reader = LmdbReader(tmp_path / "big")
    assert all(reader.get(image_key(i)) == bytes([i]) * (3 << 20) for i in (1, 20, 40))
    assert (tmp_path / "big" / DATA_FILE).stat().st_size < 130 << 20


def test_small_file_stays_small(tmp_path):
    _write(tmp_path / "small")
    assert (tmp_path / "small" / DATA_FILE).stat().st_size < 1 << 20


def test_exception_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError):
        _interrupt(tmp_path / "x")
    assert os.listdir(tmp_path) == []


def test_existing_is_refused_or_replaced_in_one_step(tmp_path):
    _write(tmp_path / "x", 3)
    with pytest.raises(UserError, match="--overwrite"):
        LmdbWriter(tmp_path / "x")
    with pytest.raises(RuntimeError):
        _interrupt(tmp_path / "x", overwrite=True)
    assert len(LmdbReader(tmp_path / "x")) == 3
    _write(tmp_path / "x", 5, overwrite=True)
    assert len(LmdbReader(tmp_path / "x")) == 5
    assert os.listdir(tmp_path) == ["x"]


def test_only_an_lmdb_is_ever_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("x")
    for name in ("folder", "file"):
        with pytest.raises(UserError, match="choose another"):
            LmdbWriter(tmp_path / name, overwrite=True)
    assert (tmp_path / "folder" / "thesis.txt").exists()


def test_two_writers_of_one_path_are_refused(tmp_path):
    with LmdbWriter(tmp_path / "x") as writer:
        writer.append(b"1", "a")
        with pytest.raises(UserError, match="another process"):
            LmdbWriter(tmp_path / "x")
    assert len(LmdbReader(tmp_path / "x")) == 1


def test_interrupted_writer_is_resumed(tmp_path):
    options = {"identity": "masks of A"}
    with pytest.raises(KeyboardInterrupt):
        _interrupt(tmp_path / "x", KeyboardInterrupt, **options)
    with pytest.raises(UserError, match="no finished LMDB"):
        find_lmdbs(tmp_path)
    with pytest.raises(UserError, match="other input or settings"):
        LmdbWriter(tmp_path / "x", identity="masks of B")
    with LmdbWriter(tmp_path / "x", **options) as writer:
        assert writer.count == 2
        writer.append(b"3", "c")
    reader = LmdbReader(tmp_path / "x")
    assert [reader.get(label_key(i)) for i in range(1, len(reader) + 1)] == [b"a", b"b", b"c"]
    assert os.listdir(tmp_path / "x") == [DATA_FILE]


@pytest.mark.parametrize("entries", range(1, 8))
def test_no_sample_is_cut_by_a_commit(tmp_path, monkeypatch, entries):
    monkeypatch.setattr(lmdb_io, "_COMMIT_ENTRIES", entries)
    stored = []

    class Writer(LmdbWriter):
        def commit(self):
            super().commit()
            with self._environment.begin() as transaction:
                keys = {bytes(key).decode() for key, _ in transaction.cursor()}
                stored.append((int(transaction.get(NUM_SAMPLES.encode()) or 0), keys))

    with Writer(tmp_path / "a") as writer:
        for _ in range(9):
            writer.append(b"image", "label", b"mask")
    assert len(stored) > 1
    for count, keys in stored:
        whole = {key(i) for key in (image_key, mask_key, label_key) for i in range(1, count + 1)}
        assert keys == whole | {NUM_SAMPLES}


def test_killed_writer_is_resumed_from_its_last_commit(tmp_path):
    code = """
        import os, signal, sys
        from loading.lmdb_io import LmdbWriter
        writer = LmdbWriter(sys.argv[1], identity="")
        writer.append(b"1", "a")
        writer.commit()
        writer.append(b"2", "b")
        os.kill(os.getpid(), signal.SIGKILL)
    """
    assert _run(code, tmp_path / "x").returncode == -signal.SIGKILL
    assert os.listdir(tmp_path) == ["x.partial"]
    with LmdbWriter(tmp_path / "x", identity="") as writer:
        assert writer.count == 1
        writer.append(b"2", "b")
    assert LmdbReader(tmp_path / "x").get(image_key(2)) == b"2"


def test_overwrite_discards_what_could_be_resumed(tmp_path):
    with pytest.raises(RuntimeError):
        _interrupt(tmp_path / "x", identity="")
    with LmdbWriter(tmp_path / "x", identity="", overwrite=True) as writer:
        assert writer.count == 0


FILL = """
    import os, resource, sys
    from loading.lmdb_io import LmdbWriter
    from utils import run_command_line

    def main():
        if len(sys.argv) > 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
        with LmdbWriter(sys.argv[1]) as writer:
            for i in range(60):
                writer.append(os.urandom(1 << 20), "x")

    run_command_line(main)
"""


def test_file_size_limit_is_one_clear_line(tmp_path):
    result = _run(FILL, tmp_path / "x", 8 << 20)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert "disk is full" in result.stderr
    assert os.listdir(tmp_path) == []


def test_full_disk_is_one_clear_line(tmp_path):
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(tmp_path)], capture_output=True)
    if mount.returncode:
        pytest.skip("mounting a small file system needs to be root")
    try:
        result = _run(FILL, tmp_path / "x")
        assert result.returncode == 2
        assert result.stderr.count("\n") == 1
        assert "disk is full" in result.stderr
        assert os.listdir(tmp_path) == []
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_any_number_of_readers_share_one_file(tmp_path):
    _write(tmp_path / "x")
    readers = [LmdbReader(tmp_path / "x"), LmdbReader(f"{tmp_path}/./x")]
    assert [len(reader) for reader in readers] == [3, 3]
    del readers[0]
    assert readers[0].get(image_key(1)) == b"image 1"


def test_opened_reader_pickles_small(tmp_path):
    _write(tmp_path / "x")
    reader = LmdbReader(tmp_path / "x")
    assert len(reader) == 3
    data = pickle.dumps(reader)
    assert len(data) < 500
    assert pickle.loads(data).get(image_key(3)) == b"image 3"


def _read_in_worker(reader, queue):
    queue.put((len(reader), reader.get(image_key(2))))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_reader_opened_before_a_worker_starts_works_in_it(tmp_path, method):
    _write(tmp_path / "x")
    reader = LmdbReader(tmp_path / "x")
    assert len(reader) == 3
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    worker = context.Process(target=_read_in_worker, args=(reader, queue))
    worker.start()
    assert queue.get(timeout=60) == (3, b"image 2")
    worker.join(60)
    assert worker.exitcode == 0
    assert reader.get(image_key(3)) == b"image 3"


class MallInfo(ctypes.Structure):
    """What glibc's `mallinfo2` returns."""

    _fields_ = [(name, ctypes.c_size_t) for name in ("a", "b", "c", "d", "e", "f", "g", "used", "h", "i")]


def _grow(reader, queue):
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = MallInfo
    for _ in range(200):
        reader.get(image_key(1))
    before = libc.mallinfo2().used
    for _ in range(4000):
        reader.get(image_key(1))
    queue.put(libc.mallinfo2().used - before)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33")
def test_a_forked_worker_does_not_grow(tmp_path):
    _write(tmp_path / "x")
    reader = LmdbReader(tmp_path / "x")
    assert len(reader) == 3  # opened before the fork
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    worker = context.Process(target=_grow, args=(reader, queue))
    worker.start()
    assert queue.get(timeout=60) < 50_000  # 256 bytes for each transaction would be a megabyte
    worker.join(60)
    assert len(reader) == 3


def test_find_lmdbs_sorts_and_skips_unfinished_ones(tmp_path):
    for name in ("b", "b/below-an-lmdb", "a/deep", "c.partial", "c.partial/below"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / DATA_FILE).touch()
    assert find_lmdbs(tmp_path) == [tmp_path / "a" / "deep", tmp_path / "b"]
    assert find_lmdbs(tmp_path / "b") == [tmp_path / "b"]
    for bad in ("nothing", "c.partial"):
        with pytest.raises(UserError):
            find_lmdbs(tmp_path / bad)


def test_a_folder_without_an_lmdb_is_named(tmp_path):
    for name, content in (("empty", b""), ("junk", b"junk" * 5000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / DATA_FILE).write_bytes(content)
    for name in ("missing", "empty", "junk"):
        with pytest.raises(UserError, match=name):
            LmdbReader(tmp_path / name).get("x")


def test_truncated_file_is_an_error_not_a_crash(tmp_path):
    with LmdbWriter(tmp_path / "x") as writer:
        for _ in range(50):
            writer.append(bytes(9000), "x")
    os.truncate(tmp_path / "x" / DATA_FILE, 200_000)
    with pytest.raises(UserError, match="cut short"):
        LmdbReader(tmp_path / "x").get(image_key(50))


@pytest.mark.parametrize("value", [None, "many", "-3"])
def test_wrong_num_samples_is_named(tmp_path, value):
    with LmdbWriter(tmp_path / "x") as writer:
        writer.put(image_key(1), b"1")
        if value is not None:
            writer.put(NUM_SAMPLES, value)
    with pytest.raises(UserError, match=NUM_SAMPLES):
        len(LmdbReader(tmp_path / "x"))


def test_other_write_errors_name_the_folder(tmp_path, monkeypatch):
    def refuse(*_arguments, **_options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(lmdb, "open", refuse)
    with pytest.raises(UserError, match="Read-only"):
        LmdbWriter(tmp_path / "x")
    assert os.listdir(tmp_path) == []
