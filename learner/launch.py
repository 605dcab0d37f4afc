"""Starts `learner.ranks` ranks on this machine with torch's own launcher. Owns their lives, nothing of the training.

Under another launcher (torchrun over several machines, Kubernetes) nothing here runs: the ranks are there already.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from broker.process.lifecycle import ErgonError
from broker.process.settings import Settings

logger = logging.getLogger(__name__)


def is_needed(settings: Settings) -> bool:
    """Whether this process is to start ranks instead of being one."""
    return settings.learner.ranks > 1 and "RANK" not in os.environ


def launch(settings: Settings, arguments: Sequence[str]) -> int:
    """Run `python -m learner ARGUMENTS` once for each rank, and wait; the exit code of the learner as a whole.

    A rank that fails ends the others; its exit code is the result. SIGTERM goes to every rank, and what they do with it
    is theirs: rank 0 checkpoints and ends the others.
    """
    import torch  # takes seconds, and only launching needs it
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    num_ranks = settings.learner.ranks
    num_devices = torch.cuda.device_count()
    if 0 < num_devices < num_ranks:
        raise ErgonError(f"learner.ranks = {num_ranks}, but this machine has {num_devices} GPUs; a rank needs its own")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        run_id=settings.run.name,
        rdzv_backend="static",
        rdzv_endpoint=f"127.0.0.1:{settings.learner.master_port}",
        rdzv_configs={"rank": 0},
        max_restarts=0,  # a rank alone cannot be replaced; who started this process starts all of them again
        shutdown_timeout=int(settings.supervisor.grace_s),
    )
    # Ranks that this process cannot end, because it was killed, end by themselves, and at once: who started it will
    # start it again, and a rank that takes its time to end would still hold the ports.
    os.environ["ERGON_DIE_WITH_PARENT"] = "killed"
    os.environ.setdefault("OMP_NUM_THREADS", str(settings.learner.threads))  # or the launcher decides, and says so
    try:
        elastic_launch(config, sys.executable)("-m", "learner", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        logger.error("rank %d ended first exit_code=%d", rank, failure.exitcode)
        return failure.exitcode if failure.exitcode > 0 else 1
    except SignalException as error:
        logger.info("the ranks were ended signal=%s", error.sigval.name)
    return 0
