"""Where the learner's numbers go besides metrics.jsonl and /metrics: the section `[sinks]`. Opens none of them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Literal

from pydantic import Field

from broker.process.lifecycle import ErgonError
from broker.process.section import Section


class SinksSection(Section):
    tensorboard: bool = False
    """Write TensorBoard's event files."""
    tensorboard_directory: Path | None = None
    """Where; not set: `tensorboard` in the run's folder. A resumed run goes on there."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Weights & Biases: `offline` writes files in the run's folder for `wandb sync`, `online` sends them. A resumed run
    is the same run there; its id is in the file `wandb-id` of the run's folder."""
    wandb_project: str = Field(default="ergon", min_length=1, max_length=128)
    """Project there."""
    wandb_entity: str = ""
    """Team or user there; empty: that of the API key."""
    wandb_name: str = ""
    """Name of the run there; empty: `run.name`."""
    queue: int = Field(default=1024, ge=1)
    """Lines of metrics.jsonl that wait for each sink; what a slow sink has no room for is lost to it, and counted."""
    patience_s: float = Field(default=10.0, gt=0)
    """Seconds that the learner's end waits for each sink to take what waits."""


def check_sinks(sinks: SinksSection) -> None:
    """Raise ErgonError where a sink is named whose library is not installed."""
    wanted = [("tensorboard", sinks.tensorboard, "tensorboard"), ("wandb", sinks.wandb != "off", "wandb")]
    for name, is_wanted, package in wanted:
        if is_wanted and importlib.util.find_spec(package) is None:
            value = getattr(sinks, name)
            shown = repr(value) if isinstance(value, str) else str(value).lower()
            raise ErgonError(
                f"sinks.{name} = {shown} needs the Python package {package}, which is not installed; "
                f"type: pip install 'ergon[{name}]', or switch the sink off"
            )
