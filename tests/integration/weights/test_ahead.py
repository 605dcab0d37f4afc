"""What of a delta comes before it is whole is applied as it comes, and taken back where the rest does not come."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from broker.protocol import deltas
from broker.protocol.trajectory import PolicyVersion
from broker.weights.fetch import WeightsSupersededError
from tests.integration.weights.ends import HEARTBEAT_S, ActorAt, Learner, file_holds, has_watched, until


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("ending", ["announced", "failed"])
def test_a_receiver_applies_what_comes_ahead_and_takes_it_back_where_no_more_comes(
    learner: Learner, actor_at: ActorAt, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    monkeypatch.setattr(deltas, "MAX_BEGUN", 1)  # so that nothing is read before what was read is compared
    actor = actor_at(learner.publisher.endpoint)
    monkeypatch.setattr(actor.subscriber, "_stall_s", 1.0)
    for _ in range(2):
        learner.publish()
        actor.follow(learner)
    have = learner.version
    version = PolicyVersion(have.lineage, have.version + 1)
    contents = [(*rest, data ^ 1) for *rest, data in learner.contents[have]]
    of = {name: data for name, _, _, data in contents}
    go = threading.Event()

    def read(name: str) -> bytes:
        if name == contents[0][0]:  # the second to be read
            assert go.wait(30)
            if ending == "failed":
                raise MemoryError
        return of[name].tobytes()

    until(lambda: has_watched(learner, have))
    with ThreadPoolExecutor(2) as threads:
        layout = [(name, dtype, shape) for name, dtype, shape, _ in contents]
        publishing = threads.submit(learner.publisher.publish_from, version, layout, read)
        assert actor.subscriber.wait_coming(have, 20) == version
        assert actor.subscriber.latest() == have
        fetching = threads.submit(actor.subscriber.fetch_base, version, actor.base, 30)
        until(lambda: actor.base.version is None)
        assert actor.base.have == have
        if ending == "announced":
            go.set()
            assert fetching.result(30).parent == have
            assert publishing.result(30).payload_bytes
            assert actor.base.version == version
            assert file_holds(actor.base.path, contents)  # type: ignore[arg-type]
            return
        with pytest.raises(WeightsSupersededError):
            fetching.result(30)
        go.set()
        with pytest.raises(MemoryError):
            publishing.result(30)
    assert actor.base.version == have
    assert file_holds(actor.base.path, learner.contents[have])
    assert actor.subscriber.wait_coming(have, 2 * HEARTBEAT_S) is None
    learner.publish()
    assert actor.follow(learner) is None  # an anchor: the memory of the former version is gone with the attempt
