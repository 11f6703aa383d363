"""The recorder lists what happened, crash states are what a power cut may leave, faults come as planned."""

import errno
import itertools
import tracemalloc
from contextlib import suppress
from pathlib import Path

import pytest

from qcowlib.errors import StorageError
from qcowlib.storage.buffer import BytesStorage
from qcowlib.storage.local import open_local
from qcowlib.storage.recorder import (
    CrashState,
    Fault,
    FaultyStorage,
    Operation,
    RecordingStorage,
    crash_states,
)


def disk(state: CrashState) -> bytes:
    return state.storage().getvalue()


def test_records_every_change_by_epoch() -> None:
    recording = RecordingStorage(BytesStorage(b"0123456789"))
    recording.pwrite(memoryview(b"ab"), 3)
    recording.discard(0, 2)
    recording.flush()
    recording.flush()
    recording.write_zeroes(8, 4)
    recording.allocate(0, 20)
    recording.truncate(15)
    assert recording.epochs == [
        [Operation("write", 3, 2, b"ab"), Operation("discard", 0, 2, b"")],
        [
            Operation("zero", 8, 4, b""),
            Operation("allocate", 0, 20, b""),
            Operation("truncate", 15, 0, b""),
        ],
    ]
    assert recording.pread(20, 0) == b"\0\x002ab567" + bytes(7)


