"""One running service a session and kind: starting it takes seconds, and its tests share nothing but the tenant."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.diffusion.tiny import make_pipeline
from tests.e2e.service import RunningService, running


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases") / "tiny-dit"
    make_pipeline(folder, classes=4)
    return folder


@pytest.fixture(scope="session", params=["embedded", pytest.param("stack", marks=pytest.mark.stack)])
def service(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_base: Path
) -> Iterator[RunningService]:
    settings = {"lease_seconds": "3"}
    if request.param == "stack":
        settings |= request.getfixturevalue("new_stack")()
    with running(tmp_path_factory.mktemp(request.param) / "data", tiny_base, **settings) as service:
        yield service
