"""Findings of a check on drawn images: codes, places, severities, texts and numbers."""

import re
from pathlib import Path
from typing import Any

import pytest

import qcowlib.operations.check as check_module
from qcowlib.findings import CheckReport, Finding, Severity
from qcowlib.metadata.state import Qcow2State
from qcowlib.operations.check import check, check_state
from qcowlib.storage.buffer import BytesStorage
from tests.unit.metadata.sketch import COPIED, Sketch

SIZE = 512


def drawn(**changes: Any) -> Sketch:
    """One L2 table (cluster 4) that maps clusters 5 and 6."""
    tables = {4: [5 * SIZE | COPIED, 6 * SIZE | COPIED]}
    return Sketch(**{"clusters": 7, "l1": [4 * SIZE | COPIED], "tables": tables, **changes})


def report_of(**changes: Any) -> CheckReport:
    return check_state(drawn(**changes).state())


def only(report: CheckReport) -> Finding:
    (finding,) = report.findings
    return finding


def test_a_sound_image() -> None:
    assert report_of() == CheckReport(
        findings=[], image_end_offset=7 * SIZE, total_clusters=64, allocated_clusters=2, fragmented_clusters=0
    )


def test_an_image_object_is_checked_by_its_state() -> None:
    class Image:
        state = drawn(refcounts={6: 0}).state()

    assert check(Image()).corruptions == 2


@pytest.mark.parametrize(
    ("refcounts", "finding"),
    [
        (
            {9: 2},
            Finding("leak", Severity.LEAK, "Leaked cluster 9 refcount=2 reference=0", 9 * SIZE, repairable=True),
        ),
        (
            {1: 3},
            Finding(
                "refcount-too-high", Severity.LEAK, "Leaked cluster 1 refcount=3 reference=1", SIZE, repairable=True
            ),
        ),
        (
            {3: 0},
            Finding(
                "refcount-too-low",
                Severity.CORRUPTION,
                "ERROR cluster 3 refcount=0 reference=1",
                3 * SIZE,
                repairable=True,
            ),
        ),
    ],
)
def test_a_wrong_refcount(refcounts: dict[int, int], finding: Finding) -> None:
    report = report_of(clusters=10, refcounts={7: 0, 8: 0, 9: 0, **refcounts})
    assert only(report) == finding
    assert report.leaks + report.corruptions == 1
    assert report.image_end_offset == (10 if 9 in refcounts else 7) * SIZE


def test_a_copied_flag_on_shared_clusters() -> None:
    report = report_of(refcounts={4: 2, 5: 3})
    assert [(f.code, f.text) for f in report.findings if f.severity is Severity.CORRUPTION] == [
        ("copied-flag-l1", f"ERROR OFLAG_COPIED L2 cluster: l1_index=0 l1_entry={4 * SIZE | COPIED:x} refcount=2"),
        ("copied-flag-l2", f"ERROR OFLAG_COPIED data cluster: l2_entry={5 * SIZE | COPIED:x} refcount=3"),
    ]
    assert (report.corruptions, report.leaks) == (2, 2)


def test_a_missing_copied_flag_and_where_it_is() -> None:
    report = report_of(l1=[0, 4 * SIZE | COPIED], tables={4: [5 * SIZE | COPIED, 0, 6 * SIZE]})
    finding = only(report)
    assert finding.code == "copied-flag-l2"
    assert finding.text == f"ERROR OFLAG_COPIED data cluster: l2_entry={6 * SIZE:x} refcount=1"
    assert finding.host_offset == 4 * SIZE + 16
    assert finding.guest_offset == 64 * SIZE + 2 * SIZE
    assert finding.repairable


def test_copied_flags_of_a_table_that_maps_one_run() -> None:
    clusters = 5 + 64
    run = [(5 + index) * SIZE | COPIED for index in range(64)]
    sound = report_of(clusters=clusters, tables={4: run})
    assert sound.findings == []
    assert (sound.allocated_clusters, sound.fragmented_clusters) == (64, 0)
    unset = report_of(clusters=clusters, tables={4: [entry ^ COPIED for entry in run]})
    assert [finding.code for finding in unset.findings] == ["copied-flag-l2"] * 64
    shared = report_of(clusters=clusters, tables={4: run}, refcounts={30: 2})
    assert [finding.text for finding in shared.findings] == [
        "Leaked cluster 30 refcount=2 reference=1",
        f"ERROR OFLAG_COPIED data cluster: l2_entry={30 * SIZE | COPIED:x} refcount=2",
    ]


