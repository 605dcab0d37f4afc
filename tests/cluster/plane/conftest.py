"""One cluster for all tests of this directory. Without `make test-cluster` they are skipped, by the name of what
lacks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.cluster.plane.admission import PodSecurity
from tests.cluster.plane.control import PROGRAMS, ControlPlane
from tests.cluster.plane.front import Front
from tests.cluster.plane.nodes import Nodes
from tests.cluster.plane.release import Cluster, simulated

PROGRAMS_AT = "ERGON_KUBERNETES"


def programs() -> Path:
    """Where build.sh put the control plane's programs; the test is skipped where it did not."""
    directory = Path(os.environ.get(PROGRAMS_AT, "/nowhere"))
    missing = [name for name in PROGRAMS if not (directory / name).exists()]
    if missing:
        pytest.skip(f"{', '.join(missing)} not in ${PROGRAMS_AT}: `make test-cluster` builds them")
    return directory


@pytest.fixture(scope="session")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """The control plane alone, without a node."""
    directory = programs()
    with ControlPlane(tmp_path_factory.mktemp("plane"), directory) as plane, PodSecurity(plane):
        yield plane
    left = psutil.Process().children(recursive=True)
    assert not left, f"processes are left: {left}"


@pytest.fixture(scope="session")
def cluster(plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The control plane with two nodes of eight GPUs, whose pods are processes."""
    directory = tmp_path_factory.mktemp("cluster")
    with Front(plane) as front, Nodes(plane, directory, {"node-1": 8, "node-2": 8}, simulated) as nodes:
        yield Cluster(plane, front, nodes, directory)
