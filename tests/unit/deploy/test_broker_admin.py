from __future__ import annotations

import json

from broker.protocol.commands import ActorRow, DeadRow, InspectReply, LeaseRow, PeerRow, Role
from broker.protocol.trajectory import Mode
from deploy.broker_admin import as_json, as_tables

REPLY = InspectReply(
    request_id="r",
    run_id="run",
    tickets={"leased": {"train": 2}},
    totals={"granted": 3},
    peers={"actor": 1},
    full=False,
    leases_on_hold=True,
    store_bytes=1_500_000,
    environments={"shop": {"leased": 2}},
    oldest_lease=LeaseRow(ticket_id="a1", env="shop", actor_id="actor-0", held_s=130.0, left_s=-0.5),
    num_dead=2,
    actors=(ActorRow(actor_id="actor-0", connected=False, leases=2),),
    connections=(PeerRow(role=Role.ACTOR, peer_id="actor-0", silent_s=0.25),),
    dead=(
        DeadRow(
            ticket_id="b1", group_id="b", env="shop", mode=Mode.EVAL, attempts=3, error="größer\nals \x1b[1m", told=True
        ),
    ),
)


def test_json_has_the_fields_of_the_reply() -> None:
    seen = json.loads(as_json(REPLY))
    assert seen.keys() == set(InspectReply.__struct_fields__) - {"request_id"}
    assert seen["oldest_lease"]["left_s"] == -0.5
    assert seen["actors"] == [{"actor_id": "actor-0", "connected": False, "leases": 2, "oldest_lease_s": None}]
    assert seen["connections"] == [{"role": "actor", "peer_id": "actor-0", "silent_s": 0.25}]
    assert (seen["dead"][0]["mode"], seen["dead"][0]["error"]) == ("eval", "größer\nals \x1b[1m")


def test_tables_are_for_a_person() -> None:
    page = as_tables(REPLY)
    assert page.startswith("run run: store 1.5 MB; nearly full, nothing is leased\n")
    assert "oldest lease: a1 (shop), held by actor-0 for 0 h 02 min, runs out in -0.5 s" in page
    assert "b1           shop         eval         3  yes   größer als ?[1m" in page
    assert page.endswith("... and 1 more")
