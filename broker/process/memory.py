"""How the C library's allocator treats large blocks of this process.

By default it maps memory anew for every large message and unmaps it afterwards, so that each of its pages is fetched
from the kernel, zeroed and given back again: for messages of a quarter of a megabyte and more, that costs as much as
receiving them. Owns that one setting; never allocates.
"""

from __future__ import annotations

import ctypes
import logging
from typing import Final

logger = logging.getLogger(__name__)

# mallopt(3), from malloc.h
_M_TRIM_THRESHOLD: Final = -1
_M_TOP_PAD: Final = -2
_M_MMAP_THRESHOLD: Final = -3

MMAP_THRESHOLD_BYTES: Final = 32 << 20  # the largest that the C library takes
KEEP_BYTES: Final = 256 << 20  # of free memory, before it goes back to the kernel
TOP_PAD_BYTES: Final = 16 << 20  # the heap grows by so much at a time


def keep_freed_memory() -> None:
    """Let freed blocks be used again without going through the kernel. Without effect where the C library has no
    mallopt, which the log says."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        logger.info("The C library has no mallopt; large messages cost page faults.")
        return
    for option, value in (
        (_M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES),
        (_M_TRIM_THRESHOLD, KEEP_BYTES),
        (_M_TOP_PAD, TOP_PAD_BYTES),
    ):
        if not mallopt(option, value):
            logger.warning("mallopt refused a setting. option=%d value=%d", option, value)
