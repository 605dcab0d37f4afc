"""TextArena games, played in a process that has the package. See serve.py; knows nothing of rewards' use."""

import contextlib
import importlib
from collections.abc import Callable
from typing import Any


def load(options: "dict[str, Any]") -> "dict[str, Any]":
    """Import the package and make one game, to know that it can be. The number of players it was asked for."""
    textarena = importlib.import_module("textarena")
    game = textarena.make(options["id"] + "-raw", **options["options"])
    game.reset(num_players=options["num_players"], seed=0)
    player, seen = game.get_observation()
    written(seen, player)
    # What a move loads or compiles once is loaded here, and not in the fork of every episode.
    with contextlib.suppress(Exception):  # this one is no move
        game.step(action="")
    return {"num_players": options["num_players"]}


def play(ask: "Callable[[dict[str, Any]], Any]", options: "dict[str, Any]") -> None:
    """The requests are {"seed"}, then {"move"} for the player whose turn the last answer said that it is."""
    textarena = importlib.import_module("textarena")
    game = textarena.make(options["id"] + "-raw", **options["options"])
    game.reset(num_players=options["num_players"], seed=ask({})["seed"])
    done = False
    while True:
        answer: dict[str, Any] = {"done": done}
        if done:
            rewards, about = game.close()
            rewards = {str(player): float(value) for player, value in (rewards or {}).items()}
            answer |= {"rewards": rewards, "reason": str((about or {}).get(0, {}).get("reason", ""))}
        player, seen = game.get_observation()
        answer |= {"player": int(player), "seen": written(seen, player)}
        done = bool(game.step(action=ask(answer)["move"])[0])


def written(seen: Any, player: int) -> str:
    """What a player has seen since its last move, but for its own words."""
    return "\n".join(
        str(text) for sender, text, kind in seen if sender != player or kind.name != "PLAYER_ACTION"
    ).strip()
