"""Where the learner's numbers go for those who look at them elsewhere: TensorBoard, Weights & Biases."""

from learner.sinks.fanout import Sinks
from learner.sinks.making import open_sinks

__all__ = ["Sinks", "open_sinks"]
