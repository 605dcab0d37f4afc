"""Every metric of the weight channel, in one place. `ergon_weights_*` and `ergon_relay_*`; see each help text."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600)

# The publisher, in the learner.
publish_seconds = Histogram(
    "ergon_weights_publish_seconds", "Seconds to copy, hash and switch to a published snapshot.", buckets=SECONDS
)
published_bytes = Counter("ergon_weights_published_bytes_total", "Bytes of snapshots published by this process.")

# The serving half, in the publisher and in every relay.
newest_lineage = Gauge("ergon_weights_newest_lineage", "Lineage of the newest version this process serves.")
newest_version = Gauge("ergon_weights_newest_version", "Number of the newest version this process serves.")
held_versions = Gauge("ergon_weights_held_versions", "Versions this process serves.")
held_bytes = Gauge("ergon_weights_held_bytes", "Memory of snapshots, those still on their way to a peer included.")
peers = Gauge("ergon_weights_peers", "Peers connected to the serving half, by role.", ["role"])
peers_behind = Gauge("ergon_weights_peers_behind", "Connected peers that do not hold the newest version yet.")
served_bytes = Counter("ergon_weights_served_bytes_total", "Chunk bytes handed to the network.")
served_chunks = Counter("ergon_weights_served_chunks_total", "Chunks handed to the network.")
deferred_requests = Counter("ergon_weights_deferred_requests_total", "Requests that waited for a slow peer's queue.")
refused = Counter(
    "ergon_weights_refused_total", "Messages that the serving half answered with ERROR, by code.", ["code"]
)
refused_handshakes = Counter(
    "ergon_weights_handshakes_refused_total",
    "Connections that the serving half did not let in: unknown_key, wrong_role, not_encrypted (or sealed for another "
    "server), broken_off.",
    ["reason"],
)

# The receiving half, in every relay and actor.
announced_lineage = Gauge("ergon_weights_announced_lineage", "Lineage of the newest version announced to this process.")
announced_version = Gauge("ergon_weights_announced_version", "Number of the newest version announced to this process.")
fetch_seconds = Histogram(
    "ergon_weights_fetch_seconds", "Seconds to fetch and verify one version, successful ones only.", buckets=SECONDS
)
fetched_bytes = Counter("ergon_weights_fetched_bytes_total", "Chunk bytes received and verified.")
verify_failures = Counter("ergon_weights_verify_failures_total", "Chunks or snapshots whose hash was wrong.")
superseded_fetches = Counter(
    "ergon_weights_superseded_total", "Fetches given up because the version was no longer held."
)
resumed_fetches = Counter("ergon_weights_resumed_total", "Times a fetch went on after a reconnection or a stall.")

# The relay process.
relay_connected = Gauge("ergon_relay_upstream_connected", "1 while the relay is connected to its upstream.")
relay_versions = Counter("ergon_relay_versions_total", "Versions the relay has fetched whole and begun to serve.")
relay_failures = Counter(
    "ergon_relay_fetch_failures_total", "Fetches from the upstream that failed, by reason.", ["reason"]
)
