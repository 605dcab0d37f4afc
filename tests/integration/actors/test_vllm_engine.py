"""The real engine against a Hugging Face forward pass of the same weights, before, during and after weight updates."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import psutil
import pytest

from tests.integration.actors.sessions import BASE, TEMPERATURE, Played, play

LONG = 300
SCENES = (
    "initial_version",
    "before",
    "greedy",
    "in_flight",
    "in_flight_again",
    "after",
    "greedy_after",
    "refused",
    "greedy_after_refusal",
    "version_after_refusal",
    "aborted",
    "cancelled",
    "load",
    "queued",
    "too_long",
    "keep_cache",
    "gateway",
    "prepares",
    "both_ways",
    "children",
    "vllm_metrics",
    "ld_preload",
    "thinking",
)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def played(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Played]:
    dtype = request.param
    more = {
        "float32": ("episodes", "prefix_caching", "parsers", "programs_that_think", "handover"),
        "bfloat16": ("killed",),
    }
    scenes = [*SCENES, *more[dtype]]
    # What travels in a wider format than the engine's is rounded to that.
    wire_dtypes = (dtype, "float32", dtype)
    with play(tmp_path_factory.mktemp(dtype), dtype, scenes, wire_dtypes=wire_dtypes) as session:
        yield session


def test_log_probs_equal_a_forward_pass_of_the_same_weights(played: Played) -> None:
    assert played.seen["initial_version"] == list(BASE)
    played.assert_exact(played.seen["before"], {BASE}, TEMPERATURE)
    played.assert_exact(played.seen["greedy"][0], {BASE}, 1.0)


def test_greedy_sampling_takes_the_likeliest_token_and_repeats_itself(played: Played) -> None:
    first, second = played.seen["greedy"]
    if played.dtype == "float32":
        assert [s["ids"] for s in first] == [s["ids"] for s in second]
    for sample in first:
        assert len(sample["ids"]) == 48 or sample["finish"] == "stop"


def test_tokens_on_both_sides_of_an_update_in_flight_are_exact_under_their_own_version(played: Played) -> None:
    for scene, old, new in (("in_flight", BASE, (7, 1)), ("in_flight_again", (7, 1), (7, 2))):
        samples = played.seen[scene]["samples"]
        assert all(len(sample["ids"]) == LONG and sample["finish"] == "length" for sample in samples)
        played.assert_exact(samples, {old, new}, TEMPERATURE)
        if played.dtype == "float32":
            # The control: under the other version's weights the same tokens are far off.
            for sample in samples:
                wrong, switch = played.score(new, sample, TEMPERATURE), sample["runs"][0][2]
                assert np.abs(wrong[:switch] - np.array(sample["logprobs"])[:switch]).mean() > 0.1
    assert 0 < played.seen["in_flight"]["pause_s"] < 10


def test_after_an_update_old_prefixes_are_not_reused(played: Played) -> None:
    played.assert_exact(played.seen["after"], {(7, 2)}, TEMPERATURE)
    played.assert_exact(played.seen["greedy_after"], {(7, 2)}, 1.0)


def test_where_the_cache_is_kept_only_requests_in_flight_use_it(played: Played) -> None:
    played.assert_exact(played.seen["keep_cache"]["fresh"], {(7, 3)}, TEMPERATURE)
    runs = played.seen["keep_cache"]["in_flight"]["samples"][0]["runs"]
    assert [tuple(run[:2]) for run in runs] == [(7, 2), (7, 3)]


def test_weights_that_do_not_fit_are_refused_and_the_old_version_serves_on(played: Played) -> None:
    reasons = played.seen["refused"]
    assert "has shape [127, 64]; the model's is [128, 64]" in reasons["bad_shape"]
    assert "has dtype I32; allowed: BF16, F16, F32" in reasons["bad_dtype"]
    assert "1 missing ['model.layers.0.mlp.up_proj.weight']" in reasons["bad_missing"]
    assert "1 unknown ['model.extra']" in reasons["bad_extra"]
    assert "not a readable safetensors file" in reasons["bad_cut"]
    assert played.seen["version_after_refusal"] == [7, 2]
    played.assert_exact(played.seen["greedy_after_refusal"], {(7, 2)}, 1.0)


def test_prepared_weights_are_those_of_a_reload_bit_by_bit(played: Played) -> None:
    assert played.seen["prepares"] is True
    seen = played.seen["both_ways"]
    for prepared, reloaded in zip(seen[::2], seen[1::2], strict=True):
        assert (prepared["prepares"], reloaded["prepares"]) == (True, False)
        assert prepared["logprobs"] == reloaded["logprobs"]
        assert prepared["digests"][0] == prepared["digests"][1]
    assert seen[0]["logprobs"] == seen[4]["logprobs"] != seen[2]["logprobs"]


def test_an_abort_keeps_what_was_sampled(played: Played) -> None:
    sample = played.seen["aborted"]
    assert sample["finish"] == "abort"
    assert 0 < len(sample["ids"]) < LONG
    played.assert_exact([sample], {(7, 2)}, TEMPERATURE)


def test_cancelling_frees_the_engine(played: Played) -> None:
    assert played.seen["cancelled"] == 0


def test_the_load_adds_up_what_the_engine_did(played: Played) -> None:
    load = played.seen["load"]
    assert (load["num_turns"], load["num_sampled"], load["num_unfinished"]) == (16, 8 * 41, 0)
    assert 41 <= load["num_steps"] <= 60
    assert load["num_full_steps"] == 0  # eight requests in a batch of sixteen
    assert 0 < load["cache_use_steps"] < load["num_steps"]
    assert load["num_preemptions"] == 0
    assert 0 <= load["queue_s"] < 10
    assert load["sampling_s"] > 0
    # The second time the same prompts are in the cache, but for the last block of each.
    assert 0 <= load["num_prefix_hits"] < load["num_prefix_tokens"]


def test_the_queue_goes_by_priority(played: Played) -> None:
    assert played.seen["queued"] == ["first", "second", "last"]


def test_a_request_that_cannot_be_served_does_not_end_the_engine(played: Played) -> None:
    assert played.seen["too_long"] not in ("dead", "served")


def test_programs_behind_the_gateway_are_recorded_exactly(played: Played) -> None:
    """Across an update in flight, over branches and an abort: every token in one segment, exact in its context."""
    seen = played.seen["gateway"]
    samples = sampled_pieces(seen["segments"])
    played.assert_exact(samples, {(40, 1), (40, 2)}, TEMPERATURE)
    # The long conversation and the call beside it; its two other branches, one of them gone on with; the response; what
    # was sampled for the program that hung up, and the call beside that.
    assert sorted(sum(piece["segment"] == i for piece in samples) for i in range(7)) == [1, 1, 1, 1, 1, 2, 3]
    crossing = [piece for piece in samples if {tuple(run[:2]) for run in piece["runs"]} == {(40, 1), (40, 2)}]
    assert crossing
    # What the program was told is what was recorded; beside it there are the response's tokens and the abort's.
    recorded = sorted(value for piece in samples for value in piece["logprobs"])
    assert len(seen["told"]) < len(recorded)
    assert set(seen["told"]) <= set(recorded)
    assert (seen["responses_status"], seen["unfinished"], seen["failure"]) == ("incomplete", 0, "None")


def test_programs_keep_to_their_thinking_budgets_and_what_ends_a_thought_is_not_trained_on(played: Played) -> None:
    """Every sampled token is exact in its context, the forced end of a thought included in that context."""
    if played.dtype != "float32":
        pytest.skip("played in the other session")
    stopped = []
    for episode in played.seen["programs_that_think"]["episodes"]:
        assert episode["failure"] == "None"
        pieces = sampled_pieces(episode["segments"])
        played.assert_exact(pieces, {(41, 1)}, TEMPERATURE)
        num_sampled = sum(sum(segment["mask"]) for segment in episode["segments"])
        assert num_sampled == sum(usage[0] for usage in episode["usages"])
        num_thinking, num_overrun, num_stopped = episode["account"]
        assert num_thinking == sum(usage[1] for usage in episode["usages"]) > 0
        assert num_overrun == 0
        low, none = 4, 0  # tokens that these efforts leave of the budget
        for (_, thought, num_replies), most in zip(episode["usages"], [16, 16, 16, low, none], strict=True):
            assert thought <= most * num_replies
        assert episode["usages"][-1][0] <= 7
        # What was forced stands in the segments where it was forced, unmasked, and the policy went on behind it.
        stop = episode["stop_ids"]
        found = [
            at
            for segment in episode["segments"]
            for at in range(len(segment["ids"]) - len(stop))
            if segment["ids"][at : at + len(stop)] == stop and at and segment["mask"][at - 1]
        ]
        assert len(found) == num_stopped
        # Whatever is stopped was opened: by the context, in all but the last reply, or by the policy once more.
        (tag,) = episode["open_token_ids"]
        num_reopened = sum(
            token == tag and sampled
            for segment in episode["segments"]
            for token, sampled in zip(segment["ids"], segment["mask"], strict=True)
        )
        assert num_stopped <= 5 + num_reopened
        stopped.append(num_stopped)
        assert episode["num_turns"] == 6
    assert stopped[1] >= 2  # the model never writes that word; it ends a turn early at times


def test_another_actor_goes_on_token_for_token(played: Played) -> None:
    """The first one was told to stop in the middle of a turn; the weights changed before the second one went on."""
    if played.dtype != "float32":
        pytest.skip("played in the other session")
    seen = played.seen["handover"]
    begun, segments = seen["partial"]["segments"], seen["segments"]
    assert (seen["partial"]["turns"], seen["head"]) == (2, {"outcome": "completed", "turns": 3, "attempt": 0})
    # One trajectory, of the second actor, graded from the state that only the snapshot could tell it.
    assert (seen["by"], seen["more"], seen["reward"]) == ("second", None, {"correct": 0.0, "last_session": 1.0})
    assert seen["totals"] == {"granted": 2, "handover_kept": 1, "continued": 1, "accepted": 1, "expired": 0}
    # What was sampled stays, id by id; what follows is appended to it, and sampled by the new policy.
    assert segments[:-1] == begun[:-1]
    length = len(begun[-1]["ids"])
    for key in ("ids", "mask", "logprobs"):
        assert segments[-1][key][:length] == begun[-1][key]
    assert all(segments[-1]["mask"][length:])
    num_before, num_after = begun[-1]["mask"].count(True), len(segments[-1]["ids"]) - length
    assert min(num_before, num_after) > 0
    assert segments[-1]["runs"] == [[41, 1, num_before], [41, 2, num_after]]
    played.assert_exact(sampled_pieces(segments), {(41, 1), (41, 2)}, TEMPERATURE)


def sampled_pieces(segments: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every stretch of sampled tokens as a sample after the prompt that it stands behind in its segment."""
    pieces = []
    for number, segment in enumerate(segments):
        mask = np.array(segment["mask"])
        versions = iter([run[:2] for run in segment["runs"] for _ in range(run[2])])
        edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]])))
        for start, end in edges.reshape(-1, 2).tolist():
            piece = {key: segment[key][start:end] for key in ("ids", "logprobs")}
            runs = [[*next(versions), 1] for _ in range(end - start)]
            pieces.append({"segment": number, "prompt": segment["ids"][:start], **piece, "runs": runs})
    return pieces


