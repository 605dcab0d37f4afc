"""One real run, shared by the tests of this folder."""

from __future__ import annotations

import pytest

from tests.integration.deploy.runs import WholeRun, run_and_kill


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> WholeRun:
    """Two to three minutes."""
    return run_and_kill(tmp_path_factory.mktemp("whole"))
