"""Every metric of the weight channel, in one place. `ergon_weights_*` and `ergon_relay_*`; see each help text."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from broker.protocol import delta_loops

SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600)

ANCHOR, DELTA = "anchor", "delta"  # values of the label `kind`


def kind(parent: object) -> str:
    """The label of a payload with this parent."""
    return ANCHOR if parent is None else DELTA


# Every process.
compiled_loops = Gauge(
    "ergon_weights_compiled_loops",
    "1 where the inner loops of deltas are the compiled ones; 0 where the package was installed without a C compiler, "
    "and numpy does the same at half the speed.",
)
compiled_loops.set(delta_loops.compiled)

# The publisher, in the learner.
publish_seconds = Histogram(
    "ergon_weights_publish_seconds", "Seconds to diff or copy, hash and switch to a version.", buckets=SECONDS
)
diff_seconds = Histogram(
    "ergon_weights_diff_seconds",
    "Seconds of a publication in which tensors were compared with the former version and written over it.",
    buckets=SECONDS,
)
seal_seconds = Histogram(
    "ergon_weights_seal_seconds",
    "Seconds to sign a snapshot after its delta went out, with keys; the next version waits for it.",
    buckets=SECONDS,
)
published_bytes = Counter(
    "ergon_weights_published_bytes_total",
    "Payload bytes published by this process: of a delta its own, of an anchor the snapshot's.",
    ["kind"],
)
published_versions = Counter("ergon_weights_published_total", "Versions published by this process.", ["kind"])
changed_fraction = Gauge(
    "ergon_weights_changed_fraction", "Share of the elements that differ from the version before, of the newest delta."
)
compression = Gauge(
    "ergon_weights_compression_ratio", "Bytes of the snapshot for each payload byte of the newest version."
)

# The serving half, in the publisher and in every relay.
newest_lineage = Gauge("ergon_weights_newest_lineage", "Lineage of the newest version this process serves.")
newest_version = Gauge("ergon_weights_newest_version", "Number of the newest version this process serves.")
held_versions = Gauge("ergon_weights_held_versions", "Snapshots this process holds.")
held_deltas = Gauge("ergon_weights_held_deltas", "Consecutive deltas up to the newest version that are held.")
held_delta_bytes = Gauge(
    "ergon_weights_held_delta_bytes",
    "Memory of deltas and of folds made of them, those still on their way to a peer included.",
)
folds = Counter("ergon_weights_folds_total", "Deltas made of several consecutive ones, for receivers further behind.")
fold_seconds = Histogram("ergon_weights_fold_seconds", "Seconds to make one of them.", buckets=SECONDS)
held_bytes = Gauge("ergon_weights_held_bytes", "Memory of snapshots, those still on their way to a peer included.")
peers = Gauge("ergon_weights_peers", "Peers connected to the serving half, by role.", ["role"])
peers_behind = Gauge("ergon_weights_peers_behind", "Connected peers that do not hold the newest version yet.")
versions_in_use = Gauge(
    "ergon_weights_versions_in_use", "Different versions that the connected relays and actors hold, none included."
)
peers_by_lag = Gauge(
    "ergon_weights_peers_by_lag",
    "Connected relays and actors by how many versions they are behind: 0, 1, 2, 3-4, 5-8, more, lineage (they hold one "
    "of another lineage) or none (they hold none yet).",
    ["lag"],
)
served_bytes = Counter("ergon_weights_served_bytes_total", "Chunk bytes handed to the network.", ["kind"])
served_chunks = Counter("ergon_weights_served_chunks_total", "Chunks handed to the network.")
pushes_sent = Counter(
    "ergon_weights_pushes_sent_total", "Deltas handed to the network with their announcement, without being asked for."
)
pushes_withheld = Counter(
    "ergon_weights_pushes_withheld_total",
    "Announcements without the delta that their receiver would have taken: large (beyond weights.push_mb there), "
    "behind (no delta leads straight from what it holds), busy (it fetches, or its queue is full).",
    ["reason"],
)
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
pushes_received = Counter(
    "ergon_weights_pushes_received_total",
    "Deltas that came without being asked for, by what became of them: taken, or dropped (superseded before it was "
    "wanted, not a delta to what is held, larger than allowed).",
    ["outcome"],
)
transfer_seconds = Histogram(
    "ergon_weights_transfer_seconds",
    "Seconds of a fetch until the last chunk was there and checked; next to none for a delta that was pushed.",
    buckets=SECONDS,
)
fetch_seconds = Histogram(
    "ergon_weights_fetch_seconds", "Seconds to fetch and verify one version, successful ones only.", buckets=SECONDS
)
apply_seconds = Histogram(
    "ergon_weights_apply_seconds", "Seconds to apply one delta to the base and to verify the whole.", buckets=SECONDS
)
fetched_bytes = Counter("ergon_weights_fetched_bytes_total", "Chunk bytes received and verified.", ["kind"])
fetched_versions = Counter("ergon_weights_fetched_total", "Versions fetched whole.", ["kind"])
refused_deltas = Counter(
    "ergon_weights_deltas_refused_total",
    "Deltas that did not fit the base or did not give the version promised; the anchor was fetched instead.",
)
verify_failures = Counter("ergon_weights_verify_failures_total", "Chunks or snapshots whose hash was wrong.")
forged = Counter(
    "ergon_weights_forged_total",
    "Versions that were refused because the learner has not signed them: unsigned, signature (by no key that counts, "
    "or of something else), digest (the bytes are others than were signed).",
    ["reason"],
)
for _reason in ("unsigned", "signature", "digest"):
    forged.labels(_reason)  # 0 is shown: of a series that begins with 1, Prometheus sees no increase
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
