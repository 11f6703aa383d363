"""Headers: field rules beside stock qemu-img, byte-exact round trips, and the bytes of new headers."""

import dataclasses
import struct
from pathlib import Path

import pytest

from qcowlib.errors import CorruptMetadata, FormatError, OptionError, UnsupportedFeature
from qcowlib.format import constants as k
from qcowlib.format.extensions import CryptoHeader, HeaderExtension, new_extensions
from qcowlib.format.features import QEMU_FEATURE_NAMES, FeatureName, build_feature_names
from qcowlib.format.header import Header, parse_header
from tests.oracle import image_info, qemu_img
from tests.unit.format.samples import (
    STOCK_OPTIONS,
    create_rich,
    create_stock,
    extension_bytes,
    patched,
    valid_header,
)

KNOWN = {
    k.EXTENSION_BACKING_FORMAT,
    k.EXTENSION_BITMAPS,
    k.EXTENSION_CRYPTO_HEADER,
    k.EXTENSION_DATA_FILE,
    k.EXTENSION_FEATURE_NAMES,
}


def rebuilt(header: Header) -> Header:
    """The same header as a program makes it for a new image: from values, without the bytes it was parsed from."""
    return dataclasses.replace(
        header,
        layout=None,
        unknown_fields=b"",
        extensions=new_extensions(
            header.version,
            header.cluster_size,
            backing_format=header.backing_format,
            data_file_name=header.data_file_name,
            crypto_header=header.crypto_header,
            bitmaps=header.bitmaps_extension,
        ),
    )


@pytest.mark.parametrize("name", STOCK_OPTIONS)
def test_new_header_is_what_qemu_img_writes(name: str, tmp_path: Path) -> None:
    path = create_stock(name, tmp_path)
    data = path.read_bytes()
    header = parse_header(data, len(data))
    assert {extension.magic for extension in header.extensions} <= KNOWN
    built = rebuilt(header).build()
    assert built.ljust(header.cluster_size, b"\0") == data[: header.cluster_size].ljust(header.cluster_size, b"\0")


def test_new_luks_header_is_what_qemu_img_writes(tmp_path: Path) -> None:
    path = tmp_path / "luks.qcow2"
    secret = ("--object", "secret,id=s,data=x")
    qemu_img(
        "create", "-q", "-f", "qcow2", *secret, "-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
        path, "1M",
    )  # fmt: skip
    data = path.read_bytes()
    header = parse_header(data)
    assert header.crypt_method == k.CRYPT_LUKS
    assert header.crypto_header == CryptoHeader(0x40000, header.crypto_header.length if header.crypto_header else 0)
    assert rebuilt(header).build().ljust(65536, b"\0") == data[:65536]


def test_a_rewritten_header_with_bitmaps_and_backing_file(tmp_path: Path) -> None:
    data = create_rich(tmp_path).read_bytes()
    header = parse_header(data, len(data))
    assert header.nb_snapshots == 3
    assert header.bitmaps_extension is not None
    assert header.bitmaps_extension.count == 2
    assert header.backing_format == "raw"
    assert rebuilt(header).build().ljust(65536, b"\0") == data[:65536]


def test_the_values_of_a_stock_header(tmp_path: Path) -> None:
    path = create_stock("data-file-raw", tmp_path)
    header = parse_header(path.read_bytes())
    assert (header.version, header.cluster_size, header.size) == (3, 65536, 10 << 20)
    assert header.has_data_file
    assert header.has_raw_data_file
    assert header.extended_l2
    assert header.geometry.l2_entry_size == 16
    assert header.data_file_name == str(tmp_path / "raw.data")
    assert header.feature_names == QEMU_FEATURE_NAMES
    assert (header.dirty, header.corrupt, header.backing_file) == (False, False, None)


def test_version_2_implies_values() -> None:
    header = valid_header(version=2)
    assert header.header_length == 72
    parsed = parse_header(header.build().ljust(65536, b"\xff"), None)
    assert (parsed.refcount_order, parsed.incompatible_features, parsed.compression_type) == (4, 0, 0)


