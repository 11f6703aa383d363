"""Measure qcow and qcowlib side by side with qemu-img, dissect.hypervisor and libqcow; print one Markdown table.

    python3 tools/bench.py [--only NAME ...] [--quick] [--rounds N] [--work DIRECTORY]

Everything runs in processes of its own. The programs take turns within each round, so that a busy moment of the
machine meets all of them; the table has the medians of the rounds. Ratios are the other's time by ours: above 1 we are
faster. `functions` runs the pytest benchmarks of single functions instead. It makes its own virtual environment
(`.venv-bench`) and needs qemu-img and a few GiB of room.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import check

ENVIRONMENT = check.ROOT / ".venv-bench"
IMAGES = Path(__file__).with_name("bench_images.py")
LOOPS = Path(__file__).with_name("bench_loops.py")

KIB, MIB, GIB, TIB = (1 << shift for shift in (10, 20, 30, 40))


class Sample(NamedTuple):
    """One run: wall-clock seconds, and the process's largest resident memory in MiB."""

    seconds: float
    peak_mib: float


class Line(NamedTuple):
    """One row of the table: what, whose time against whose, and the goal as text."""

    name: str
    ours: list[Sample]
    other_name: str
    other: list[Sample]
    goal: str = ""

    def markdown(self) -> str:
        ours, other = (statistics.median(sample.seconds for sample in side) for side in (self.ours, self.other))
        peaks = [statistics.median(sample.peak_mib for sample in side) for side in (self.ours, self.other)]
        return (
            f"| {self.name} | {ours:.3f} s | {self.other_name} {other:.3f} s | {other / ours:.2f} |"
            f" {peaks[0]:.0f} MiB | {peaks[1]:.0f} MiB | {self.goal} |"
        )


HEADER = (
    "| what | ours | other | other / ours | our peak | other's peak | goal |\n"
    "|------|------|-------|--------------|----------|--------------|------|"
)


class Settings(NamedTuple):
    """How much to measure."""

    work: Path
    rounds: int
    quick: bool

    def scaled(self, full: int, quick: int) -> int:
        return quick if self.quick else full


def measure(*command: str | Path) -> Sample:
    """Run a process to its end; it must succeed."""
    os.sync()  # nobody pays for what another one wrote
    with open(os.devnull, "wb") as nothing:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=nothing, stdin=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        sys.exit(f"{command} ended with {process.returncode}")
    return Sample(seconds, usage.ru_maxrss / 1024)


def measure_loop(*arguments: str | Path) -> Sample:
    """Run one of the loops of bench_loops.py; its own clock counts, not the process's."""
    process = subprocess.Popen([sys.executable, LOOPS, *arguments], stdout=subprocess.PIPE)
    assert process.stdout is not None
    seconds = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        sys.exit(f"{arguments} ended with {process.returncode}")
    return Sample(float(seconds), usage.ru_maxrss / 1024)