def test_clusters_of_an_external_data_file_have_the_flag_and_no_refcounts() -> None:
    sketch = drawn(incompatible=4, clusters=5, tables={4: [COPIED, 1 << 40 | COPIED, 3 * SIZE]})
    report = check_state(Qcow2State(sketch.state().storage, sketch.header(), BytesStorage()))
    finding = only(report)
    assert finding.text == f"ERROR OFLAG_COPIED data cluster: l2_entry={3 * SIZE:x} refcount=1"
    assert report.allocated_clusters == 3
    assert report.fragmented_clusters == 2


def test_a_data_file_bit_without_a_data_file() -> None:
    report = report_of(incompatible=4)
    assert only(report).text == "ERROR 'data-file' is required for this image"
    assert report.stopped == "Invalid argument"
    assert report.check_errors == 1


def test_an_overlap_with_right_refcounts_is_a_corruption_of_its_own() -> None:
    tables = {4: [5 * SIZE | COPIED, 6 * SIZE | COPIED, 3 * SIZE]}
    seen = report_of(tables=tables)
    assert [(f.code, f.count) for f in seen.findings] == [
        ("refcount-too-low", 1),
        ("copied-flag-l2", 1),
        ("overlap", 0),
    ]
    hidden = report_of(tables=tables, refcounts={3: 2})
    finding = only(hidden)
    assert finding.text == "ERROR cluster 3 is claimed by two: active L1 table and guest data"
    assert finding.host_offset == 3 * SIZE
    assert not finding.repairable
    assert hidden.corruptions == 1


def test_refcounts_that_cannot_be_read() -> None:
    report = report_of(refcount_table=[2 * SIZE + 512 // 2, 4 * SIZE])
    texts = [finding.text for finding in report.findings]
    assert texts[0] == "ERROR refcount table entry 0 has reserved bits set"
    unaligned = report_of(cluster_bits=10, refcount_table=[2 * 1024 + 512], l1=[], tables={})
    texts = [finding.text for finding in unaligned.findings]
    assert texts[:3] == [
        "ERROR refcount block 0 is not cluster aligned; refcount table entry corrupted",
        "qcow2: Image is corrupt: Refblock offset 0xa00 unaligned (reftable index: 0); "
        "further non-fatal corruption events will be suppressed",
        "Can't get refcount for cluster 0: Input/output error",
    ]
    assert unaligned.check_errors == 7
    assert unaligned.corruptions == 1


def test_a_check_that_cannot_go_on_says_why() -> None:
    report = report_of(snapshots=(1, 6 * SIZE), raw={6: b"\xff" * SIZE})
    assert report.stopped == "File too large"
    assert report.check_errors == 1
    assert report.image_end_offset == 0


def test_more_findings_than_are_listed_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcowlib.metadata.finding_list.FindingList.__init__.__defaults__", (4,))
    report = report_of(clusters=200, refcounts=dict.fromkeys((4, *range(6, 200)), 2))
    assert report.leaks == 195
    assert report.corruptions == 2
    assert [(f.text, f.count) for f in report.findings if f.code == "leak"] == [
        ("Leaked cluster 7 refcount=2 reference=0", 1),
        ("Leaked cluster 8 refcount=2 reference=0", 1),
        ("191 more of the kind 'leak'", 191),
    ]


def test_every_code_is_documented() -> None:
    package = Path(check_module.__file__).parents[1]
    documented = set(re.findall(r"[a-z0-9]+(?:-[a-z0-9]+)+|leak|overlap", check_module.__doc__ or ""))
    used = set()
    for name in ("census", "ledger", "mapping_census", "l2_scan"):
        source = (package / "metadata" / f"{name}.py").read_text()
        used |= set(re.findall(r'(?:add|damage|stop|add_rest|_note)\(\s*(?:\d, *\s*)?"([a-z0-9-]+)"', source))
    source = (package / "operations" / "check.py").read_text()
    used |= set(re.findall(r'(?:findings\.add|add_rest)\("([a-z0-9-]+)"', source))
    assert len(used) > 25
    assert used <= documented
