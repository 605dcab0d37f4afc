"""Asked for, and not to be had: the sentence says which of model, engine and release is the reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.checkpoint import Shapes
from actors.vllm_engine import refusal_of_router_replay

DENSE: Shapes = {"model.layers.0.mlp.up_proj.weight": (4, 4)}
EXPERTS: Shapes = {"model.layers.0.mlp.experts.3.up_proj.weight": (4, 4)}


@pytest.mark.parametrize(
    ("shapes", "cpu", "reason"),
    [
        (DENSE, True, "model.path = m has no experts among which tokens are routed"),
        (DENSE, False, "model.path = m has no experts among which tokens are routed"),
        (EXPERTS, True, "vLLM's CPU build does not tell which experts a token was routed to"),
        (EXPERTS, False, "trajectories do not carry the experts that vLLM tells of"),
    ],
)
def test_it_is_refused_by_name(shapes: Shapes, cpu: bool, reason: str) -> None:
    refusal = str(refusal_of_router_replay(Path("m"), shapes, cpu))
    assert refusal == f"actor.router_replay = true cannot be had: {reason}; set it to false"