def alternate(rounds: int, *runs: Callable[[], Sample]) -> list[list[Sample]]:
    """The samples of each run; all of them take turns, after one round that does not count."""
    for run in runs:
        run()
    samples: list[list[Sample]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, kept in zip(runs, samples, strict=True):
            kept.append(run())
    return samples


def make_image(kind: str, path: Path, size: int) -> Path:
    """Make an image in a process of its own (see bench_images.py)."""
    subprocess.run([sys.executable, IMAGES, kind, path, str(size)], check=True)
    return path


def copy_sparse(source: Path, target: Path) -> Path:
    """A copy with the same holes."""
    subprocess.run(["cp", "--sparse=always", "--reflink=auto", source, target], check=True)
    return target


def qcow() -> str:
    return str(Path(sys.executable).with_name("qcow"))


def bench_snapshots(settings: Settings) -> Iterator[Line]:
    """Create, apply, delete on a disk with all metadata allocated; a fresh copy for each program and round."""
    size = settings.scaled(TIB, 64 * GIB)
    image = make_image("preallocated", settings.work / "preallocated.qcow2", size)
    verbs = {"create": "-c", "apply": "-a", "delete": "-d"}
    programs = {"ours": qcow(), "qemu-img": "qemu-img"}
    samples: dict[tuple[str, str], list[Sample]] = {(verb, name): [] for verb in verbs for name in programs}
    for _ in range(settings.rounds):
        for name, program in programs.items():
            copy = copy_sparse(image, settings.work / "copy.qcow2")
            for verb, option in verbs.items():
                samples[verb, name].append(measure(program, "snapshot", option, "one", copy))
            copy.unlink()
    for verb in verbs:
        goal = "8 times, under 400 MiB"
        yield Line(
            f"snapshot {verb}, {size // GIB} GiB metadata",
            samples[verb, "ours"],
            "qemu-img",
            samples[verb, "qemu-img"],
            goal,
        )
    image.unlink()


def bench_check(settings: Settings) -> Iterator[Line]:
    size = settings.scaled(TIB, 64 * GIB)
    cases = (
        (f"check, {size // GIB} GiB metadata", "preallocated", size, "3 times, under 300 MiB"),
        ("check, 64 Ki separate clusters", "scattered", 4 * GIB, "within 0.3 s"),
    )
    for name, kind, disk_size, goal in cases:
        image = make_image(kind, settings.work / "check.qcow2", disk_size)
        ours, other = alternate(
            settings.rounds,
            partial(measure, qcow(), "check", image),
            partial(measure, "qemu-img", "check", image),
        )
        yield Line(name, ours, "qemu-img", other, goal)
        image.unlink()


def bench_startup(settings: Settings) -> Iterator[Line]:
    image = settings.work / "small.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "1G"], check=True)
    rounds = settings.rounds * 4
    bare, helped, informed, stock = alternate(
        rounds,
        lambda: measure(sys.executable, "-I", "-c", "pass"),
        lambda: measure(qcow(), "--help"),
        lambda: measure(qcow(), "info", image),
        lambda: measure("qemu-img", "info", image),
    )
    yield Line("qcow --help", helped, "bare Python", bare, "within 0.080 s where Python needs 0.015 s")
    yield Line("qcow info", informed, "bare Python", bare, "within 0.250 s where Python needs 0.015 s")
    yield Line("qcow info", informed, "qemu-img", stock)
    image.unlink()


def bench_reads(settings: Settings) -> Iterator[Line]:
    """Random reads of 4 KiB and reads in order of 1 MiB, through each reader's Python interface."""
    size = settings.scaled(2 * GIB, 512 * MIB)
    image = make_image("scattered-filled", settings.work / "reads.qcow2", size)
    for loop, count, goal in (
        ("random-read", settings.scaled(100_000, 10_000), "5 times dissect.hypervisor"),
        ("sequential-read", size // MIB, ""),
    ):
        ours, dissect, pyqcow = alternate(
            settings.rounds,
            *(partial(measure_loop, loop, reader, image, str(count)) for reader in ("qcowlib", "dissect", "pyqcow")),
        )
        name = f"{loop}, {count} of {'4 KiB' if loop == 'random-read' else '1 MiB'}"
        yield Line(name, ours, "dissect.hypervisor", dissect, goal)
        yield Line(name, ours, "libqcow", pyqcow)
    image.unlink()


def bench_write(settings: Settings) -> Iterator[Line]:
    """Writing in order into a new image, in pieces of 1 MiB, with one flush at the end."""
    count = settings.scaled(1024, 128)
    image = settings.work / "write.qcow2"

    def fresh() -> None:
        image.unlink(missing_ok=True)
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, str(count * MIB)], check=True)

    def ours() -> Sample:
        fresh()
        return measure_loop("sequential-write", "qcowlib", image, str(count))

    def stock() -> Sample:
        fresh()
        options = ["-w", "-f", "qcow2", "-t", "writeback", "-d", "1", "-s", str(MIB), "-c", str(count)]
        return measure("qemu-img", "bench", *options, image)

    mine, other = alternate(settings.rounds, ours, stock)
    yield Line(f"sequential write, {count} of 1 MiB", mine, "qemu-img bench", other)
    image.unlink()


def bench_convert(settings: Settings) -> Iterator[Line]:
    """Whole conversions; the target is made anew each time, and is on disk at the end or (unsafe) need not be."""
    image = make_image("scattered-filled", settings.work / "source.qcow2", settings.scaled(GIB, 512 * MIB))
    raw, target = settings.work / "source.raw", settings.work / "target"
    subprocess.run(["qemu-img", "convert", "-O", "raw", image, raw], check=True)

    def run(program: str, *options: str | Path) -> Sample:
        target.unlink(missing_ok=True)
        return measure(program, "convert", *options, target)

    cases: dict[str, tuple[str | Path, ...]] = {}
    for mode in ("unsafe", "writeback"):
        cases[f"convert qcow2 to raw, -t {mode}"] = ("-t", mode, "-f", "qcow2", "-O", "raw", image)
        cases[f"convert raw to qcow2, -t {mode}"] = ("-t", mode, "-f", "raw", "-O", "qcow2", raw)
    cases["convert qcow2 to compressed"] = ("-c", "-f", "qcow2", "-O", "qcow2", image)
    for name, options in cases.items():
        ours, other = alternate(settings.rounds, partial(run, qcow(), *options), partial(run, "qemu-img", *options))
        yield Line(name, ours, "qemu-img", other)
    for path in (image, raw, target):
        path.unlink()