def test_metrics_of_vllm_are_in_the_process_registry_and_the_environment_is_clean(played: Played) -> None:
    assert "vllm:generation_tokens" in played.seen["vllm_metrics"]
    assert played.seen["ld_preload"] is None


def test_a_trajectory_is_what_the_engine_was_asked_and_answered_id_by_id(played: Played) -> None:
    """Also across an update in flight, and where an environment edits its history."""
    if played.dtype != "float32":
        pytest.skip("played in the other session")
    scene = played.seen["episodes"]
    old, new = tuple(scene["before"]), tuple(scene["after"])
    sampled = []
    for episode in scene["episodes"]:
        assert episode["outcome"] == "completed"
        assert episode["segments"] == grown(episode)
        assert tuple(episode["turns"][0]["runs"][0][:2]) == old
        sampled += episode["turns"]
    assert all(tuple(episode["turns"][-1]["runs"][-1][:2]) == new for episode in scene["episodes"][1::2])
    assert len(sampled) >= 8 * 6
    assert any(len(turn["runs"]) == 2 for turn in sampled)
    played.assert_exact(sampled, {old, new}, TEMPERATURE)


def test_turns_after_the_first_prefill_only_what_is_new(played: Played) -> None:
    """By vLLM's own counters: all whole blocks of the former prompt and of what was sampled after it are found."""
    if played.dtype != "float32":
        pytest.skip("played in the other session")
    episode = played.seen["prefix_caching"]
    assert episode["segments"] == grown(episode)
    block = episode["block_size"]
    found = 0
    for (before, turn), appended in zip(pairwise(episode["turns"]), episode["appended"][:-1], strict=True):
        assert turn["cache"]["queries"] == len(turn["prompt"])
        if not appended["edited"]:
            # The last sampled token ends the turn, so that the engine has not computed anything from it.
            known = len(before["prompt"]) + len(before["ids"]) - 1
            assert turn["cache"]["hits"] >= known // block * block
            assert len(turn["prompt"]) - turn["cache"]["hits"] < len(appended["ids"]) + block + 1
            found += turn["cache"]["hits"]
        print(f"prompt={len(turn['prompt'])} new={len(appended['ids'])} {turn['cache']} edited={appended['edited']}")
    assert found > 0


