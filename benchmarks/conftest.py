"""Options of ``pytest benchmarks/``, and the fixture of every benchmark."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from harness import Measure


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds ``--rows``, ``--seconds`` and ``--tiny``."""
    group = parser.getgroup("fastperc")
    group.addoption("--rows", type=Path, metavar="FILE", help="append each row to FILE when it is measured")
    group.addoption(
        "--seconds",
        type=float,
        default=0.3,
        help="time to spend on the rounds of one measurement (default: %(default)s)",
    )
    group.addoption("--tiny", action="store_true", help="run the smallest case of each file only, to try the code")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With ``--tiny`` keeps the smallest case of each file, with all its providers."""
    if not config.getoption("--tiny"):
        return
    cases = {item: item.callspec.params["case"] for item in items}  # type: ignore[attr-defined]
    smallest: dict[Path, Any] = {}
    for item, case in sorted(cases.items(), key=lambda pair: elements(pair[1])):
        smallest.setdefault(item.path, case)
    items[:] = [item for item, case in cases.items() if case.id == smallest[item.path].id]


def elements(case: Any) -> int:
    """The elements of a case's input, from its shape as text: "4x3x256x256, relu1_2"."""
    return math.prod(map(int, re.findall(r"\d+", case.shape.partition(",")[0])))


@pytest.fixture(scope="session", autouse=True)
def _no_tables(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No tuned table is read: backends are chosen as on a machine that was never tuned."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def measure(benchmark: Any, request: pytest.FixtureRequest) -> Measure:
    """Checks and times a provider on a case; see ``harness.measure``."""
    from harness import measure

    seconds, rows_file = request.config.getoption("--seconds"), request.config.getoption("--rows")
    return lambda case, provider: measure(benchmark, case, provider, seconds, rows_file)
