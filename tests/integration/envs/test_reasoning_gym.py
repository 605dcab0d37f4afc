"""reasoning-gym behind its scoring process: sound data sets only, and no answer that outlives its scoring."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from envs.interface import EnvironmentFailureError, EnvironmentOptionsError
from envs.play import play
from envs.reason import worker as worker_module
from envs.reason.environment import Answering
from envs.reason.gym import SOUND, ReasoningGymEnvironment
from envs.reason.worker import ScoringWorker

FOREIGN = os.environ.get("ERGON_FOREIGN", "")
PYTHON = f"{FOREIGN}/bin/python" if FOREIGN else sys.executable
needs_package = pytest.mark.skipif(
    not FOREIGN and find_spec("reasoning_gym") is None, reason="needs other people's environments: make test-adapters"
)

# What a policy might answer to a scorer that evaluates it: from then on every answer is right.
PAYLOAD = (
    "setattr(__import__('sys').modules['reasoning_gym.algorithmic.binary_matrix'].BinaryMatrixDataset, "
    "'score_answer', lambda *a, **k: 1.0)"
)


@pytest.fixture(scope="module")
def worker() -> Iterator[ScoringWorker]:
    running = ScoringWorker(timeout_s=5, python=PYTHON)
    yield running
    running.close()


@needs_package
def test_a_payload_that_replaces_the_scorer_dies_with_its_answer(worker: ScoringWorker) -> None:
    program = f"""
import sys; sys.path.insert(0, {str(worker_module.PROGRAM.parent)!r})
from scorer import serve
from reasoning_gym.factory import create_dataset
for answer in ({PAYLOAD!r}, "nonsense"):
    print(serve(dict(dataset="binary_matrix", seed=1, size=1, index=0, what="score", answer=answer), create_dataset))
"""
    ran = subprocess.run([PYTHON, "-I", "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "{'score': 1.0}", "the payload does its work where scorers share a process"
    worker.score("binary_matrix", 1, 0, PAYLOAD)
    assert worker.score("binary_matrix", 1, 0, "nonsense") < 1
    assert worker.score("binary_matrix", 1, 0, worker.entry("binary_matrix", 1, 0)[1]) == 1


@needs_package
@pytest.mark.parametrize(
    "payload", ["__import__('os')._exit(0)", "__import__('os').kill(__import__('os').getpid(), 9)", "[0] * 10**12"]
)
def test_a_payload_that_ends_its_process_earns_nothing(worker: ScoringWorker, payload: str) -> None:
    assert worker.score("binary_matrix", 1, 0, payload) == 0


@needs_package
def test_a_scorer_that_hangs_is_stopped_and_the_next_answer_is_scored() -> None:
    impatient = ScoringWorker(timeout_s=0.3, python=PYTHON)
    right = impatient.entry("binary_matrix", 1, 0)[1]
    with pytest.raises(EnvironmentFailureError, match="in time"):
        impatient.score("binary_matrix", 1, 0, "__import__('time').sleep(1000)")
    assert impatient.score("binary_matrix", 1, 0, right) == 1
    impatient.close()
    impatient.close()


@needs_package
async def test_sound_data_sets_are_solved_by_the_reference_and_by_no_constant() -> None:
    environment = ReasoningGymEnvironment(python=PYTHON)
    await environment.prepare()
    for index in range(len(SOUND)):
        task = environment.task("train" if index % 2 else "heldout", index)
        assert task.kind == SOUND[index]
        assert (await play(environment, task, environment.reference(task))).reward.total == 1.0, task.kind
        for text in ("", "0", "<answer>0</answer>", "<answer></answer>", f"<answer>{PAYLOAD}</answer>"):
            assert (await play(environment, task, Answering(text))).reward.total == 0.0, (task.kind, text)
    await environment.close()


@pytest.mark.parametrize("name", ["binary_matrix", "coin_flip", "game_of_life_halting", "n_queens", "nothing"])
def test_other_data_sets_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"datasets is \\['{name}'\\]; choose of arc_1d, .*evaluate text"):
        ReasoningGymEnvironment(datasets=[name])


# What a scoring process that was taken over might say; no package is needed for these.
HOSTILE = """
import json, sys, time
print('{"ready": true}', flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if request["answer"] == "forge":
        print('{"score": 1.0, "nonce": "0"}', flush=True)
    elif request["answer"] == "twice":
        print((json.dumps({"score": 1.0, "nonce": request["nonce"]}) + chr(10)) * 2, flush=True)
    elif request["answer"] == "end":
        sys.exit()
    else:
        print(json.dumps({"score": json.loads(request["answer"]), "nonce": request["nonce"]}), flush=True)
"""


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ScoringWorker]:
    program = tmp_path / "hostile.py"
    program.write_text(HOSTILE)
    monkeypatch.setattr(worker_module, "PROGRAM", program)
    running = ScoringWorker(timeout_s=5)
    yield running
    running.close()


@pytest.mark.parametrize("value", ["2", "-1", "true", '"1"', "[1]", "{}", "null", "NaN"])
def test_only_a_number_from_0_to_1_is_a_score(hostile: ScoringWorker, value: str) -> None:
    assert hostile.score("any", 1, 0, value) == 0
    assert hostile.score("any", 1, 0, "0.5") == 0.5
    assert hostile.num_replaced == 0


@pytest.mark.parametrize("answer", ["forge", "twice"])
def test_a_suspicious_process_is_replaced(hostile: ScoringWorker, answer: str) -> None:
    assert hostile.score("any", 1, 0, answer) == 0
    assert hostile.num_replaced == 1
    assert hostile.score("any", 1, 0, "1") == 1


def test_a_process_that_ended_is_no_zero_and_is_replaced(hostile: ScoringWorker) -> None:
    with pytest.raises(EnvironmentFailureError, match="in time"):
        hostile.score("any", 1, 0, "end")
    assert hostile.score("any", 1, 0, "1") == 1


def test_a_missing_package_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "broken.py"
    program.write_text("import no_such_package")
    monkeypatch.setattr(worker_module, "PROGRAM", program)
    with pytest.raises(EnvironmentOptionsError, match=r"pip install ergon\[reasoning-gym\]"):
        ScoringWorker().entry("any", 1, 0)


def test_a_python_that_is_none_is_one_sentence() -> None:
    with pytest.raises(EnvironmentOptionsError, match="python is '/no/such/python', which is no program"):
        ReasoningGymEnvironment(python="/no/such/python")
