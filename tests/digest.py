"""The hash that an engine must have read: of a safetensors file's data, as a manifest's `total_hash` is."""

from __future__ import annotations

from pathlib import Path

from broker.protocol import hashes


def data_digest(path: Path) -> str:
    """In hexadecimal, the hash of everything behind the header of a safetensors file."""
    raw = memoryview(path.read_bytes())
    return hashes.digest(raw[8 + int.from_bytes(raw[:8], "little") :]).hex()
