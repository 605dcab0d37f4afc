"""What peers of the broker hold. A package rather than one client.py, so that every room stays under 300 lines.

`ActorClient` (with TicketSource and TrajectorySender), `LearnerClient` (the trajectories' receiver), `OperatorClient`
(who looks after it). The weight channel's ends are in `broker.weights`.
"""

from broker.client.actor import ActorClient
from broker.client.halves import TicketSource, TrajectorySender
from broker.client.learner import BrokerStatus, DeadLetter, LearnerClient
from broker.client.operator import OperatorClient
from broker.protocol.commands import HandoverStatus, ReleaseReason, SendStatus

__all__ = [
    "ActorClient",
    "BrokerStatus",
    "DeadLetter",
    "HandoverStatus",
    "LearnerClient",
    "OperatorClient",
    "ReleaseReason",
    "SendStatus",
    "TicketSource",
    "TrajectorySender",
]