@pytest.mark.parametrize("name", ["qwen3", "llama3"])
def test_vllms_own_tool_parsers_read_what_the_formats_write(played: Played, name: str) -> None:
    if played.dtype != "float32":
        pytest.skip("played in the other session")
    seen = played.seen["parsers"][name]
    assert all(each["read"] == each["written"] for each in seen)
    assert sum(len(each["written"]) for each in seen) > 80


def grown(episode: dict[str, Any]) -> list[dict[str, Any]]:
    """The segments that an episode's requests, answers and observations make, each appended to what there was."""
    segments: list[dict[str, Any]] = []
    asked = [{"edited": True, "ids": episode["opening"]}, *episode["appended"][:-1]]  # nothing follows the last answer
    for turn, context in zip(episode["turns"], asked, strict=True):
        if context["edited"]:
            segments.append({"ids": [], "mask": [], "logprobs": [], "runs": []})
        added, segment = context["ids"], segments[-1]
        assert turn["prompt"] == segment["ids"] + added
        segment["ids"] = turn["prompt"] + turn["ids"]
        segment["mask"] += [False] * len(added) + [True] * len(turn["ids"])
        segment["logprobs"] += [0.0] * len(added) + turn["logprobs"]
        for run in turn["runs"]:
            if segment["runs"] and segment["runs"][-1][:2] == run[:2]:
                segment["runs"][-1] = [*run[:2], segment["runs"][-1][2] + run[2]]
            else:
                segment["runs"].append(run)
    return segments


