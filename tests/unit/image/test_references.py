"""Names in headers: what they stand for, and what is refused."""

import json
from pathlib import Path

import pytest

from qcowlib.errors import ChainError
from qcowlib.image.references import (
    BackingOverride,
    Reference,
    Window,
    backing_reference,
    data_file_path,
    has_protocol,
    parse_image_name,
)


@pytest.mark.parametrize(
    ("name", "image", "path"),
    [
        ("base.qcow2", "/vm/disk.qcow2", "/vm/base.qcow2"),
        ("base.qcow2", "disk.qcow2", "base.qcow2"),
        ("../base.qcow2", "sub/disk.qcow2", "sub/../base.qcow2"),
        ("/abs/base.qcow2", "sub/disk.qcow2", "/abs/base.qcow2"),
        ("./with:colon", "disk.qcow2", "./with:colon"),
        ("dir/with:colon", "/vm/disk.qcow2", "/vm/dir/with:colon"),
        ("file:base.qcow2", "/vm/disk.qcow2", "base.qcow2"),
        ("file:/abs/base.qcow2", "/vm/disk.qcow2", "/abs/base.qcow2"),
        ("host_device:/dev/sdb", "/vm/disk.qcow2", "/dev/sdb"),
    ],
)
def test_plain_backing_names(name: str, image: str, path: str) -> None:
    assert backing_reference(name, "qcow2", image) == Reference(path, "qcow2")


@pytest.mark.parametrize(
    "name",
    [
        "nbd:unix:/run/x.sock", "http://host/image", "https://host/i", "rbd:pool/image", "ssh://host/i", "fat:/etc",
        "file://host/path", "chain-colon:1.qcow2", "file:", "a\0b", "json:{", "json:[]", "json:1", "json:" + "[" * 900,
        'json:{"driver":"nbd","server":{"type":"unix","path":"/x"}}',
        'json:{"driver":"qcow2","file":{"driver":"https","url":"https://host/i"}}',
        'json:{"driver":"qcow2","file":"node-name"}',
        'json:{"driver":"vmdk","file":{"driver":"file","filename":"x"}}',
        'json:{"driver":"raw","file":{"driver":"qcow2","file":{"driver":"file","filename":"x"}}}',
        'json:{"driver":"raw","offset":-1,"file":{"driver":"file","filename":"x"}}',
        'json:{"driver":"raw","offset":true,"file":{"driver":"file","filename":"x"}}',
        'json:{"driver":"raw","size":9223372036854775808,"file":{"driver":"file","filename":"x"}}',
        'json:{"driver":"qcow2","offset":0,"file":{"driver":"file","filename":"x"}}',
        'json:{"driver":"qcow2","file":{"filename":"nbd:localhost:1"}}',
        'json:{"driver":"qcow2","file":{"filename":"json:{}"}}',
        'json:{"driver":"file","filename":""}', 'json:{"driver":"file","filename":7}', 'json:{"driver":"qcow2"}',
        'json:{"driver":"file","filename":"a\\u0000b"}',
        'json:{"driver":"qcow2","data-file":"x","file":{"driver":"file","filename":"x"}}',
        'json:{"driver":"raw","backing":null,"file":{"driver":"file","filename":"x"}}',
        "blkdebug:x", "blkdebug:rules:nbd:host:1", 'json:{"driver":"blkdebug","config":"rules"}',
        "json:{'driver':'qcow2','driver':'raw'}", "json:{'driver':qcow2}", "json:{'driver':'file'}x", "json:",
        'json:{"file.driver":"file","file":7,"driver":"qcow2"}', 'json:{"file":7,"file.driver":"file"}',
    ],
)  # fmt: skip
def test_refused_backing_names(name: str) -> None:
    with pytest.raises(ChainError):
        backing_reference(name, None, "/vm/disk.qcow2")


def test_refusal_names_the_protocol() -> None:
    with pytest.raises(ChainError, match=r"'nbd:host:1' uses the protocol 'nbd'"):
        backing_reference("nbd:host:1", "raw", "/vm/disk.qcow2")


def test_a_relative_name_needs_a_directory() -> None:
    with pytest.raises(ChainError, match="has no path"):
        backing_reference("base.qcow2", None, "")
    assert backing_reference("/abs", None, "") == Reference("/abs")


