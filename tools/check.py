"""The one check: formatting, lint, types, layers, sizes, all tests, and with the built wheel the tests and QEMU's own.

    python3 tools/check.py

It needs nothing but Python 3.11: it makes its own virtual environment (`.venv-check`) with the test tools and, as root
on Debian, installs the QEMU packages that the tests compare with. The corpus of images is used where it is at hand
(`QCOWLIB_CORPUS`, or `../shared/corpus`), and so is the runner of QEMU's tests (see tools/iotests.py); with `CI=true`
it is a failure that one of them is missing.

The last two lines are the tests' totals and the verdict; the exit code is 0 only when everything holds.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".venv-check"
EXTRAS = "crypto,domain,terminal"

#: The Debian packages that the tests need, by the program that shows that one is installed.
QEMU_PACKAGES = {
    "qemu-img": "qemu-utils",
    "qemu-system-x86_64": "qemu-system-x86",
    "nbdkit": "nbdkit",
    "nbdinfo": "libnbd-bin",
    "strace": "strace",
    "xmllint": "libxml2-utils",
    "virsh": "libvirt-clients",  # with libvirt0, which has the XML schemas
    "virt-qemu-run": "libvirt-daemon-driver-qemu",
    "virt-ssh-helper": "libvirt-daemon",  # helpers of the driver; no daemon is started
}

#: Folders of tests that search for a wrong state at length; the run against the wheel leaves them out.
SEARCHES = ("crash", "faults", "hostile", "interop", "live", "property")

CODE = ("qcowlib", "snapshot", "tools", "tests")
LARGEST_MODULE = 500

#: Seconds for each of the long runs; a hanging run fails instead of waiting for ever.
TESTS_DEADLINE = 24 * 60
WHEEL_DEADLINE = 10 * 60
IOTESTS_DEADLINE = 20 * 60


class Failed(Exception):
    """A step failed; the text says why, where the step's own output does not."""


@dataclass
class Totals:
    """Numbers of tests over all runs."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0

    def add(self, report: Path) -> None:
        """Add the numbers of a JUnit report."""
        for suite in ElementTree.parse(report).getroot().iter("testsuite"):
            count = {name: int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")}
            self.failed += count["failures"] + count["errors"]
            self.skipped += count["skipped"]
            self.passed += count["tests"] - count["failures"] - count["errors"] - count["skipped"]

    def __str__(self) -> str:
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"


@dataclass
class Check:
    """One run: the steps' results and the tests' totals."""

    totals: Totals = field(default_factory=Totals)
    done: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Run one step; its failure is noted and the next one still runs."""
        print(f"== {name}", flush=True)
        began = time.monotonic()
        self.done.append(name)
        try:
            yield
        except Failed as error:
            self.failed.append(name)
            print(f"{name} failed: {error}", flush=True)
        print(f"   {name}: {time.monotonic() - began:.1f} s", flush=True)


def run(
    *command: str | Path, deadline: float | None = None, cwd: Path = ROOT, settings: Mapping[str, str] | None = None
) -> None:
    """Run a command, with these changes to the environment; raises Failed when it fails or does not end."""
    # The caller's Python settings must not lead to packages outside the environment, nor forbid it to keep bytecode.
    foreign = ("PYTHONPATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE")
    environment = {name: value for name, value in os.environ.items() if name not in foreign}
    environment.update(settings or {})
    try:
        code = subprocess.run(command, check=False, cwd=cwd, env=environment, timeout=deadline).returncode
    except subprocess.TimeoutExpired:
        raise Failed(f"{command[0]} did not end within {deadline:.0f} s") from None
    except OSError as error:
        raise Failed(str(error)) from None
    if code != 0:
        raise Failed(f"exit code {code}")


def is_debian_root() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("apt-get") is not None


def apt_install(packages: Sequence[str]) -> None:
    """Install Debian packages without asking; raises Failed."""
    quiet = {"DEBIAN_FRONTEND": "noninteractive"}
    run("apt-get", "update", "-q", settings=quiet)
    run("apt-get", "install", "-q", "-y", "--no-install-recommends", *packages, settings=quiet)


def install_qemu() -> None:
    """Have the stock tools installed; raises Failed with what to install when that cannot be done here."""
    missing = [package for program, package in QEMU_PACKAGES.items() if shutil.which(program) is None]
    if not missing:
        return
    if not is_debian_root():
        raise Failed(f"the tests need QEMU; run as root: apt-get install --no-install-recommends {' '.join(missing)}")
    apt_install(missing)


def requirements(group: str = "dev") -> list[str]:
    """A dependency group of the project; `dev` are the test tools."""
    found: list[str] = _project()["dependency-groups"][group]
    return found


def with_extras(package: str | Path) -> str:
    """The package with all its optional dependencies, as pip wants it."""
    return f"{package}[{','.join(_project()['project']['optional-dependencies'])}]"


def _project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def make_environment(directory: Path) -> Path:
    """Make a virtual environment; returns its Python. Debian's Python needs a package for that."""
    try:
        run(sys.executable, "-m", "venv", "--clear", directory)
    except Failed:
        if not is_debian_root():
            raise Failed("python3 -m venv failed; run as root: apt-get install python3-venv") from None
        apt_install(["python3-venv"])
        run(sys.executable, "-m", "venv", "--clear", directory)
    return directory / "bin" / "python"


