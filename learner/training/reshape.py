"""A checkpoint of another number of ranks for the ranks that there are, through DeepSpeed's universal form.

Owns the conversion's folder, beside the checkpoints and hidden: it is as large as a checkpoint, is made by rank 0 when
it is needed, read by all, and removed. Nothing is rounded: master copy and moments are the saved numbers, cut anew.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deepspeed.checkpoint import ds_to_universal

from learner.training.ranks import Ranks

logger = logging.getLogger(__name__)

_SCRATCH = ".tmp-universal"
_ZERO_3 = "zero_pp_rank_0_mp_rank_00_model_states.pt"


def layout(directory: Path) -> tuple[int, bool]:
    """Of what DeepSpeed saved in this folder: how many ranks, and whether the weights were divided among them."""
    return len(list(directory.glob("*_optim_states.pt"))), (directory / _ZERO_3).exists()


@contextmanager
def universal(engine: Any, ranks: Ranks, directory: Path, tag: str) -> Iterator[Path]:
    """Within it, the engine's `load_checkpoint` reads the yielded folder, which holds the checkpoint in `directory` for
    any ranks. Collective; the folder is on a disk that all ranks share, as the checkpoints are."""
    scratch = directory.parent.parent / _SCRATCH
    if ranks.rank == 0:
        logger.info("converting a checkpoint of other ranks from=%s", directory)
        shutil.rmtree(scratch, ignore_errors=True)
        _convert(directory / tag, scratch / tag)
    ranks.gather(None)
    engine._config.load_universal_checkpoint = True
    try:
        yield scratch
    finally:
        engine._config.load_universal_checkpoint = False
    ranks.gather(None)
    if ranks.rank == 0:
        shutil.rmtree(scratch)


def _convert(source: Path, target: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # progress bars
        ds_to_universal.main(
            argparse.Namespace(
                input_folder=str(source),
                output_folder=str(target),
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,
            )
        )
