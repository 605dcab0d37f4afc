"""`python -m deploy.kubernetes keys|costs`: what the chart's own pods do at Kubernetes' API.

`keys` makes the run's key Secrets once, one for each identity with what it may know. `costs` tells the scheduler which
actors are idle, so that these go first when there are to be fewer. What operators ask from outside is in `cluster.py`.
"""

from __future__ import annotations

import argparse
import base64
import logging
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from kubernetes import client, config
from kubernetes.client.rest import ApiException

from broker.process.keys import PUBLIC_FILE, SIGNING_FILE, Identity, make_keys, secret_path
from broker.process.lifecycle import ErgonError, install_stop, run_main
from deploy.scrape import Samples, scrape

logger = logging.getLogger(__name__)

COST: Final = "controller.kubernetes.io/pod-deletion-cost"
COST_S: Final = 15.0  # between two looks at the actors
ACTOR_PORT: Final = 9703
_NOT_FOUND, _CONFLICT = 404, 409


def make_key_secrets(api: Any, namespace: str, prefix: str) -> list[str]:
    """Make the Secrets PREFIX-IDENTITY where there are none; their names, or none where all are there.

    Raises ErgonError where some are there and others are not: half a set of keys belongs to nobody.
    """
    names = {identity: f"{prefix}-{identity}" for identity in Identity}
    there = [name for name in names.values() if _exists(api, namespace, name)]
    if len(there) == len(names):
        return []
    if there:
        missing = sorted(set(names.values()) - set(there))
        raise ErgonError(
            f"the Secrets {', '.join(missing)} are missing and {', '.join(there)} are there; delete those, and all "
            "processes of the run get new keys, or restore what is missing"
        )
    with tempfile.TemporaryDirectory() as made:
        directory = Path(made) / "keys"
        make_keys(directory)
        for identity, name in names.items():
            files = [secret_path(directory, identity), directory / PUBLIC_FILE]
            if identity is Identity.LEARNER:
                files.append(directory / SIGNING_FILE)
            api.create_namespaced_secret(namespace, _secret(name, files))
    return list(names.values())


def _exists(api: Any, namespace: str, name: str) -> bool:
    try:
        api.read_namespaced_secret(name, namespace)
    except ApiException as error:
        if error.status == _NOT_FOUND:
            return False
        raise
    return True


def _secret(name: str, files: list[Path]) -> Mapping[str, Any]:
    return {
        "metadata": {"name": name, "labels": {"app.kubernetes.io/name": "ergon"}},
        "type": "Opaque",
        "immutable": True,
        "data": {path.name: base64.b64encode(path.read_bytes()).decode() for path in files},
    }


def deletion_cost(samples: Samples | None) -> int:
    """What deleting an actor costs, 0 to 100 in quarters: its share of episodes. 0 where it does not answer."""
    totals = {"ergon_actor_running_episodes": 0.0, "ergon_actor_admitted_episodes": 0.0}
    for (name, _), value in (samples or {}).items():
        if name in totals:
            totals[name] += value
    running, admitted = totals.values()
    return 0 if not running else max(1, min(4, round(4 * running / max(1.0, admitted)))) * 25


def update_costs(api: Any, namespace: str, selector: str, ask: Callable[[str], Samples | None] = scrape) -> int:
    """Annotate every actor's pod whose cost has changed; the number of these."""
    num_changed = 0
    for pod in api.list_namespaced_pod(namespace, label_selector=selector).items:
        if pod.metadata.deletion_timestamp is not None or not pod.status.pod_ip:
            continue
        cost = str(deletion_cost(ask(f"http://{pod.status.pod_ip}:{ACTOR_PORT}/metrics")))
        if (pod.metadata.annotations or {}).get(COST) == cost:
            continue
        try:
            api.patch_namespaced_pod(pod.metadata.name, namespace, {"metadata": {"annotations": {COST: cost}}})
        except ApiException as error:
            if error.status not in (_NOT_FOUND, _CONFLICT):  # it has gone, or changed: at the next look
                raise
            logger.info("pod left alone pod=%s reason=%s", pod.metadata.name, error.reason)
            continue
        num_changed += 1
    return num_changed


def keep_costs(api: Any, namespace: str, selector: str, stop: threading.Event) -> None:
    """Update until `stop`."""
    while not stop.is_set():
        num_changed = update_costs(api, namespace, selector)
        if num_changed:
            logger.info("deletion costs have changed pods=%d", num_changed)
        stop.wait(COST_S)


def main() -> None:
    """Parse the command line and do what it says."""
    parser = argparse.ArgumentParser(prog="python -m deploy.kubernetes", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    keys = commands.add_parser("keys", help="make the run's key Secrets where there are none")
    keys.add_argument("--prefix", required=True)
    costs = commands.add_parser("costs", help="annotate the actors' pods with the cost of deleting them")
    costs.add_argument("--selector", required=True)
    for command in (keys, costs):
        command.add_argument("--namespace", required=True)
    arguments = parser.parse_args()
    config.load_incluster_config()
    api = client.CoreV1Api()
    if arguments.command == "keys":
        made = make_key_secrets(api, arguments.namespace, arguments.prefix)
        logger.info("key Secrets made=%s", ",".join(made) or "none: all are there")
    else:
        keep_costs(api, arguments.namespace, arguments.selector, install_stop())


if __name__ == "__main__":
    run_main("kubernetes", main)