def pip_install(python: Path, *packages: str) -> None:
    run(python, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-input", *packages)


def prepare_environment() -> Path:
    """The check's own environment, made anew when the dependencies have changed; returns its Python."""
    python = ENVIRONMENT / "bin" / "python"
    stamp = ENVIRONMENT / "made-for"
    wanted = hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + sys.version.encode()).hexdigest()
    if not (python.exists() and stamp.exists() and stamp.read_text() == wanted):
        make_environment(ENVIRONMENT)
        pip_install(python, "--editable", with_extras(ROOT), *requirements())
        stamp.write_text(wanted)
    return python


def check_sizes() -> None:
    """No module is longer than the design allows."""
    long = [
        f"{path.relative_to(ROOT)} has {lines} lines"
        for folder in CODE
        for path in sorted((ROOT / folder).rglob("*.py"))
        if (lines := len(path.read_bytes().splitlines())) > LARGEST_MODULE
    ]
    if long:
        raise Failed(f"more than {LARGEST_MODULE} lines: " + ", ".join(long))


def pytest(
    python: Path, totals: Totals, *options: str, cwd: Path, deadline: float, settings: Mapping[str, str] | None = None
) -> None:
    """Run pytest with two workers and add its numbers to the totals."""
    with tempfile.TemporaryDirectory(prefix="qcowlib-check-") as work:
        report = Path(work) / "report.xml"
        command: list[str | Path] = [
            python,
            "-m",
            "pytest",
            "-q",
            "-n",
            "2",
            "--tb=short",
            f"--junit-xml={report}",
            *options,
        ]
        try:
            run(*command, cwd=cwd, deadline=deadline, settings=settings)
        finally:
            if report.exists():
                totals.add(report)
            else:
                totals.failed += 1  # no report: the run itself broke


def test_wheel(totals: Totals, work: Path) -> None:
    """Build the wheel and run the tests against it, in an empty environment (work/venv) and away from the checkout."""
    python = make_environment(work / "venv")
    pip_install(python, "--upgrade", "pip")
    run(python, "-m", "pip", "wheel", "-qq", "--no-deps", "--wheel-dir", work, ROOT)
    (wheel,) = work.glob("*.whl")
    runners = [each for each in requirements() if each.startswith(("pytest", "hypothesis"))]
    pip_install(python, with_extras(wheel), *runners)
    copy = work / "copy"
    for folder in ("tests", "fixtures"):
        if (ROOT / folder).is_dir():
            shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, copy)
    code = f"import qcowlib, snapshot; assert all(m.__file__.startswith({str(work)!r}) for m in (qcowlib, snapshot))"
    run(python, "-c", code, cwd=copy)
    corpus = os.environ.get("QCOWLIB_CORPUS") or str(ROOT.parent / "shared" / "corpus")
    settings = {"QCOWLIB_WHEEL": str(wheel)} | ({"QCOWLIB_CORPUS": corpus} if Path(corpus).is_dir() else {})
    # Searches for a wrong state are about the code, which is the same; the others show that the wheel has all of it.
    left_out = [f"--ignore=tests/{folder}" for folder in SEARCHES]
    pytest(python, totals, "-m", "not slow", *left_out, cwd=copy, deadline=WHEEL_DEADLINE, settings=settings)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--fast", action="store_true", help="leave out what is done with the wheel")
    arguments = parser.parse_args()
    check = Check()
    began = time.monotonic()
    with check.step("set-up"):
        install_qemu()
        prepare_environment()
    if not check.failed:
        run_steps(check, wheel=not arguments.fast)
    print(check.totals)
    seconds = time.monotonic() - began
    if check.failed:
        print(f"check FAILED: {', '.join(check.failed)} (of {', '.join(check.done)}) in {seconds:.0f} s")
        return 1
    print(f"check passed: {', '.join(check.done)} in {seconds:.0f} s")
    return 0


def run_steps(check: Check, *, wheel: bool) -> None:
    """Everything after the set-up; each step runs whatever became of the others."""
    python = ENVIRONMENT / "bin" / "python"
    tools = python.parent
    commands: dict[str, Callable[[], None]] = {
        "format": lambda: run(tools / "ruff", "format", "--check", "."),
        "lint": lambda: run(tools / "ruff", "check", "."),
        "types": lambda: run(tools / "mypy"),
        "layers": lambda: run(tools / "lint-imports"),
        "sizes": check_sizes,
        "demo": lambda: run(python, ROOT / "tools" / "demo.py", "--no-setup"),
        "tests": lambda: pytest(python, check.totals, "--durations=15", cwd=ROOT, deadline=TESTS_DEADLINE),
    }
    for name, command in commands.items():
        with check.step(name):
            command()
    if wheel:
        with tempfile.TemporaryDirectory(prefix="qcowlib-wheel-") as work:
            with check.step("wheel"):
                test_wheel(check.totals, Path(work))
            with check.step("iotests"):
                qcow = Path(work) / "venv" / "bin" / "qcow"
                deadline = f"--deadline={IOTESTS_DEADLINE}"
                run(sys.executable, ROOT / "tools" / "iotests.py", "--qcow", qcow, deadline)


if __name__ == "__main__":
    # Each line appears in its order among the commands' own.
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.exit(main())
