"""What the chart's own pods do at Kubernetes' API, with an API that only remembers."""

import base64
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from kubernetes.client.rest import ApiException

from broker.process.keys import Identity
from broker.process.lifecycle import ErgonError
from broker.process.security import keyed
from deploy import kubernetes
from deploy.scrape import Samples


class Api:
    """Secrets and pods of one namespace."""

    def __init__(self) -> None:
        self.secrets: dict[str, Any] = {}
        self.pods: list[Any] = []
        self.patched: list[tuple[str, str]] = []
        self.refuses: ApiException | None = None

    def read_namespaced_secret(self, name: str, _namespace: str) -> Any:
        if name not in self.secrets:
            raise ApiException(status=404)
        return self.secrets[name]

    def create_namespaced_secret(self, _namespace: str, secret: Any) -> None:
        self.secrets[secret["metadata"]["name"]] = secret

    def list_namespaced_pod(self, _namespace: str, label_selector: str) -> Any:
        assert label_selector == "a=b"
        return SimpleNamespace(items=self.pods)

    def patch_namespaced_pod(self, name: str, _namespace: str, patch: Any) -> None:
        if self.refuses:
            raise self.refuses
        self.patched.append((name, patch["metadata"]["annotations"][kubernetes.COST]))


def test_each_identity_gets_what_it_may_know_and_the_keys_belong_together(tmp_path: Path) -> None:
    api = Api()
    made = kubernetes.make_key_secrets(api, "rl", "run-keys")
    assert made == [f"run-keys-{identity}" for identity in Identity]
    for identity in Identity:
        data = api.secrets[f"run-keys-{identity}"]["data"]
        expected = {f"{identity}.secret", "public.keys"} | ({"learner.signing.secret"} & {f"{identity}.signing.secret"})
        assert set(data) == expected
        directory = tmp_path / identity
        directory.mkdir()
        for name, content in data.items():
            (directory / name).write_bytes(base64.b64decode(content))
            (directory / name).chmod(0o440)
        assert keyed(directory, identity).pair is not None
    assert len({api.secrets[name]["data"]["public.keys"] for name in made}) == 1


def test_an_upgrade_makes_no_keys() -> None:
    api = Api()
    kubernetes.make_key_secrets(api, "rl", "run-keys")
    before = dict(api.secrets)
    assert kubernetes.make_key_secrets(api, "rl", "run-keys") == []
    assert api.secrets == before


def test_half_a_set_of_keys_is_refused() -> None:
    api = Api()
    kubernetes.make_key_secrets(api, "rl", "k")
    del api.secrets["k-relay"]
    with pytest.raises(ErgonError, match=r"k-relay are missing and k-actor, k-learner, k-operator, k-broker are there"):
        kubernetes.make_key_secrets(api, "rl", "k")


def test_an_api_that_refuses_is_not_taken_for_a_secret_that_is_missing() -> None:
    api = Api()

    def refuse(*_: object) -> None:
        raise ApiException(status=403)

    api.read_namespaced_secret = refuse  # type: ignore[method-assign]
    with pytest.raises(ApiException):
        kubernetes.make_key_secrets(api, "rl", "k")
    assert not api.secrets


def load(running: float, admitted: float) -> Samples:
    none: frozenset[tuple[str, str]] = frozenset()
    return {("ergon_actor_running_episodes", none): running, ("ergon_actor_admitted_episodes", none): admitted}


@pytest.mark.parametrize(
    ("samples", "cost"),
    [(None, 0), ({}, 0), (load(0, 32), 0), (load(1, 32), 25), (load(16, 32), 50), (load(40, 32), 100)],
)
def test_idle_actors_cost_least(samples: Samples | None, cost: int) -> None:
    assert kubernetes.deletion_cost(samples) == cost


def pod(name: str, ip: str | None, cost: str | None = None, leaving: bool = False) -> Any:
    annotations = {kubernetes.COST: cost} if cost else None
    metadata = SimpleNamespace(name=name, annotations=annotations, deletion_timestamp="now" if leaving else None)
    return SimpleNamespace(metadata=metadata, status=SimpleNamespace(pod_ip=ip))


def test_only_pods_whose_cost_has_changed_are_annotated() -> None:
    api = Api()
    api.pods = [
        pod("busy", "1"),
        pod("as-before", "1", "100"),
        pod("idle", "2", "100"),
        pod("starting", None),
        pod("leaving", "2", leaving=True),
    ]
    answers = {"http://1:9703/metrics": load(32, 32), "http://2:9703/metrics": load(0, 32)}
    assert kubernetes.update_costs(api, "rl", "a=b", answers.__getitem__) == 2
    assert api.patched == [("busy", "100"), ("idle", "0")]


def test_a_pod_that_has_gone_is_left_alone_and_a_refusal_is_told() -> None:
    api = Api()
    api.pods = [pod("gone", "1")]
    api.refuses = ApiException(status=404)
    assert kubernetes.update_costs(api, "rl", "a=b", lambda _: load(1, 1)) == 0
    api.refuses = ApiException(status=403)
    with pytest.raises(ApiException):
        kubernetes.update_costs(api, "rl", "a=b", lambda _: load(1, 1))
