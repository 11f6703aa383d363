"""Feature bits keep what they do not know; the feature name table's bytes."""

import pytest

from qcowlib.errors import FormatError
from qcowlib.format.features import (
    Autoclear,
    Compatible,
    FeatureName,
    Incompatible,
    build_feature_names,
    describe_unknown_incompatible,
    parse_feature_names,
)


def test_unknown_bits_are_kept() -> None:
    for flags in (Incompatible, Compatible, Autoclear):
        assert int(flags(2**64 - 1)) == 2**64 - 1
        assert int(flags(1 << 40 | 1) & ~flags(1)) in (0, 1 << 40)
    assert Incompatible(1 << 40 | 4) & Incompatible.DATA_FILE


def test_names_by_hand() -> None:
    data = b"\0\5" + b"five".ljust(46, b"\0") + b"\2\1" + b"n" * 46
    names = (FeatureName(0, 5, "five"), FeatureName(2, 1, "n" * 46))
    assert parse_feature_names(data) == names
    assert parse_feature_names(data + b"\0" * 47) == names
    assert parse_feature_names(data + b"\0\7cut") == (*names, FeatureName(0, 7, "cut"))
    assert build_feature_names(names) == data
    assert parse_feature_names(b"\xff\xff" + b"\xfe".ljust(46, b"\0")) == (FeatureName(255, 255, "\udcfe"),)


def test_names_that_cannot_be_written() -> None:
    for name in (
        FeatureName(0, 256, "x"),
        FeatureName(0, -1, "x"),
        FeatureName(0, 0, "\ud800"),
        FeatureName(0, 0, "n" * 47),
    ):
        with pytest.raises(FormatError):
            build_feature_names([name])


def test_unknown_bits_by_name() -> None:
    table = (FeatureName(0, 5, "five"), FeatureName(0, 64, "no such bit"), FeatureName(0, 255, "neither"))
    assert describe_unknown_incompatible(0x20, table) == "Unsupported qcow2 feature(s): five"
    assert describe_unknown_incompatible(0x60, table).endswith(": five, Unknown incompatible feature: 40")
    assert describe_unknown_incompatible(1 << 63, ()).endswith(": Unknown incompatible feature: 8000000000000000")
