"""TextArena driven directly, by the Python that has it: `python direct_games.py ID MOVES GAMES` prints seconds a move.

A move is what the adapter asks for: say it, and see what the player sees next. Imports nothing of the project.
"""

from __future__ import annotations

import json
import sys
import time


def main() -> None:
    """Play and print."""
    import textarena

    name, moves, num_games = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
    times = []
    for seed in range(num_games):
        game = textarena.make(name + "-raw")
        game.reset(num_players=1, seed=seed)
        game.get_observation()
        for move in moves:
            began = time.perf_counter()
            done = game.step(action=move)[0]
            if not done:
                game.get_observation()
            times.append(time.perf_counter() - began)
        if not done:
            raise RuntimeError(f"{moves} do not end {name}")
    print(json.dumps(times))


if __name__ == "__main__":
    main()