# Each row: fields to overwrite, and the class of the error; None where qemu-img opens the image and so must we.
RULES: list[tuple[dict[str, int], type[FormatError] | None]] = [
    ({"version": 1}, UnsupportedFeature),
    ({"version": 4}, UnsupportedFeature),
    ({"version": 2}, None),
    ({"cluster_bits": 0}, UnsupportedFeature),
    ({"cluster_bits": 8}, UnsupportedFeature),
    ({"cluster_bits": 22}, UnsupportedFeature),
    ({"cluster_bits": 63}, UnsupportedFeature),
    ({"header_length": 103}, FormatError),
    ({"header_length": 104}, None),
    ({"header_length": 65536}, None),
    ({"header_length": 65537}, FormatError),
    ({"header_length": 2**32 - 1}, FormatError),
    ({"backing_file_offset": 65537}, FormatError),
    ({"backing_file_offset": 65536}, None),
    ({"backing_file_offset": 65536, "backing_file_size": 1}, FormatError),
    ({"backing_file_offset": 8, "backing_file_size": 0}, None),
    ({"backing_file_offset": 60000, "backing_file_size": 1024}, FormatError),
    ({"backing_file_offset": 2**64 - 1}, FormatError),
    ({"compression_type": 1}, FormatError),
    ({"compression_type": 2}, UnsupportedFeature),
    ({"compression_type": 1, "incompatible_features": 8}, None),
    ({"incompatible_features": 8}, FormatError),
    ({"incompatible_features": 1 << 5}, UnsupportedFeature),
    ({"incompatible_features": 1 << 63}, UnsupportedFeature),
    ({"incompatible_features": 7}, None),
    ({"compatible_features": 2**64 - 1}, None),
    ({"autoclear_features": 2**64 - 4}, None),
    ({"refcount_order": 6}, None),
    ({"refcount_order": 7}, FormatError),
    ({"refcount_order": 2**32 - 1}, FormatError),
    ({"crypt_method": 3}, UnsupportedFeature),
    ({"refcount_table_clusters": 0}, FormatError),
    ({"refcount_table_clusters": 128}, None),
    ({"refcount_table_clusters": 129}, FormatError),
    ({"refcount_table_clusters": 2**32 - 1}, FormatError),
    ({"refcount_table_offset": 0x10200}, FormatError),
    ({"refcount_table_offset": 2**63 - 65536}, FormatError),
    ({"l1_table_offset": 0x30200}, FormatError),
    ({"l1_table_offset": 2**63}, FormatError),
    ({"l1_table_offset": 1 << 50}, None),
    ({"l1_size": 0}, FormatError),
    ({"l1_size": 4 << 20}, None),
    ({"l1_size": (4 << 20) + 1}, FormatError),
    ({"l1_size": 2**31}, FormatError),
    ({"size": 1 << 29}, None),
    ({"size": (1 << 29) + 1}, FormatError),
    ({"size": 2**63}, FormatError),
    ({"size": 2**64 - 1}, FormatError),
    ({"nb_snapshots": 65537}, FormatError),
    ({"nb_snapshots": 2**32 - 1}, FormatError),
    ({"snapshots_offset": 512}, FormatError),
    ({"snapshots_offset": 2**63}, FormatError),
]


@pytest.fixture(scope="module")
def plain_image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("header") / "plain.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "10M")
    return path.read_bytes()


@pytest.mark.parametrize(("fields", "error"), RULES, ids=[str(fields) for fields, _ in RULES])
def test_rules_beside_qemu_img(
    fields: dict[str, int], error: type[FormatError] | None, plain_image: bytes, tmp_path: Path
) -> None:
    data = patched(plain_image, **fields)
    path = tmp_path / "patched.qcow2"
    path.write_bytes(data)
    opened = qemu_img("info", "-f", "qcow2", path, check=False).returncode == 0
    assert opened == (error is None)
    if error is None:
        header = parse_header(data, len(data))
        assert header.build() == data[: len(header.build())]
    else:
        with pytest.raises(error) as caught:
            parse_header(data, len(data))
        assert type(caught.value) is error


@pytest.mark.parametrize("length", range(104, 129))
def test_odd_header_lengths_beside_qemu_img(length: int, plain_image: bytes, tmp_path: Path) -> None:
    data = patched(plain_image, header_length=length)
    path = tmp_path / "patched.qcow2"
    path.write_bytes(data)
    if qemu_img("info", "-f", "qcow2", path, check=False).returncode == 0:
        header = parse_header(data, len(data))
        assert header.header_length == length
        assert header.build() == data[: len(header.build())]
    else:
        with pytest.raises(FormatError):
            parse_header(data, len(data))


