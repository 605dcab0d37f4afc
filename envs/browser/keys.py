"""The keys that the tool `press` knows, as Chromium's `Input.dispatchKeyEvent` wants them. A table."""

from __future__ import annotations

from typing import Any, Literal, get_args

Key = Literal[
    "Enter", "Tab", "Escape", "Space", "Backspace", "Delete", "ArrowUp", "ArrowDown", "ArrowLeft", "ArrowRight",
    "Home", "End", "PageUp", "PageDown",
]  # fmt: skip
# Virtual key codes of Windows, which Chromium uses everywhere, and the text that a key types.
_CODES = {
    "Enter": (13, "\r"),
    "Tab": (9, ""),
    "Escape": (27, ""),
    "Space": (32, " "),
    "Backspace": (8, ""),
    "Delete": (46, ""),
    "ArrowUp": (38, ""),
    "ArrowDown": (40, ""),
    "ArrowLeft": (37, ""),
    "ArrowRight": (39, ""),
    "Home": (36, ""),
    "End": (35, ""),
    "PageUp": (33, ""),
    "PageDown": (34, ""),
}
KEYS: tuple[str, ...] = get_args(Key)


def key_events(key: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Press and release of a named key."""
    code, text = _CODES[key]
    name = " " if key == "Space" else key
    both: dict[str, Any] = {"key": name, "code": key, "windowsVirtualKeyCode": code}
    down = {"type": "keyDown" if text else "rawKeyDown", **both}
    if text:
        down |= {"text": text, "unmodifiedText": text}
    return down, {"type": "keyUp", **both}


def typed_events(character: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Press and release of the key that types a character."""
    both: dict[str, Any] = {"key": character}
    if character.isascii() and character.isalnum():
        both |= {"windowsVirtualKeyCode": ord(character.upper())}
    return {"type": "keyDown", "text": character, "unmodifiedText": character, **both}, {"type": "keyUp", **both}