def test_a_change_that_failed_is_not_recorded(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with open_local(tmp_path / "file") as file:
        recording = RecordingStorage(file)
        with pytest.raises(StorageError):
            recording.pwrite(b"abc", 0)
        assert recording.epochs == [[]]


def test_a_write_splits_at_the_disk_s_sectors() -> None:
    data = bytes(range(256)) * 5
    parts = Operation("write", 500, 1280, data).sectors()
    assert [(part.offset, part.length) for part in parts] == [(500, 12), (512, 512), (1024, 512), (1536, 244)]
    assert b"".join(part.data for part in parts) == data
    for offset, length, count in ((0, 512, 1), (511, 1, 1), (511, 2, 2), (512, 1024, 2), (0, 0, 1)):
        operation = Operation("write", offset, length, bytes(length))
        assert len(operation.sectors()) == count
        assert operation.spans_sectors() == (count > 1)
    assert len(Operation("zero", 0, 1 << 40, b"").sectors()) == 1


def three_epochs() -> tuple[RecordingStorage, bytes]:
    initial = b"." * 6
    recording = RecordingStorage(BytesStorage(initial))
    recording.pwrite(b"A", 0)
    recording.pwrite(b"B", 1)
    recording.pwrite(b"C", 2)
    recording.flush()
    recording.pwrite(b"D", 3)
    recording.pwrite(b"E", 4)
    recording.flush()
    recording.truncate(5)
    return recording, initial


def test_all_states_of_a_small_recording() -> None:
    recording, initial = three_epochs()
    states = [(state.epoch, disk(state)) for state in crash_states(recording, initial, samples=100, seed=1)]
    first = {bytes(c if take else ord(".") for c, take in zip(b"ABC", mask, strict=True)) + b"..."
             for mask in itertools.product((False, True), repeat=3)} - {b"ABC..."}  # fmt: skip
    assert {content for epoch, content in states if epoch == 0} == first
    assert {content for epoch, content in states if epoch == 1} == {b"ABC...", b"ABCD..", b"ABC.E."}
    assert {content for epoch, content in states if epoch == 2} == {b"ABCDE.", b"ABCDE"}
    assert len(states) == 7 + 3 + 2, "no state comes twice"


def test_every_prefix_comes_whatever_the_samples() -> None:
    recording = RecordingStorage(BytesStorage())
    model, expected = bytearray(), [b""]
    for step in range(100):
        recording.pwrite(bytes([step]), step)
        model.append(step)
        expected.append(bytes(model))
    assert [disk(state) for state in crash_states(recording, b"", samples=0, seed=0)] == expected
    listed = list(crash_states(recording, b"", samples=0, seed=0))
    assert [disk(state) for state in listed] == expected, "states stay right after the iterator went on"


def test_samples_are_subsets_without_repetition_and_never_a_prefix() -> None:
    recording = RecordingStorage(BytesStorage())
    for step in range(40):
        recording.pwrite(b"x", step)
    sampled = list(crash_states(recording, bytes(40), samples=50, seed=3))[41:]
    masks = {disk(state) for state in sampled}
    assert len(sampled) == len(masks) == 50
    assert not masks & {b"x" * n + bytes(40 - n) for n in range(41)}


def test_overlapping_writes_keep_their_order() -> None:
    recording = RecordingStorage(BytesStorage(b"...."))
    recording.pwrite(b"old", 0)
    recording.pwrite(b"new", 0)
    contents = {disk(state) for state in crash_states(recording, b"....", samples=9, seed=0)}
    assert contents == {b"....", b"old.", b"new."}


def test_torn_writes_miss_whole_sectors() -> None:
    recording = RecordingStorage(BytesStorage(bytes(4096)))
    recording.pwrite(b"a", 0)
    recording.pwrite(b"b" * 2048, 700)
    states = list(crash_states(recording, bytes(4096), samples=40, seed=5))
    torn = [state for state in states if "torn" in state.text]
    assert len(torn) == 40
    seen = set()
    for state in torn:
        content = disk(state)
        pieces = [content[700:1024], content[1024:1536], content[1536:2048], content[2048:2560], content[2560:2748]]
        assert all(set(piece) in ({0}, {ord("b")}) for piece in pieces)
        mask = "".join("b" if piece[0] else "." for piece in pieces)
        assert 0 < mask.count("b") < 5
        assert content[1:700] == bytes(699)
        assert content[2748:] == bytes(4096 - 2748)
        seen.add((mask, content[0]))
    assert {("b....", ord("a")), ("bb...", ord("a")), ("bbb..", ord("a")), ("bbbb.", ord("a"))} <= seen
    assert any(not mask.startswith("b") for mask, _ in seen), "a later sector may arrive first"
    assert {first for _, first in seen} == {0, ord("a")}


def test_the_same_seed_gives_the_same_states() -> None:
    recording = RecordingStorage(BytesStorage())
    for step in range(30):
        recording.pwrite(bytes([step + 1]) * 1000, step * 1000)
        if step % 10 == 9:
            recording.flush()

    def states(seed: int) -> list[tuple[int, str, bytes]]:
        return [(s.epoch, s.text, disk(s)) for s in crash_states(recording, b"", samples=7, seed=seed)]

    assert states(1) == states(1)
    assert states(1) != states(2)
    assert len(states(1)) == 30 + 1 + 3 * (7 + 7), "an ended epoch leaves an empty one, whose only state is the end"


def test_marks_are_promises_from_their_barrier_on() -> None:
    recording, initial = RecordingStorage(BytesStorage()), b""
    recording.mark("opened")
    recording.pwrite(b"A", 0)
    recording.mark("not flushed yet")
    recording.pwrite(b"B", 1)
    recording.flush()
    recording.mark("flushed")
    recording.pwrite(b"C", 2)
    recording.flush()
    recording.mark("last")
    promises: dict[bytes, set[tuple[object, ...]]] = {}
    for state in crash_states(recording, initial, samples=10, seed=0):
        promises.setdefault(disk(state), set()).add(state.marks)
    assert promises == {
        b"": {("opened",)},
        b"A": {("opened",)},
        b"\0B": {("opened",)},
        b"AB": {("opened", "not flushed yet", "flushed")},
        b"ABC": {("opened", "not flushed yet", "flushed", "last")},
    }


def test_a_state_s_disk_can_be_changed_alone() -> None:
    recording, initial = three_epochs()
    state = next(crash_states(recording, initial, samples=0, seed=0))
    first = state.storage()
    first.pwrite(b"healed", 0)
    assert first.getvalue() == b"healed"
    assert state.storage().getvalue() == initial


def test_memory_holds_a_few_disks_however_many_states() -> None:
    size = 1 << 20
    recording = RecordingStorage(BytesStorage(bytes(size)))
    for step in range(500):
        recording.pwrite(b"z" * 512, step * 512)
        if step % 50 == 49:
            recording.flush()
    tracemalloc.start()
    count = sum(
        1 for state in crash_states(recording, bytes(size), samples=5, seed=0) if state.storage().size() == size
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 500 + 1 + 10 * 5
    assert peak < 8 * size


def test_the_nth_call_fails_and_the_next_succeeds() -> None:
    inner = BytesStorage(b"....")
    storage = FaultyStorage(inner, [Fault("pwrite", 2, errno.EIO), Fault("flush", 1), Fault("pread", 1)])
    storage.pwrite(b"a", 0)
    with pytest.raises(StorageError) as failed:
        storage.pwrite(b"b", 1)
    assert failed.value.cause.errno == errno.EIO
    assert str(failed.value) == "Could not write '<bytes>': Input/output error"
    storage.pwrite(b"c", 2)
    with pytest.raises(StorageError, match="Could not flush"):
        storage.flush()
    storage.flush()
    with pytest.raises(StorageError, match="Could not read"):
        storage.pread_into(bytearray(2), 0)
    assert storage.pread(4, 0) == b"a.c."
    assert storage.failures == 3
    assert storage.counts == {"pwrite": 3, "flush": 2, "pread": 2, "change": 5}


def test_a_write_may_reach_the_file_in_part() -> None:
    inner = BytesStorage()
    storage = FaultyStorage(inner, [Fault("pwrite", 1, errno.ENOSPC, written=3)])
    with pytest.raises(StorageError, match="No space left on device"):
        storage.pwrite(b"abcdef", 2)
    assert inner.getvalue() == b"\0\0abc"


@pytest.mark.parametrize("nth", range(1, 8))
def test_every_step_of_a_program_can_fail(nth: int) -> None:
    """A loop over nth that ends when nothing fails any more visits every change."""
    inner = BytesStorage(b"0123456789")
    storage = FaultyStorage(inner, [Fault("change", nth, errno.ENOSPC, lasting=True)])
    steps = [
        lambda: storage.pwrite(b"ab", 0),
        lambda: storage.write_zeroes(0, 1),
        lambda: storage.discard(1, 1),
        lambda: storage.allocate(0, 12),
        lambda: storage.truncate(11),
        storage.flush,
    ]
    done = 0
    for step in steps:
        with suppress(StorageError):
            step()
            done += 1
    assert done == min(nth - 1, 6)
    assert storage.failures == 6 - done
    assert storage.pread(1, 9) == b"9", "reading goes on"


def test_a_full_host_takes_what_fits() -> None:
    inner = BytesStorage(b"0123456789")
    storage = FaultyStorage(inner, capacity=12)
    storage.pwrite(b"AB", 8)
    with pytest.raises(StorageError, match="No space left on device"):
        storage.pwrite(b"wxyz", 10)
    assert inner.getvalue() == b"01234567ABwx"
    with pytest.raises(StorageError, match="No space left on device"):
        storage.write_zeroes(11, 2)
    with pytest.raises(StorageError, match="Could not allocate '<bytes>': No space left on device"):
        storage.allocate(0, 13)
    assert inner.getvalue() == b"01234567ABwx"
    storage.write_zeroes(0, 2)
    storage.pwrite(b"..", 10)
    assert inner.getvalue() == b"\0\x00234567AB.."
    assert storage.failures == 3


def test_a_file_beyond_the_capacity_stays_writable_inside() -> None:
    inner = BytesStorage(b"0123456789")
    storage = FaultyStorage(inner, capacity=4)
    storage.pwrite(b"XY", 8)
    with pytest.raises(StorageError):
        storage.pwrite(b"abc", 9)
    assert inner.getvalue() == b"01234567Xa"
