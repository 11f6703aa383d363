"""What every test has: the clock in UTC, quiet hypothesis profiles, the tools' versions in the header, the corpus."""

import os
import platform
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests import oracle
from tests.corpus import archives

# Times in text are compared with the stock tools', which run with the same settings.
os.environ |= {"LC_ALL": "C", "TZ": "UTC"}
time.tzset()

# A shell starts what runs in the background with Ctrl-C ignored, and programs inherit that: tests send them the signal.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Deadlines per example measure the machine's other load, not us. The examples are the same in each run of the check.
hypothesis.settings.register_profile("check", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=2000, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "check"))


def pytest_report_header() -> list[str]:
    tools = ", ".join(f"{name} {number}" for name, number in oracle.versions().items())
    corpus = archives.corpus_source()
    return [
        f"{platform.python_implementation()} {platform.python_version()}, {tools}",
        f"corpus: {corpus or 'missing'}",
    ]


@pytest.fixture(scope="session")
def shared_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One directory for the whole run: the same in every xdist worker."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def corpus(shared_directory: Path) -> Path:
    """Directory of the unpacked corpus; read only, copy an image before writing it.

    Without a corpus the test skips, and fails when `CI=true`.
    """
    source = archives.corpus_source()
    if source is None:
        reason = "the corpus of images is missing: set QCOWLIB_CORPUS to its folder"
        if os.environ.get("CI") == "true":
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    return archives.unpack(source, shared_directory / "corpus")


@pytest.fixture(scope="session")
def manifest(corpus: Path) -> dict[str, Any]:
    """The corpus's manifest; asks for the corpus, so that it skips or fails as that does."""
    return archives.manifest()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The corpus's total, and what tests counted. The properties of a report reach this process from every worker."""
    if archives.corpus_source() is None:
        terminalreporter.write_line(
            "CORPUS MISSING: its tests were not run (set QCOWLIB_CORPUS to its folder)", red=True
        )
    total: Counter[str] = Counter()
    counted: dict[str, Counter[str]] = {}
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.getreports(kind)]
    for report in reports:
        for name, counts in report.user_properties:
            if name == "answers" and report.when == "call":
                total.update(counts)
            if name == "counted" and report.when == "call":
                title, numbers = counts
                counted.setdefault(title, Counter()).update(numbers)
    if total["asked"]:
        right = total["SAME"] + total["STRICTER"]
        asked = total["asked"] - total["NOT_ASKED"]
        terminalreporter.write_line(f"{right} of {asked} answers ({total['STRICTER']} stricter)")
    for title, numbers in counted.items():
        text = ", ".join(f"{number} {label}" for label, number in numbers.items())
        terminalreporter.write_line(f"{title}: {text}")