def test_the_phases_of_a_budgeted_turn_are_exact_and_what_the_actor_wrote_is_not_sampled(played: Played) -> None:
    """Also where the weights change between or within the phases."""
    differences: dict[tuple[int, int], list[float]] = {(10, 1): [], (10, 2): []}
    for episode in played.seen["thinking"]:
        sampled = [i for i, masked in enumerate(episode["mask"]) if masked]
        versions = [(run[0], run[1]) for run in episode["runs"] for _ in range(run[2])]
        assert len(versions) == len(sampled)
        scores = {version: played.score_all(version, episode["ids"], TEMPERATURE) for version in set(versions)}
        for i, version in zip(sampled, versions, strict=True):
            differences[version].append(scores[version][i - 1] - episode["logprobs"][i])
        assert not any(p for p, masked in zip(episode["logprobs"], episode["mask"], strict=True) if not masked)
        tokens, overrun, forced = episode["thinking"]
        assert overrun == 0
        assert episode["text"].count(" Stop.") == forced
        if (budget := episode["budget"]) is None:
            assert (tokens > 0, forced) == (True, 0)
        else:
            assert tokens <= budget * episode["text"].count("<|im_start|>assistant")
    played.assert_close({version: np.array(found) for version, found in differences.items()})
    bounded = [episode for episode in played.seen["thinking"] if episode["budget"]]
    assert any(episode["thinking"][2] for episode in bounded)  # some were stopped
    assert any(0 < episode["thinking"][0] < episode["budget"] for episode in bounded)  # some closed it themselves


def test_a_dead_engine_process_fails_every_request(played: Played) -> None:
    if played.dtype != "bfloat16":
        pytest.skip("played in the other session")
    assert played.seen["killed"]["requests"] == ["EngineDeadError"] * 8
    assert played.seen["killed"]["check"]


def test_a_killed_actor_leaves_no_engine_behind(played: Played) -> None:
    """Last, because it ends the session."""
    if played.dtype != "float32":
        pytest.skip("the engine of the other session is dead already")
    children = [psutil.Process(pid) for pid in played.seen["children"]]
    assert children
    played.process.kill()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert alive == []
