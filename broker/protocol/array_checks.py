"""What the three arrays of a parcel must be: token ids, loss mask and log-probs of all its segments, in a row.

Owns those rules. All segments are checked at once; which one is wrong is looked for only when one is. Never copies a
large array, never looks at a head or a ticket.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Final

import numpy as np
import numpy.typing as npt

from broker.protocol.errors import ErrorCode, ProtocolError
from broker.protocol.frames import Array

ARRAY_NAMES: Final = ("token_ids", "loss_mask", "logprobs")
ARRAY_DTYPES: Final = (np.dtype("<i4"), np.dtype("|b1"), np.dtype("<f4"))
MAX_LOGPROB: Final = 1e-3  # rounding may lift a certain token's log-prob a little above 0
LOWEST_LOGPROB: Final = float(np.finfo(np.float32).min)
SHORT_TOKENS: Final = 4096  # segments shorter than this on average are counted together
BLOCK_TOKENS: Final = 1 << 18  # checked at once, so that a large trajectory is not copied in the checking

# The methods of an array that do the same take as long again to get there.
_LOWEST: Final = np.minimum.reduce
_HIGHEST: Final = np.maximum.reduce
_ANY: Final = np.logical_or.reduce


def check_arrays(
    arrays: Sequence[Array], lengths: Sequence[int], sampled: Sequence[int], where: Callable[[int], str]
) -> None:
    """Raise ProtocolError (BAD_MESSAGE) unless the arrays, of the right types and of one dimension, are well-formed.

    `lengths`, `sampled`: by segment, its tokens and those that its version runs count. `where`: the name of the
    segment with this number, for the error.
    """
    token_ids_N, mask_N, logprobs_N = arrays
    num_tokens = sum(lengths)
    if not token_ids_N.size == mask_N.size == logprobs_N.size == num_tokens:
        for name, array in zip(ARRAY_NAMES, arrays, strict=True):
            if array.size != num_tokens:
                raise _bad(f"{name} has {array.size} elements, the segments count {num_tokens} tokens")
    mask_bytes_N = mask_N.view(np.uint8)
    starts = list(accumulate(lengths[:-1], initial=0))
    if (
        _LOWEST(token_ids_N) < 0
        or _HIGHEST(mask_bytes_N) > 1
        or not _logprobs_agree(logprobs_N, mask_N)
        or _count_sampled(mask_bytes_N, starts) != sampled
    ):
        for i, start in enumerate(starts):
            span = slice(start, start + lengths[i])
            _check_segment(token_ids_N[span], mask_bytes_N[span], logprobs_N[span], sampled[i], where(i))
        raise AssertionError("all segments together are wrong, and none of them is")


def _count_sampled(mask_bytes_N: npt.NDArray[np.uint8], starts: list[int]) -> list[int]:
    """Sampled tokens by segment."""
    if mask_bytes_N.size < SHORT_TOKENS * len(starts):  # but it makes a copy of eight times the mask
        counts: list[int] = np.add.reduceat(mask_bytes_N, starts, dtype=np.int64).tolist()
        return counts
    return [int(np.count_nonzero(part)) for part in np.split(mask_bytes_N, starts[1:])]


def _logprobs_agree(logprobs_N: npt.NDArray[np.float32], mask_N: npt.NDArray[np.bool_]) -> bool:
    """Whether they are within bounds, and 0 wherever the mask is False; NaN fails every comparison."""
    for start in range(0, logprobs_N.size, BLOCK_TOKENS):
        block_N, sampled_N = logprobs_N[start : start + BLOCK_TOKENS], mask_N[start : start + BLOCK_TOKENS]
        if not (_LOWEST(block_N) >= LOWEST_LOGPROB and _HIGHEST(block_N) <= MAX_LOGPROB):
            return False
        if _ANY((block_N != 0) > sampled_N):
            return False
    return True


def _check_segment(
    token_ids_T: npt.NDArray[np.int32],
    mask_bytes_T: npt.NDArray[np.uint8],
    logprobs_T: npt.NDArray[np.float32],
    num_sampled: int,
    where: str,
) -> None:
    if token_ids_T.min() < 0:
        raise _bad(f"{where}: token id {token_ids_T.min()}; ids are not negative")
    if mask_bytes_T.max() > 1:
        raise _bad(f"{where}: loss_mask holds byte {mask_bytes_T.max()}; a mask byte is 0 or 1")
    mask_T = mask_bytes_T.view(np.bool_)
    sampled_N, others_N = logprobs_T[mask_T], logprobs_T[~mask_T]
    wrong_N = sampled_N[~(np.isfinite(sampled_N) & (sampled_N <= MAX_LOGPROB))]
    if wrong_N.size:
        raise _bad(f"{where}: log-prob {wrong_N[0]}; those of sampled tokens are finite and at most {MAX_LOGPROB}")
    wrong_N = others_N[others_N != 0]
    if wrong_N.size:
        raise _bad(f"{where}: log-prob {wrong_N[0]} of a token that was not sampled; there it must be 0")
    if num_sampled != (num_masked := int(np.count_nonzero(mask_T))):
        raise _bad(f"{where}: the version runs count {num_sampled} tokens, the loss mask {num_masked}")


def _bad(text: str) -> ProtocolError:
    return ProtocolError(ErrorCode.BAD_MESSAGE, text)
