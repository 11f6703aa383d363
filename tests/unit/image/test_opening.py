"""Opening: sources, formats, policies, chains, and what is refused."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

import qcowlib
from qcowlib import (
    ChainError,
    ConfinedTo,
    CorruptMetadata,
    EncryptionError,
    FormatError,
    ImageLocked,
    ImageStateError,
    LocalFiles,
    NoSuchSnapshot,
    OptionError,
    OutOfRange,
    QcowError,
    ReferenceDenied,
    StorageError,
    UnsupportedFeature,
    create_image,
    open_image,
)
from qcowlib.image.interface import BlockImage, WritableBlockImage
from qcowlib.image.qcow2 import Qcow2Image
from qcowlib.image.raw import RawImage
from qcowlib.image.references import parse_image_name
from qcowlib.storage.buffer import BytesStorage
from qcowlib.storage.local import open_local
from tests import oracle

MIB = 1 << 20


def create(path: Path, *args: str, size: str | None = "1M") -> Path:
    oracle.qemu_img("create", "-q", "-f", "qcow2", *args, path, *([size] if size else []))
    return path


def overlay(path: Path, backing: str, backing_format: str | None = "qcow2") -> Path:
    """An overlay whose backing file need not exist."""
    create(path, "-u", "-b", backing, "-F", backing_format or "raw")
    if backing_format is None:
        # qemu-img does not leave the format out: make the header extension one that nobody knows.
        patch(path, path.read_bytes().index(bytes.fromhex("e2792aca")), b"\x0b\xad\x0b\xad")
    return path


def patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = create(tmp_path / "disk.qcow2")
    oracle.qemu_io(path, "write -q -P 65 0 64k", "write -q -P 66 512k 4k")
    return path


def test_every_kind_of_source(disk: Path) -> None:
    def sources() -> dict[str, object]:
        return {
            "str": str(disk),
            "path": disk,
            "bytes": disk.read_bytes(),
            "bytearray": bytearray(disk.read_bytes()),
            "storage": open_local(disk),
            "buffer": BytesStorage(disk.read_bytes()),
            "reference": parse_image_name(f"file:{disk}"),
        }

    for name, source in sources().items():
        with open_image(source) as image:  # type: ignore[call-overload]
            assert image.format == "qcow2", name
            assert image.read(65530, 12) == b"A" * 6 + bytes(6), name
            assert isinstance(image, BlockImage)
            assert not isinstance(image, WritableBlockImage)
    descriptor = os.open(disk, os.O_RDONLY)
    with open_image(descriptor) as image:
        assert image.read(0, 3) == b"AAA"
    assert os.fstat(descriptor).st_size == disk.stat().st_size, "the descriptor stays the caller's"
    os.close(descriptor)
    with pytest.raises(OptionError):
        open_image(1.5)  # type: ignore[call-overload]


def test_public_names_exist() -> None:
    for name in qcowlib.__all__:
        assert getattr(qcowlib, name) is not None
    assert set(qcowlib.__all__) <= set(dir(qcowlib))
    with pytest.raises(AttributeError):
        _ = qcowlib.nothing


def test_closing_twice_and_using_afterwards(disk: Path) -> None:
    image = open_image(disk)
    image.close()
    image.close()
    with pytest.raises(StorageError):
        image.read(0, 512)


def test_ranges(disk: Path) -> None:
    with open_image(disk) as image:
        assert image.read(image.size, 0) == b""
        for offset, length in ((-1, 1), (0, MIB + 1), (MIB, 1), (5, -1), (1 << 70, 1)):
            with pytest.raises(OutOfRange):
                image.read(offset, length)
        with pytest.raises(OutOfRange):
            image.readinto(MIB - 1, bytearray(2))
        with pytest.raises(NoSuchSnapshot):
            image.open_snapshot("none")


def test_a_range_larger_than_the_memory(tmp_path: Path) -> None:
    huge = create(tmp_path / "huge.qcow2", "-o", "cluster_size=2M", size="64T")
    raw = tmp_path / "huge.raw"
    with raw.open("wb") as file:
        file.truncate(1 << 42)
    for path in (huge, raw):
        with open_image(path) as image, pytest.raises(OutOfRange, match="memory"):
            image.read(0, image.size)


def test_formats(disk: Path, tmp_path: Path) -> None:
    with open_image(disk, format="raw") as raw:
        assert isinstance(raw, RawImage)
        assert raw.read(0, 4) == b"QFI\xfb"
    with pytest.raises(OptionError, match="Unknown driver 'nonsense'"):
        open_image(disk, format="nonsense")
    with pytest.raises(UnsupportedFeature, match="vmdk format; only qcow2 and raw"):
        open_image(b"KDMV" + bytes(1000))
    with pytest.raises(UnsupportedFeature, match="vdi"):
        open_image(disk, format="vdi")
    with pytest.raises(FormatError):
        open_image(bytes(4096), format="qcow2")
    assert open_image(b"").size == 0
    assert open_image(b"abc").format == "raw"


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda path: path.mkdir(), "regular file"),
        (os.mkfifo, "regular file"),
        (lambda path: socket.socket(socket.AF_UNIX).bind(str(path)), "Could not open"),
        (lambda _: None, "No such file"),
    ],
)
def test_what_is_no_file(
    make: Callable[[Path], None], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(Path("thing"))
    with pytest.raises(StorageError, match=text):
        open_image("thing")
    with pytest.raises(StorageError):
        open_image("nul\0byte")


def test_references_are_denied_by_default(tmp_path: Path) -> None:
    create(tmp_path / "base.qcow2")
    top = overlay(tmp_path / "top.qcow2", "base.qcow2")
    with pytest.raises(ReferenceDenied, match=r"names the backing file .*base.qcow2.*LocalFiles"):
        open_image(top)
    with open_image(top, policy=ConfinedTo(tmp_path)) as image:
        assert image.backing is not None
        assert image.backing.name == str(tmp_path / "base.qcow2")
    with pytest.raises(ReferenceDenied):
        open_image(top, policy=ConfinedTo(tmp_path / "elsewhere"))
    with pytest.raises(ReferenceDenied):
        open_image(overlay(tmp_path / "two.qcow2", "top.qcow2"), policy=_OnlyOnce())


class _OnlyOnce:
    """Admits the first file and denies the second: the question is asked for each layer."""

    def __init__(self) -> None:
        self.asked = 0

    def admit(self, request: object) -> None:
        self.asked += 1
        if self.asked > 1:
            raise ReferenceDenied("not this one")


def test_the_top_file_alone(tmp_path: Path) -> None:
    top = overlay(tmp_path / "top.qcow2", "gone.qcow2")
    with open_image(top, writable=True, open_backing=False) as writable:
        writable.write(0, b"x" * 65536)
    with open_image(top, open_backing=False) as image:
        assert image.backing is None
        assert image.read(100, 5) == b"xxxxx"
        with pytest.raises(ChainError, match=r"guest offset 0x10000 .*'gone.qcow2', which was not opened"):
            image.read(65530, 12)
        with pytest.raises(ChainError):
            image.read(0, image.size)


def test_a_missing_backing_file_is_named(tmp_path: Path) -> None:
    overlay(tmp_path / "middle.qcow2", "gone.qcow2")
    top = overlay(tmp_path / "top.qcow2", "middle.qcow2")
    gone = tmp_path / "gone.qcow2"
    text = (
        f"Could not open backing file: Could not open backing file: Could not open '{gone}': No such file or directory"
    )
    with pytest.raises(ChainError) as caught:
        open_image(top, policy=LocalFiles())
    assert str(caught.value) == text


def test_loops_end(tmp_path: Path) -> None:
    own = overlay(tmp_path / "self.qcow2", "self.qcow2")
    first = overlay(tmp_path / "first.qcow2", "second.qcow2")
    overlay(tmp_path / "second.qcow2", "link.qcow2")
    (tmp_path / "link.qcow2").symlink_to(first)
    (tmp_path / "hard.qcow2").hardlink_to(own)
    for path in (own, first, tmp_path / "hard.qcow2"):
        with pytest.raises(ChainError, match="loop"):
            open_image(path, policy=LocalFiles())


def test_the_chain_has_a_limit(tmp_path: Path) -> None:
    for number in range(202):
        # A header that names the next file, copied with the name patched: creating 200 by qemu-img is slow.
        path = tmp_path / f"{number:03}.qcow2"
        if number == 0:
            overlay(path, "001.qcow2")
            template = path.read_bytes()
        else:
            path.write_bytes(template.replace(b"001.qcow2", b"%03d.qcow2" % (number + 1)))
    create(tmp_path / "202.qcow2")
    with pytest.raises(ChainError, match="longer than 200"):
        open_image(tmp_path / "000.qcow2", policy=LocalFiles())
    with open_image(tmp_path / "003.qcow2", policy=LocalFiles()) as image:
        assert image.read(0, MIB) == bytes(MIB)
        assert [row.layer for table in image.extents() for row in table] == [199]


def test_protocols_are_refused_by_name(tmp_path: Path) -> None:
    top = overlay(tmp_path / "top.qcow2", "nbd:unix:/run/sock:exportname=x", "raw")
    with pytest.raises(ChainError, match="protocol 'nbd'"):
        open_image(top, policy=LocalFiles())


def test_a_backing_file_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(b"KDMV" + bytes(1 << 20))
    with pytest.raises(ChainError, match=r"Could not open backing file: .*vmdk format"):
        open_image(overlay(tmp_path / "top.qcow2", "base", None), policy=LocalFiles())
    with open_image(overlay(tmp_path / "top2.qcow2", "base", "raw"), policy=LocalFiles()) as image:
        assert image.read(0, 4) == b"KDMV"


def test_data_files(tmp_path: Path) -> None:
    data = tmp_path / "disk.data"
    disk = create(tmp_path / "disk.qcow2", "-o", f"data_file={data}")
    oracle.qemu_io(disk, "write -q -P 7 0 64k")
    with pytest.raises(ReferenceDenied, match="names the data file"):
        open_image(disk)
    with open_image(disk, policy=LocalFiles()) as image:
        assert image.read(0, 4) == b"\7" * 4
    with open_image(disk, data_file=BytesStorage(b"\x55" * MIB)) as image:
        assert image.read(0, 4) == b"\x55" * 4
    with open_image(disk, open_backing=False) as image:
        assert image.snapshots == []
        with pytest.raises(ChainError, match="was not opened"):
            image.read(0, 4)
    data.unlink()
    with pytest.raises(ChainError, match=f"Could not open '{data}': No such file or directory"):
        open_image(disk, policy=LocalFiles())


def test_a_data_file_that_ends_early_is_damage(tmp_path: Path) -> None:
    data = tmp_path / "disk.data"
    disk = create(tmp_path / "disk.qcow2", "-o", f"data_file={data}")
    oracle.qemu_io(disk, "write -q -P 7 0 128k")
    os.truncate(data, 65536 + 100)
    with open_image(disk, policy=LocalFiles()) as image:
        assert image.read(65536, 200) == b"\7" * 100 + bytes(100)
    os.truncate(data, 65536)
    with open_image(disk, policy=LocalFiles()) as image:
        assert image.read(0, 65536) == b"\7" * 65536
        with pytest.raises(CorruptMetadata):
            image.read(65536, 1)


def test_corrupt_bit_allows_reading_only(disk: Path) -> None:
    patch(disk, 79, b"\x02")
    with open_image(disk) as image:
        assert image.read(0, 1) == b"A"
    before = disk.read_bytes()
    with pytest.raises(ImageStateError, match="corrupt; cannot be opened read/write"):
        open_image(disk, writable=True)
    assert disk.read_bytes() == before


def test_dirty_bit_allows_reading(disk: Path) -> None:
    patch(disk, 79, b"\x01")
    with open_image(disk) as image:
        assert image.read(0, 1) == b"A"


def test_unknown_incompatible_bit(disk: Path) -> None:
    patch(disk, 72, b"\x80")
    with pytest.raises(UnsupportedFeature, match="Unknown incompatible feature"):
        open_image(disk)


def test_writing_needs_a_known_format_and_no_other_user(disk: Path, tmp_path: Path) -> None:
    raw = tmp_path / "disk.raw"
    raw.write_bytes(bytes(4096))
    with pytest.raises(OptionError, match="format='raw'"):
        open_image(raw, writable=True)
    with open_image(raw, format="raw", writable=True) as image:
        assert isinstance(image, WritableBlockImage)
        image.write(512, b"abc")
    assert raw.read_bytes()[512:516] == b"abc\0"
    with pytest.raises(OptionError, match="force_share"):
        open_image(disk, writable=True, force_share=True)
    with open_image(disk), pytest.raises(ImageLocked):
        open_image(disk, writable=True)
    with open_image(disk, writable=True):
        with pytest.raises(ImageLocked):
            open_image(disk)
        with open_image(disk, force_share=True) as image:
            assert image.read(0, 1) == b"A"
    with pytest.raises(OptionError, match="can only be read"):
        open_image(_ReadOnly(bytes(512)), format="raw", writable=True)


class _ReadOnly:
    """The reading half of the storage contract alone."""

    def __init__(self, data: bytes) -> None:
        inner = BytesStorage(data, writable=False)
        self.name = "read only"
        self.size, self.pread, self.pread_into = inner.size, inner.pread, inner.pread_into
        self.data_ranges, self.close = inner.data_ranges, inner.close


def test_encrypted_images_need_a_passphrase(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create_image(path, MIB, encrypt_format="luks", encrypt_passphrase="open sesame", encrypt_iter_time_ms=10)
    with pytest.raises(EncryptionError, match="required for cipher"):
        open_image(path)
    with pytest.raises(EncryptionError):
        open_image(path, passphrase="wrong")
    with open_image(path, passphrase=b"open sesame") as image:
        assert image.read(0, 10) == bytes(10)
    with open_image(path, passphrase="open sesame", writable=True) as writable:
        writable.write(0, b"plain text")
    assert b"plain text" not in path.read_bytes()
    with open_image(path, open_backing=False) as image:
        assert isinstance(image, Qcow2Image)
        assert image.header.crypt_method == 2
        with pytest.raises(EncryptionError, match="needs a passphrase"):
            image.read(0, 1)


def test_failures_close_what_was_opened(disk: Path, tmp_path: Path) -> None:
    top = overlay(tmp_path / "top.qcow2", "gone.qcow2")
    patch(disk, 72, b"\x80")
    descriptors = len(os.listdir("/proc/self/fd"))
    for path in (top, disk):
        for _ in range(5):
            with pytest.raises(QcowError):
                open_image(path, policy=LocalFiles())
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_snapshot_views(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", size="2M")
    oracle.qemu_io(path, "write -q -P 1 0 64k")
    for name in ("2", "1", "b"):
        oracle.qemu_img("snapshot", "-c", name, path)
    oracle.qemu_io(path, "write -q -P 2 0 64k")
    with open_image(path) as image:
        assert image.open_snapshot("1").entry.name == "2", "an id comes before a name"
        assert image.open_snapshot(name="1").entry.id == "2"
        assert image.open_snapshot(snapshot_id="1", name="2").entry.id == "1"
        assert image.open_snapshot(image.snapshots[2]).entry.name == "b"
        for wanted in ({"snapshot_id": "b"}, {"name": "4"}, {"snapshot_id": "1", "name": "1"}):
            with pytest.raises(NoSuchSnapshot):
                image.open_snapshot(**wanted)  # type: ignore[arg-type]
        with pytest.raises(OptionError):
            image.open_snapshot()
        view = image.open_snapshot("b")
        assert (view.read(0, 2), image.read(0, 2)) == (b"\1\1", b"\2\2")
        view.close()
        assert view.read(0, 2) == b"\1\1"
        assert not view.writable