def bitmaps(*, count: int = 1, reserved: int = 0, size: int = 0, offset: int = 0) -> bytes:
    return extension_bytes(k.EXTENSION_BITMAPS, struct.pack(">IIQQ", count, reserved, size, offset))


# Each row: extensions as they lie behind the header, header fields, and whether an image with them can be opened.
LUKS = {"crypt_method": 2}
BITMAPS = {"autoclear_features": 1}
EXTENSIONS: list[tuple[str, bytes, dict[str, int], bool]] = [
    ("none", b"", {}, True),
    ("unknown", extension_bytes(0x12345678, b"anything"), {}, True),
    ("unknown of no length", extension_bytes(0x12345678, b""), {}, True),
    ("end with data", extension_bytes(0, b"xyz") + b"\xff" * 8, {}, True),
    ("end too long", b"\0\0\0\0\xff\xff\xff\xff", {}, False),
    ("too long", b"\x12\x34\x56\x78\xff\xff\xff\xf8", {}, False),
    ("format of 15", extension_bytes(k.EXTENSION_BACKING_FORMAT, b"f" * 15), {}, True),
    ("format of 16", extension_bytes(k.EXTENSION_BACKING_FORMAT, b"f" * 16), {}, False),
    ("two formats", extension_bytes(k.EXTENSION_BACKING_FORMAT, b"raw") * 2, {}, True),
    ("crypto without LUKS", extension_bytes(k.EXTENSION_CRYPTO_HEADER, bytes(16)), {}, False),
    ("crypto too short", extension_bytes(k.EXTENSION_CRYPTO_HEADER, bytes(8)), LUKS, False),
    ("crypto unaligned", extension_bytes(k.EXTENSION_CRYPTO_HEADER, (512).to_bytes(8, "big") + bytes(8)), LUKS, False),
    ("bitmaps too short", extension_bytes(k.EXTENSION_BITMAPS, bytes(16)), {}, False),
    ("bitmaps not valid", extension_bytes(k.EXTENSION_BITMAPS, b"\xff" * 24), {}, True),
    ("no bitmaps", bitmaps(count=0), BITMAPS, False),
    ("one bitmap, reserved field", bitmaps(reserved=1), BITMAPS, False),
    ("too many bitmaps", bitmaps(count=65536), BITMAPS, False),
    ("large directory", bitmaps(size=1024 * 65535 + 1), BITMAPS, False),
    ("unaligned directory", bitmaps(offset=512), BITMAPS, False),
    ("bit without bitmaps", b"", BITMAPS, True),
    ("raw data file bit alone", b"", {"autoclear_features": 2}, True),
]


@pytest.mark.parametrize(
    ("area", "fields", "opens"), [row[1:] for row in EXTENSIONS], ids=[row[0] for row in EXTENSIONS]
)
def test_extensions_beside_qemu_img(
    area: bytes, fields: dict[str, int], opens: bool, plain_image: bytes, tmp_path: Path
) -> None:
    data = patched(plain_image[:112] + area.ljust(65536 - 112, b"\0") + plain_image[65536:], **fields)
    path = tmp_path / "patched.qcow2"
    path.write_bytes(data)
    assert (qemu_img("info", "-f", "qcow2", path, check=False).returncode == 0) == opens
    if opens:
        built = parse_header(data, len(data)).build()
        assert built == data[: len(built)]
    else:
        with pytest.raises(FormatError):
            parse_header(data, len(data))


@pytest.mark.parametrize(
    ("table", "bits"),
    [
        ((FeatureName(0, 5, "five alive"), FeatureName(1, 6, "no"), FeatureName(0, 7, "seven")), 0xE0),
        ((FeatureName(0, 5, "n" * 46),), 0x20),
        ((FeatureName(0, 5, ""), FeatureName(0, 6, "behind the end")), 0x60),
        ((), 1 << 63 | 0x20),
    ],
)
def test_unknown_features_are_named_as_qemu_names_them(
    table: tuple[FeatureName, ...], bits: int, plain_image: bytes, tmp_path: Path
) -> None:
    area = extension_bytes(k.EXTENSION_FEATURE_NAMES, build_feature_names(table))
    data = patched(plain_image[:112] + area.ljust(65536 - 112, b"\0") + plain_image[65536:], incompatible_features=bits)
    path = tmp_path / "patched.qcow2"
    path.write_bytes(data)
    stock = qemu_img("info", "-f", "qcow2", path, check=False).stderr.rstrip("\n")
    with pytest.raises(UnsupportedFeature) as caught:
        parse_header(data, len(data))
    assert caught.value.rule.startswith("Unsupported qcow2 feature(s): ")
    assert stock.endswith(": " + caught.value.rule)
    assert caught.value.host_offset == 72


