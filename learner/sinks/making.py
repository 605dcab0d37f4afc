"""From the settings to sinks. Imports a library only where its sink is wanted."""

from __future__ import annotations

from typing import Any

from broker.process.settings import Settings
from broker.process.sink_settings import check_sinks
from learner.sinks.fanout import Sink, Sinks
from learner.state import TrainerState


def open_sinks(settings: Settings, state: TrainerState) -> Sinks:
    """The run's sinks. Raises ErgonError where a library is missing; what fails later stops nothing."""
    section = settings.sinks
    check_sinks(section)
    config: dict[str, Any] = _without_none(settings.model_dump(mode="json"))
    sinks: list[Sink] = []
    if section.tensorboard:
        from learner.sinks.tensorboard import TensorboardSink

        directory = section.tensorboard_directory or settings.run_dir / "tensorboard"
        purge = {"step": state.step + 1, "warm_start": state.warm_start_step + 1}
        sinks.append(TensorboardSink(directory, config, purge))
    if section.wandb != "off":
        from learner.sinks.weights_and_biases import WandbSink

        name = section.wandb_name or settings.run.name
        place = (section.wandb, section.wandb_project, section.wandb_entity, name)
        sinks.append(WandbSink(settings.run_dir, config, *place))
    return Sinks(sinks, section.queue, section.patience_s)


def _without_none(value: Any) -> Any:
    """TOML has no null."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value
