"""The one exception that bytes from the network may raise, and its machine-readable codes.

A `ProtocolError` says whether it is fatal (the connection ends) or ordinary (the message is refused, the peer goes on).
Add a code only together with its row in PROTOCOL.md; a test compares the two.
"""

from __future__ import annotations

from enum import StrEnum


class ErrorCode(StrEnum):
    """Why a message was refused. The values travel on the wire and never change their meaning."""

    BAD_FRAME = "BAD_FRAME"  # not an Ergon message: magic, frame count, size, msgpack
    BAD_MESSAGE = "BAD_MESSAGE"  # well-formed frames whose content breaks the specification
    BAD_VERSION = "BAD_VERSION"  # another major protocol version
    BAD_STATE = "BAD_STATE"  # a valid command at a moment where it is not allowed
    WRONG_ROLE = "WRONG_ROLE"  # a command of another role
    WRONG_RUN = "WRONG_RUN"  # a peer of another run
    UNKNOWN_COMMAND = "UNKNOWN_COMMAND"
    UNKNOWN_PEER = "UNKNOWN_PEER"  # anything but HELLO from a peer the server does not know (any more): say HELLO again
    NOT_FOUND = "NOT_FOUND"  # a version or chunk that is not (or no longer) held
    LEARNER_PRESENT = "LEARNER_PRESENT"  # a second learner of the same run
    DISK_FULL = "DISK_FULL"


FATAL_CODES = frozenset(
    {
        ErrorCode.BAD_FRAME,
        ErrorCode.BAD_VERSION,
        ErrorCode.WRONG_ROLE,
        ErrorCode.WRONG_RUN,
        ErrorCode.LEARNER_PRESENT,
    }
)


class ProtocolError(Exception):
    """Bytes or a peer that break the protocol.

    `message` is one sentence for a person: what was wrong, the value, what is allowed, the remedy where there is one.
    """

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message

    @property
    def fatal(self) -> bool:
        """Whether the connection ends with this error."""
        return self.code in FATAL_CODES