@pytest.mark.parametrize(
    ("options", "reference"),
    [
        ({"driver": "file", "filename": "x"}, Reference("x")),
        ({"driver": "file", "filename": "nbd:x"}, Reference("nbd:x")),
        ({"filename": "file:x"}, Reference("x")),
        ({"driver": "qcow2", "file": {"driver": "file", "filename": "x"}}, Reference("x", "qcow2")),
        ({"driver": "qcow2", "file.driver": "file", "file.filename": "x"}, Reference("x", "qcow2")),
        ({"file": {"driver": "file", "filename": "x"}}, Reference("x")),
        (
            {"driver": "raw", "offset": 65536, "size": 1048576, "file": {"driver": "file", "filename": "x"}},
            Reference("x", "raw", (Window(65536, 1048576),)),
        ),
        ({"driver": "raw", "offset": "512", "file.filename": "x"}, Reference("x", "raw", (Window(512, None),))),
        (
            {"driver": "qcow2", "file": {"driver": "raw", "offset": 512, "file": {"driver": "raw", "offset": 1024,
             "file": {"driver": "file", "filename": "x", "cache": {"direct": False}}}}},
            Reference("x", "qcow2", (Window(1024, None), Window(512, None))),
        ),
        (
            {"driver": "qcow2", "backing": None, "file": {"driver": "file", "filename": "x"}},
            Reference("x", "qcow2", (), BackingOverride(None)),
        ),
        (
            {"driver": "qcow2", "backing": {"driver": "raw", "file.driver": "file", "file.filename": "b"},
             "file": {"driver": "file", "filename": "x"}},
            Reference("x", "qcow2", (), BackingOverride(Reference("b", "raw"))),
        ),
        (
            {"driver": "qcow2", "data-file.driver": "file", "data-file.filename": "d", "file.filename": "x"},
            Reference("x", "qcow2", data_file=Reference("d")),
        ),
        (
            {"driver": "qcow2", "file": {"driver": "blkdebug", "set-state": [{"event": "read_aio", "new_state": 2}],
             "image": {"driver": "file", "filename": "x"}}},
            Reference("x", "qcow2", (Window(0, None),)),
        ),
        ({"driver": "blkdebug", "config": "rules", "image.driver": "file", "image.filename": "x"},
         Reference("x", None, (Window(0, None),), faulty=True)),
        ({"driver": "blkdebug", "inject-error": [{"event": "none"}], "image": {"filename": "x"}},
         Reference("x", None, (Window(0, None),), faulty=True)),
        ({"driver": "null-co", "size": 1024, "read-zeroes": True}, Reference("null-co://", "null-co", zeroes=1024)),
        ({"driver": "raw", "file.driver": "null-aio"}, Reference("null-aio://", "raw", zeroes=1 << 30)),
    ],
)  # fmt: skip
def test_descriptions(options: dict[str, object], reference: Reference) -> None:
    name = "json:" + json.dumps(options)
    assert parse_image_name(name) == reference
    assert backing_reference(name, reference.format, "/elsewhere/disk") == reference


def test_a_description_must_fit_the_backing_format() -> None:
    name = 'json:{"driver":"qcow2","file":{"driver":"file","filename":"x"}}'
    with pytest.raises(ChainError, match="raw"):
        backing_reference(name, "raw", "disk")


def test_a_deep_description_is_refused() -> None:
    options: dict[str, object] = {"driver": "file", "filename": "x"}
    for _ in range(60):
        options = {"driver": "raw", "file": options}
    with pytest.raises(ChainError, match="too deeply"):
        backing_reference("json:" + json.dumps(options), None, "disk")
    with pytest.raises(ChainError):
        backing_reference("json:" + json.dumps({"a." * 500 + "b": 1}), None, "disk")


@pytest.mark.parametrize("name", ["json:{}", "nbd:unix:/x", "file:x", "a\0b"])
def test_a_data_file_name_is_never_interpreted(name: str) -> None:
    with pytest.raises(ChainError):
        data_file_path(name, "/vm/disk.qcow2")


def test_data_file_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative name starts at the process's directory, as for QEMU; beside the image is the second place."""
    (tmp_path / "images").mkdir()
    monkeypatch.chdir(tmp_path)
    assert data_file_path("/data/d", "images/disk.qcow2") == "/data/d"
    assert data_file_path("./a:b", "images/disk.qcow2") == "./a:b"
    assert data_file_path("disk.data", "images/disk.qcow2") == "disk.data"
    (tmp_path / "images" / "disk.data").touch()
    assert data_file_path("disk.data", "images/disk.qcow2") == "images/disk.data"
    (tmp_path / "disk.data").touch()
    assert data_file_path("disk.data", "images/disk.qcow2") == "disk.data"


def test_user_names() -> None:
    assert parse_image_name("disk.qcow2") == Reference("disk.qcow2")
    assert parse_image_name("file:disk.qcow2") == Reference("disk.qcow2")
    assert parse_image_name("file:with:colon") == Reference("./with:colon")
    assert parse_image_name("blkdebug::x") == Reference("x", None, (Window(0, None),))
    assert parse_image_name("blkdebug:rules:x") == Reference("x", None, (Window(0, None),), faulty=True)
    assert parse_image_name("null-co://") == Reference("null-co://", zeroes=1 << 30)
    assert parse_image_name("""json:{'driver' : "file", 'filename':'it\\'s "x"'}""") == Reference('it\'s "x"')
    assert not has_protocol("./a:b")
    assert has_protocol("a:b/c")
