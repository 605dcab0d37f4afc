"""reasoning-gym's scorer called directly, by the Python that has it: `python direct_scores.py DATASET NUM`.

Prints seconds of each scoring: make the data set, take the entry, score its own answer. Imports nothing of the project.
"""

from __future__ import annotations

import json
import sys
import time


def main() -> None:
    """Score and print."""
    import reasoning_gym

    dataset, num = sys.argv[1], int(sys.argv[2])
    times = []
    for index in range(num):
        answer = str(reasoning_gym.create_dataset(dataset, seed=1, size=index + 1)[index]["answer"])
        began = time.perf_counter()
        made = reasoning_gym.create_dataset(dataset, seed=1, size=index + 1)
        score = made.score_answer(answer, made[index])
        times.append(time.perf_counter() - began)
        if score != 1.0:
            raise RuntimeError(f"{dataset} scores its own answer {answer!r} with {score}")
    print(json.dumps(times))


if __name__ == "__main__":
    main()
