"""Domains that end with their test."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.live.rig import Rig


@pytest.fixture(autouse=True)
def state_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where catalogs are by default: not the user's."""
    home = tmp_path_factory.mktemp("state")
    monkeypatch.setenv("XDG_STATE_HOME", str(home))
    return home


@pytest.fixture
def faults(record_property: Callable[[str, object], None]) -> Callable[[int, int], None]:
    """Count faults that were injected and outcomes that were clean; the run's sums stand in its summary."""

    def count(injected: int, clean: int) -> None:
        record_property("counted", ("faults in domain operations", {"injected": injected, "clean outcomes": clean}))
        assert injected == clean > 0

    return count


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Callable[..., Rig]]:
    """Make a domain: `rig("qcow2", "raw", memory=4)`."""
    rigs: list[Rig] = []

    def make(*formats: str, **options: int) -> Rig:
        rigs.append(Rig(tmp_path, *formats, **options))  # type: ignore[arg-type]
        return rigs[-1]

    yield make
    for one in rigs:
        one.close()