def bench_states(settings: Settings) -> Iterator[Line]:
    """What is told of all states of an image: differences and space from metadata, digests from the content."""
    size = settings.scaled(TIB, 64 * GIB)
    image = make_image("preallocated", settings.work / "states.qcow2", size)
    for name in ("one", "two"):
        subprocess.run([qcow(), "snapshot", "-c", name, image], check=True)
        # One cluster under each L2 table: no table is shared with the snapshot any more.
        writes = "".join(f"write -q {offset} 64k\n" for offset in range(0, size, GIB // 2))
        subprocess.run(
            ["qemu-io", "-f", "qcow2", image], input=writes, text=True, check=True, stdout=subprocess.DEVNULL
        )
    goal = "within 1 s and 300 MiB"
    for name, words in (
        ("diff of two snapshots", ("diff", "--old-snapshot", "one", "--new-snapshot", "two")),
        ("space", ("space",)),
    ):
        ours, other = alternate(
            settings.rounds,
            partial(measure, qcow(), *words, image),
            partial(measure, "qemu-img", "check", image),
        )
        yield Line(f"{name}, {size // GIB} GiB metadata", ours, "qemu-img check", other, goal)
    image.unlink()
    yield from _bench_digest(settings)


def _bench_digest(settings: Settings) -> Iterator[Line]:
    image = make_image("scattered-filled", settings.work / "digest.qcow2", settings.scaled(GIB, 512 * MIB))
    single = copy_sparse(image, settings.work / "single.qcow2")
    for number in range(10):
        subprocess.run([qcow(), "snapshot", "-c", f"s{number}", image], check=True)
        writes = "".join(f"write -q -P {number} {offset} 64k\n" for offset in range(number * MIB, 512 * MIB, 100 * MIB))
        subprocess.run(
            ["qemu-io", "-f", "qcow2", image], input=writes, text=True, check=True, stdout=subprocess.DEVNULL
        )
    for algorithm in ("sha256", "xxh3-128"):
        ours, other = alternate(
            settings.rounds,
            partial(measure, qcow(), "digest", "--algorithm", algorithm, image),
            partial(measure, qcow(), "digest", "--algorithm", algorithm, single),
        )
        yield Line(f"digest {algorithm}, 11 states", ours, "one state", other, "at most 1.3 times one state")
    image.unlink()
    single.unlink()


BENCHES: dict[str, Callable[[Settings], Iterator[Line]]] = {
    "snapshots": bench_snapshots,
    "check": bench_check,
    "startup": bench_startup,
    "reads": bench_reads,
    "write": bench_write,
    "convert": bench_convert,
    "states": bench_states,
}


def run_functions() -> None:
    """The pytest benchmarks of single functions."""
    command = [sys.executable, "-m", "pytest", "-q", "tests/benchmarks", "--benchmark-enable", "--benchmark-only"]
    subprocess.run(command, check=True, cwd=check.ROOT)


def set_up() -> Path:
    """The benchmark's own environment: the package, its test tools and the other readers; returns its Python."""
    python = ENVIRONMENT / "bin" / "python"
    if not python.exists():
        check.make_environment(ENVIRONMENT)
    check.pip_install(python, check.with_extras(check.ROOT), *check.requirements(), *check.requirements("bench"))
    return python


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--only", action="append", choices=[*BENCHES, "functions"], help="run this one; may be repeated"
    )
    parser.add_argument("--quick", action="store_true", help="smaller images and one round: does it work at all")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds of each benchmark (5)")
    parser.add_argument("--work", type=Path, help="directory for the images (a temporary one)")
    parser.add_argument("--no-setup", action="store_true", help="use the packages that this Python has")
    arguments = parser.parse_args()
    if not arguments.no_setup:
        return subprocess.run([set_up(), __file__, "--no-setup", *sys.argv[1:]], check=False).returncode
    names = arguments.only or list(BENCHES)
    with tempfile.TemporaryDirectory(prefix="qcowlib-bench-", dir=arguments.work) as work:
        settings = Settings(Path(work), 1 if arguments.quick else arguments.rounds, arguments.quick)
        print(HEADER, flush=True)
        for name in names:
            if name in BENCHES:
                for line in BENCHES[name](settings):
                    print(line.markdown(), flush=True)
    if "functions" in names:
        run_functions()
    return 0


if __name__ == "__main__":
    sys.exit(main())