def test_what_only_a_check_may_open(plain_image: bytes) -> None:
    for fields in ({"refcount_table_clusters": 0}, {"nb_snapshots": 2**32 - 1}, {"snapshots_offset": 512}):
        data = patched(plain_image, **fields)
        with pytest.raises(FormatError):
            parse_header(data)
        header = parse_header(data, for_check=True)
        assert header.build() == data[: len(header.build())]


@pytest.mark.parametrize("length", [0, 3, 4, 40, 71, 72, 103])
def test_a_cut_header(length: int, plain_image: bytes) -> None:
    with pytest.raises(FormatError) as caught:
        parse_header(plain_image[:length], length)
    assert caught.value.structure == "header"
    assert caught.value.host_offset == 0


@pytest.mark.parametrize("length", [104, 112, 120, 600, 4096])
def test_a_file_cut_behind_the_header_can_be_looked_at(length: int, plain_image: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cut.qcow2"
    path.write_bytes(plain_image[:length])
    stock = qemu_img("info", "-f", "qcow2", path, check=False).returncode
    if stock:
        with pytest.raises(FormatError):
            parse_header(plain_image[:length], length)
    else:
        assert parse_header(plain_image[:length], length).size == 10 << 20


def test_bytes_that_were_not_read_are_not_taken_for_zeroes() -> None:
    header = valid_header(extensions=(HeaderExtension(0x12345678, b"x" * 2000),), backing_file="base.raw")
    data = header.build().ljust(65536, b"\0")
    assert parse_header(data[:4096], 65536) == parse_header(data)
    for length in (300, 2127, len(header.build()) - 1):
        with pytest.raises(FormatError):
            parse_header(data[:length], 65536)


def test_not_qcow2() -> None:
    for data in (b"", b"QFI", b"QFI\xfc" + bytes(200), bytes(4096)):
        with pytest.raises(FormatError, match="not that of a qcow2 image"):
            parse_header(data)


def test_unknown_bytes_survive_a_change_of_other_fields(plain_image: bytes) -> None:
    unknown = extension_bytes(0x12345678, b"keep me") + extension_bytes(0x9ABCDEF0, b"and me!")
    unknown = unknown.replace(b"keep me\0", b"keep me\xee")  # padding need not be zero
    tail = bytes(8) + b"\xaa" * 16  # end marker, then a gap in front of the backing name
    area = bytes(range(1, 9)) + unknown + tail
    name_offset = 112 + len(area)
    data = patched(
        plain_image[:112] + area + b"base.raw",
        header_length=120,
        backing_file_offset=name_offset,
        backing_file_size=8,
        autoclear_features=1 << 40,
    )
    header = parse_header(data)
    assert header.backing_file == "base.raw"
    assert header.unknown_fields == bytes(7) + bytes(range(1, 9))
    assert header.build() == data

    moved = dataclasses.replace(header, l1_table_offset=0x70000, l1_size=9, nb_snapshots=2, snapshots_offset=0x90000)
    expected = patched(data, l1_table_offset=0x70000, l1_size=9, nb_snapshots=2, snapshots_offset=0x90000)
    assert moved.build() == expected
    # All that a transaction swings is in the first sector.
    assert moved.build()[512:] == data[512:]


def test_a_backing_name_may_start_in_the_padding(plain_image: bytes, tmp_path: Path) -> None:
    area = extension_bytes(0x12345678, b"12345")[:-3]
    data = patched(plain_image, backing_file_offset=112 + len(area), backing_file_size=8)
    data = data[:112] + area + b"base.raw" + data[120 + len(area) :]
    path = tmp_path / "unpadded.qcow2"
    path.write_bytes(data)
    assert image_info(path)["backing-filename"] == "base.raw"
    header = parse_header(data)
    assert header.backing_file == "base.raw"
    assert header.build() == data[: 120 + len(area)]
    # Laid out afresh, the name makes room for the padding.
    assert dataclasses.replace(header, layout=None).build() == data[:8] + struct.pack(">QI", 136, 8) + data[20:112] + (
        area + bytes(3) + bytes(8) + b"base.raw"
    )


def test_a_new_layout_is_laid_out_as_qemu_does(tmp_path: Path) -> None:
    path = create_rich(tmp_path)
    data = bytearray(path.read_bytes())
    header = parse_header(bytes(data))
    renamed = dataclasses.replace(
        header,
        backing_file="another/base.img",
        extensions=header.with_extension(
            k.EXTENSION_BACKING_FORMAT, HeaderExtension(k.EXTENSION_BACKING_FORMAT, b"qcow2")
        ),
    )
    data[: header.cluster_size] = renamed.build().ljust(header.cluster_size, b"\0")
    path.write_bytes(data)
    info = image_info(path)
    assert info["backing-filename"] == "another/base.img"
    assert info["backing-filename-format"] == "qcow2"
    assert [bitmap["name"] for bitmap in info["format-specific"]["data"]["bitmaps"]] == ["first", "second"]
    # QEMU rewrites the header with the same content, but moves the bitmap directory: the other bytes must be ours.
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", "another/base.img", "-F", "qcow2", path)
    stock = path.read_bytes()[:65536]
    moved = parse_header(stock).bitmaps_extension
    assert moved is not None
    extensions = renamed.with_extension(k.EXTENSION_BITMAPS, moved.build())
    assert dataclasses.replace(renamed, extensions=extensions).build().ljust(65536, b"\0") == stock


def test_extensions_can_be_removed() -> None:
    header = valid_header(extensions=new_extensions(3, 65536, backing_format="raw"), backing_file="b")
    assert [e.magic for e in header.extensions] == [k.EXTENSION_BACKING_FORMAT, k.EXTENSION_FEATURE_NAMES]
    without = dataclasses.replace(
        header, backing_file=None, extensions=header.with_extension(k.EXTENSION_BACKING_FORMAT, None)
    )
    parsed = parse_header(without.build())
    assert (parsed.backing_file, parsed.backing_format) == (None, None)
    assert parsed.feature_names == QEMU_FEATURE_NAMES
    assert parsed.build() == without.build()


def test_what_does_not_fit_into_the_first_cluster() -> None:
    small = valid_header(cluster_bits=9, l1_size=320)
    fits = dataclasses.replace(small, backing_file="n" * (512 - 112 - 8))
    assert parse_header(fits.build()).backing_file == fits.backing_file
    with pytest.raises(OptionError):
        dataclasses.replace(small, backing_file="n" * (512 - 112 - 7)).build()
    with pytest.raises(OptionError):
        valid_header(backing_file="n" * 1024).build()
    with pytest.raises(FormatError):
        valid_header(backing_file="half a pair \ud800").build()
    with pytest.raises(FormatError):
        valid_header(l1_size=1 << 32).build()


def test_backing_names_are_bytes() -> None:
    header = valid_header(backing_file="b\udcffse \u20ac.raw")
    data = header.build()
    assert data.endswith(b"b\xffse \xe2\x82\xac.raw")
    assert parse_header(data).backing_file == header.backing_file
    # For QEMU a name ends at a zero byte, and an empty one is none.
    cut = parse_header(data[:-5] + b"\0" + data[-4:])
    assert cut.backing_file == "b\udcffse \u20ac".removesuffix("\u20ac") + "\udce2\udc82"
    assert cut.build() == data[:-5] + b"\0" + data[-4:]


def test_content_rules() -> None:
    valid_header().check_content_rules()
    with pytest.raises(FormatError, match="external data file"):
        valid_header(autoclear_features=2).check_content_rules()
    with pytest.raises(FormatError, match="LUKS"):
        valid_header(crypt_method=2).check_content_rules()


def test_virtual_size_is_whole_sectors() -> None:
    assert valid_header(size=1048577).virtual_size == 1048576
    assert valid_header(size=1048576).virtual_size == 1048576


def test_bitmaps_are_not_trusted_without_their_bit() -> None:
    extension = HeaderExtension(k.EXTENSION_BITMAPS, b"\0\0\0\1" + bytes(20))
    assert valid_header(extensions=(extension,)).bitmaps_extension is None
    found = valid_header(extensions=(extension,), autoclear_features=1).bitmaps_extension
    assert found is not None
    assert found.count == 1
    none = valid_header(extensions=(HeaderExtension(k.EXTENSION_BITMAPS, bytes(24)),), autoclear_features=1)
    with pytest.raises(CorruptMetadata):
        _ = none.bitmaps_extension
