"""What `test_ranks` runs under torchrun: the same steps with every ZeRO stage, results written by rank 0.

python -m tests.integration.learner.ranks_job MODEL DIRECTORY
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch

from broker.process.loss_settings import LossSection
from learner.engine import Aggregation, TokenBatch, TrainingError
from learner.losses.policy import policy_loss, supervised_loss
from learner.training.deepspeed_engine import DeepSpeedEngine
from learner.training.ranks import Ranks
from learner.training.worker import leave_group
from tests.integration.learner.samples import engine_settings, mixed_sequences, random_sequences

STAGES = (0, 1, 2, 3)
OBJECTIVE = policy_loss(LossSection(kind="decoupled", reference_kl=0.1))  # needs both of the other policies


@dataclass(frozen=True)
class BrokenOn:
    """The supervised objective, with an infinite loss on one rank only."""

    rank: int
    aggregation: Aggregation = "token"
    needs_proximal: bool = False
    needs_reference: bool = False

    def __call__(self, batch: TokenBatch) -> tuple[torch.Tensor, dict[str, float]]:
        total, stats = supervised_loss(batch)
        return (total * float("inf") if torch.distributed.get_rank() == self.rank else total), stats


@dataclass(frozen=True)
class Refuse:
    """A guard that accepts nothing, and says what it saw."""

    def __call__(self, means: Mapping[str, float]) -> str | None:
        return f"nll {means['nll']:.4f}"


@contextmanager
def engine(ranks: Ranks, model: Path, **learner: Any) -> Iterator[DeepSpeedEngine | None]:
    """The engine on rank 0; None on the others, after they have followed it to its end."""
    made = DeepSpeedEngine(engine_settings(model, **learner), ranks)
    if ranks.rank:
        made.follow()
        yield None
    else:
        yield made
    made.close()


def weights_of(made: DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """A copy of all weights."""
    return {name: tensor.clone() for name, tensor in made.weights()}


def decoupled_steps(made: DeepSpeedEngine) -> list[Mapping[str, float]]:
    """Steps of an objective that compares the policy with two others, in three minibatches."""
    return [made.step(mixed_sequences(), OBJECTIVE, 1e-3) for _ in range(2)]


def steps(made: DeepSpeedEngine, directory: Path) -> dict[str, Any]:
    """What one stage does; compared with the same by one rank."""
    result: dict[str, Any] = {"steps": [made.step(mixed_sequences(), supervised_loss, 1e-3) for _ in range(3)]}
    result["weights"] = weights_of(made)
    result["logprobs"] = made.logprobs(mixed_sequences())
    directory.mkdir()
    made.save(directory)
    result["further"] = [made.step(random_sequences(6, 9), supervised_loss, 1e-3) for _ in range(2)]
    result["further_weights"] = weights_of(made)
    result["refused"] = []
    last = BrokenOn(torch.distributed.get_world_size() - 1)
    for objective, guard in ((BrokenOn(0), None), (last, None), (supervised_loss, Refuse())):
        try:
            made.step(mixed_sequences(), objective, 1e-3, guard)
        except TrainingError as error:
            result["refused"].append(str(error))
    result["after_refusals"] = weights_of(made)
    result["one_sequence"] = made.step(random_sequences(1, 5), supervised_loss, 1e-3)  # nothing for the second rank
    return result


def resumed(made: DeepSpeedEngine, directory: Path) -> dict[str, Any]:
    """A new engine goes on from what `steps` saved."""
    made.load(directory)
    further = [made.step(random_sequences(6, 9), supervised_loss, 1e-3) for _ in range(2)]
    return {"resumed": further, "resumed_weights": weights_of(made)}


def published_by_parts(made: DeepSpeedEngine) -> dict[str, Any]:
    """ZeRO-3 in bf16: versions put together from what each rank says has changed in its part."""
    made.mark_published()
    held = weights_of(made)
    num_changed = []
    for seed in range(3):
        made.step(random_sequences(6, seed), supervised_loss, 1e-5)
        found = [(spec.name, made.changed_weight(spec.name)) for spec in made.weight_layout()]
        if seed == 1:
            made.mark_published()  # as the publisher does; changes nothing, because all was asked for
        for name, changes in found:
            assert changes is not None
            assert (np.diff(changes.positions) > 0).all()
            held[name].view(-1).view(torch.uint16).numpy()[changes.positions] = changes.elements
        num_changed.append(sum(changes.positions.size for _, changes in found if changes is not None))
        live = weights_of(made)
        assert all(torch.equal(live[name], tensor) for name, tensor in held.items())
    total = sum(tensor.numel() for tensor in held.values())
    return {"num_changed": num_changed, "num_elements": total, "live": live, "held": held}


def gathered_at_once(made: DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """ZeRO-3's own way to the whole model; collective, so it is for engines of one rank."""
    parameters = dict(made._worker._engine.module.causal_lm.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def main() -> None:
    """Every stage, three engines each."""
    model, directory = Path(sys.argv[1]), Path(sys.argv[2])
    ranks = Ranks(0, 60.0)
    results: dict[int, dict[str, Any]] = {}
    for stage in STAGES:
        with engine(ranks, model, dtype="float32", zero_stage=stage) as made:
            if made is not None:
                results[stage] = steps(made, directory / f"zero-{stage}")
        with engine(ranks, model, dtype="float32", zero_stage=stage) as made:
            if made is not None:
                results[stage] |= resumed(made, directory / f"zero-{stage}")
        with engine(ranks, model, dtype="float32", zero_stage=stage, minibatches=3) as made:
            if made is not None:
                results[stage]["decoupled"] = decoupled_steps(made)
                results[stage]["decoupled_weights"] = weights_of(made)
    with engine(ranks, model, zero_stage=3) as made:
        if made is not None:
            results[3]["by_parts"] = published_by_parts(made)
    if ranks.rank == 0:
        torch.save(results, directory / "results.pt")
    ranks.close(leave_group)


if __name__ == "__main__":
    np.seterr(all="raise", under="ignore")
    main()
