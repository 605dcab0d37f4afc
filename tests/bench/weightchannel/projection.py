"""Arithmetic from the measured figures to models and links that were not measured. Measures nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tests.bench.weightchannel.codec import Codec

MODELS = {"7B": 7e9, "70B": 70e9, "1T": 1e12}
LINKS_GBIT = (1, 10, 100)
BYTES_PER_PARAMETER = 2  # bf16
MANY_CORES = 64


class Projected(NamedTuple):
    """One model on one link, seconds. `core_s` is of one core: encode, decode, apply, and both total hashes."""

    model: str
    gbit: int
    snapshot_gb: float
    delta_gb: float
    snapshot_s: float  # of nothing but travelling
    delta_travel_s: float
    core_s: float

    def delta_s(self, num_cores: int) -> float:
        """From the call of publish() to the verified base, one thing after the other; `num_cores` at each end."""
        return self.delta_travel_s + self.core_s / num_cores


def project(codec: Codec) -> list[Projected]:
    """Bytes, and seconds of the processor, grow with the number of parameters; links are as fast as they are named.

    Blocks are encoded, applied and hashed by as many threads as there are cores. That they share the work out evenly
    and that the memory keeps up with so many is assumed: on two cores it does not quite.
    """
    core_s = codec.encode.cpu_s + codec.decode_apply.cpu_s + 2 * codec.total_hash.cpu_s
    rows = []
    for model, num_parameters in MODELS.items():
        num_bytes = num_parameters * BYTES_PER_PARAMETER
        scale = num_bytes / codec.snapshot_bytes
        for gbit in LINKS_GBIT:
            travel_s = codec.delta_bytes * scale * 8 / (gbit * 1e9)
            rows.append(
                Projected(
                    model,
                    gbit,
                    num_bytes / 1e9,
                    codec.delta_bytes * scale / 1e9,
                    num_bytes * 8 / (gbit * 1e9),
                    travel_s,
                    core_s * scale,
                )
            )
    return rows


def projection_table(learning_rate: float, codec: Codec) -> str:
    """The table in Markdown, with what it is made of."""
    head = ["model", "link", "snapshot GB", "its travel s", "delta GB", "its travel s"]
    head += [f"with {text} at each end s" for text in ("one core", f"{MANY_CORES} cores")]
    rows: list[Sequence[str]] = [head, ["---"] * len(head)]
    rows += [
        [
            row.model,
            f"{row.gbit} Gbit/s",
            f"{row.snapshot_gb:,.0f}",
            f"{row.snapshot_s:,.1f}",
            f"{row.delta_gb:,.2f}",
            f"{row.delta_travel_s:,.2f}",
            *(f"{row.delta_s(num):,.1f} ({row.snapshot_s / row.delta_s(num):.1f}×)" for num in (1, MANY_CORES)),
        ]
        for row in project(codec)
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return (
        f"Arithmetic, not measured: SmolLM2-135M's figures at learning rate {learning_rate:.0e} "
        f"({codec.changed_fraction:.2%} of the elements change, {codec.ratio:.0f}× fewer bytes; "
        f"{codec.encode.cpu_s * 1e9 / codec.snapshot_bytes:.2f} s of CPU a GB to encode, "
        f"{codec.decode_apply.cpu_s * 1e9 / codec.snapshot_bytes:.2f} to apply, "
        f"{codec.total_hash.cpu_s * 1e9 / codec.snapshot_bytes:.2f} to hash) times the model's size.\n\n{table}"
    )
