"""QEMU's own test suite, qemu-iotests, with `qcow` in qemu-img's place.

    python3 tools/iotests.py                          # the whole list of tests that must pass
    python3 tools/iotests.py -o 049 -o 080 --diff     # some of them, with what differs

The runner and its list are found where `QCOWLIB_IOTESTS` says, else in `../shared/iotests`; without them nothing runs,
which is said, and with `CI=true` is a failure. The suite itself is QEMU's source package, which the runner gets through
apt; it is kept in `QEMU_SRC`, else in the user's cache. Other options than those below are the runner's (`-j`, `-o`,
`--out`, `--diff`; see its `--help`).

The exit code is 0 when each test did what is expected of it: it passes, or it fails and is in `KNOWN_FAILURES`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import check

#: Debian packages that the suite needs beside those of the other tests, by a file that shows that one is installed.
PACKAGES = {
    "/usr/bin/dpkg-source": "dpkg-dev",  # unpacks the source
    "/usr/bin/cc": "gcc",  # makes the qtest accelerator, which Debian leaves out of its QEMU
    "/usr/include/stdint.h": "libc6-dev",
}

#: Tests that fail, and why that is right, or what is missing.
KNOWN_FAILURES = {
    # Repairs that the design (D37) rules out: there it goes before the suite.
    "060": "amend and resize --shrink refuse an image with a damaged mapping or refcount structure before they change "
    "anything, where qemu-img goes on until it meets the damage and marks the image as corrupt; check -r repairs what "
    "they would have left at once, where qemu-img gives up in between",
    "271": "qemu-img gives clusters back beside a damaged L2 entry, and leaves that; ours drops it, and says so",
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--qcow", type=Path, help="the program to test (default: that of the check's environment)")
    parser.add_argument("--deadline", type=float, help="seconds after which the run is ended (default: none)")
    parser.add_argument("--list", type=Path, help="file of test names (default: the runner's visible.txt)")
    arguments, runner_options = parser.parse_known_args()
    folder = Path(os.environ.get("QCOWLIB_IOTESTS") or check.ROOT.parent / "shared" / "iotests")
    if not (folder / "run").is_file():
        print(f"iotests SKIPPED: there is no runner in {folder} (QCOWLIB_IOTESTS names another place)")
        return 1 if os.environ.get("CI") == "true" else 0
    try:
        install_packages()
        qcow = arguments.qcow or check.prepare_environment().parent / "qcow"
        tests = arguments.list or folder / "visible.txt"
        results = run_suite([folder / "run", qcow, tests], runner_options, arguments.deadline)
        # Once more: QEMU's own timing is not always in time on a busy machine.
        again = [name for name, status in results.items() if status == "FAIL" and name not in KNOWN_FAILURES]
        if again:
            with tempfile.NamedTemporaryFile("w", suffix=".txt") as names:
                names.write("\n".join(again))
                names.flush()
                command = [folder / "run", qcow, Path(names.name)]
                results |= run_suite(command, runner_options, arguments.deadline)
    except check.Failed as error:
        print(f"iotests failed: {error}")
        return 1
    return judge(results)


def install_packages() -> None:
    """Have everything installed that the suite needs; raises Failed with what to install when that cannot be done."""
    check.install_qemu()
    missing = [package for file, package in PACKAGES.items() if not Path(file).exists()]
    if not missing:
        return
    if not check.is_debian_root():
        raise check.Failed(f"QEMU's tests need packages; run as root: apt-get install {' '.join(missing)}")
    check.apt_install(missing)


def run_suite(command: list[Path], options: list[str], deadline: float | None) -> dict[str, str]:
    """Run the runner; returns PASS, FAIL or SKIP by the tests' names, and raises Failed when it does not end.

    Args:
        command: the runner, the program to test, and the list of tests.
        options: the runner's options.
        deadline: seconds.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    environment = {"QEMU_SRC": str(cache / "qcowlib" / "qemu")} | os.environ
    with tempfile.TemporaryDirectory(prefix="qcowlib-iotests-") as work:
        report = Path(work) / "results.json"
        words: list[str | Path] = [sys.executable, *command, "--jobs", "2", *options, "--json", report]
        with subprocess.Popen(words, env=environment) as runner:
            try:
                code = runner.wait(deadline)
            except subprocess.TimeoutExpired:
                runner.terminate()  # it ends what its tests have started
                raise check.Failed(f"not done within {deadline:.0f} s") from None
        if not report.exists():
            raise check.Failed(f"the runner ended with {code} and told no results")
        return {result["test"]: result["status"] for result in json.loads(report.read_text())}


def judge(results: dict[str, str]) -> int:
    """Print what is not as expected; returns the exit code."""
    unexpected = 0
    for name, status in sorted(results.items()):
        known = KNOWN_FAILURES.get(name)
        if status == "FAIL" and known is not None:
            print(f"{name} fails as known: {known}")
        elif known is not None:
            unexpected += 1
            print(f"{name}: {status}, though it is known to fail ({known}): take it out of KNOWN_FAILURES")
        elif status != "PASS":
            unexpected += 1
            print(f"{name}: {status}, which is not expected")
    passed = sum(status == "PASS" for status in results.values())
    print(f"iotests: {passed} of {len(results)} passed, {unexpected} not as expected")
    return 1 if unexpected else 0


if __name__ == "__main__":
    # Each line appears in its order among the runner's own.
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.exit(main())
