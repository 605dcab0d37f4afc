"""Where the cluster is, and who this process is there; by the library `kubernetes`. Speaks to no cluster."""

from __future__ import annotations

import os
from typing import Any

from envs.interface import ErgonEnvError


async def find_cluster() -> Any:
    """The library's configuration: by the pod's own service account, or the usual file. Raises ErgonEnvError."""
    try:
        from kubernetes.aio import client, config
    except ImportError as error:
        raise ErgonEnvError(
            "the sandbox backend 'pod' needs the Python package kubernetes; pip install 'ergon[kubernetes]'"
        ) from error
    found = client.Configuration()
    found.retries = None
    found.connection_pool_maxsize = 0  # no bound: each sandbox holds an exec connection
    try:
        config.load_incluster_config(client_configuration=found)
    except config.ConfigException:
        try:
            await config.load_kube_config(os.environ.get("KUBECONFIG"), client_configuration=found)
        except (config.ConfigException, OSError) as error:
            raise ErgonEnvError(
                f"the sandbox backend 'pod' finds no cluster ({error}); set KUBECONFIG or write ~/.kube/config, run "
                "actors in the cluster with sandboxes.actors=true of the chart, or choose the backend bubblewrap"
            ) from error
    return found
