"""Free ports for tests that start processes of a run."""

from __future__ import annotations

import contextlib
import socket

PORT_KEYS = (
    "broker.port",
    "weights.port",
    "weights.relay_port",
    "learner.master_port",
    "metrics.broker_port",
    "metrics.relay_port",
    "metrics.learner_port",
    "metrics.actor_port",
    "gateway.port",
)


def free_ports(num: int) -> list[int]:
    """Ports of loopback that nobody holds at this moment, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(num)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def port_overrides() -> list[str]:
    """--set values that put every port of a run on a free one."""
    return [f"{key}={port}" for key, port in zip(PORT_KEYS, free_ports(len(PORT_KEYS)), strict=True)]
