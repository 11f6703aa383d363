"""The package as it is installed: names, version, typing marker, command; and what the wheel has in it."""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import qcowlib
import snapshot

#: The wheel under test, named by the check command when it runs these tests against one.
WHEEL = os.environ.get("QCOWLIB_WHEEL")

CHECKOUT = Path(__file__).resolve().parent.parent


def run_python(code: str, **settings: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, env=os.environ | settings
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel: the given one, or one built from the checkout."""
    if WHEEL:
        return Path(WHEEL)
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--wheel-dir", folder, CHECKOUT], check=True)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_the_two_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    roots = {name.split("/")[0] for name in names}
    assert roots == {"qcowlib", "snapshot", f"qcowlib-{qcowlib.__version__}.dist-info"}
    assert {"qcowlib/py.typed", "snapshot/py.typed", "qcowlib/cli/main.py"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if "test" in name.lower()]


def test_the_wheel_imports_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    """Without any dependency the packages import, and `--help` works: start-up needs neither numpy nor construct."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import qcowlib, snapshot, qcowlib.cli.main as m\n"
        "assert qcowlib.__file__.startswith(sys.argv[1])\n"
        "try: m.main(['--help'])\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'numpy', 'construct'} & sys.modules.keys()"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, tmp_path], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "snapshot" in done.stdout


def test_the_version_is_that_of_the_distribution() -> None:
    assert metadata.version("qcowlib") == qcowlib.__version__


def test_every_public_name_exists_and_has_a_docstring() -> None:
    for name in qcowlib.__all__:
        assert getattr(qcowlib, name).__doc__, name
    assert set(qcowlib.__all__) <= set(dir(qcowlib))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = qcowlib.no_such_name


def test_the_snapshot_package_has_its_own_errors() -> None:
    from snapshot.errors import DomainSnapshotError

    assert snapshot.__doc__
    assert issubclass(DomainSnapshotError, Exception)


def test_importing_the_package_loads_neither_numpy_nor_construct() -> None:
    loaded = run_python("import qcowlib, sys; print({'numpy', 'construct'} & sys.modules.keys() or 'none')")
    assert loaded == "none"


def test_the_command_is_installed() -> None:
    command = Path(sys.executable).with_name("qcow")
    assert shutil.which(command), f"{command} is missing: pip install --editable ."
    done = subprocess.run([command, "--help"], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    for verb in ("create", "info", "check", "map", "snapshot", "convert", "dd"):
        assert verb in done.stdout


def run_example(word: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """Run the README's Python example that has this word in it."""
    blocks = (CHECKOUT / "README.md").read_text().split("```python\n")[1:]
    (code,) = (block.split("```")[0] for block in blocks if word in block.split("```")[0])
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd=directory)
    assert done.returncode == 0, done.stderr
    return done


def test_the_backup_of_the_readme_runs(tmp_path: Path) -> None:
    disk = tmp_path / "disk.qcow2"
    qcowlib.create_image(disk, 1 << 20)
    with qcowlib.open_image(disk, writable=True) as image:
        qcowlib.create_snapshot(image, "last-backup")
        image.write(1 << 16, b"changed")
    run_example("changed_extents", tmp_path)
    assert (tmp_path / "increment").read_bytes() == bytes(1 << 16) + b"changed".ljust(1 << 16, b"\0")


def test_the_example_of_the_readme_runs(tmp_path: Path) -> None:
    done = run_example("create_image", tmp_path)
    assert done.stdout.splitlines()[:2] == ["b'other state'", "b'first state'"]
    assert done.stdout.splitlines()[-1] == "[]"
