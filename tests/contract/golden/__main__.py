"""`python -m tests.contract.golden --write`: write the golden files of the protocol's present version anew."""

from __future__ import annotations

import argparse

from tests.contract.golden import CURRENT, by_code, messages, text_of


def main() -> None:
    """Write, or say what would be."""
    parser = argparse.ArgumentParser(prog="python -m tests.contract.golden", description=__doc__)
    parser.add_argument("--write", action="store_true", help="without it nothing is written, only compared")
    write = parser.parse_args().write
    for name in messages():
        path, text = CURRENT / f"{name}.hex", text_of(by_code(name))
        changed = not path.exists() or path.read_text() != text
        print(f"{path}: {'differs' if changed else 'as it is'}")
        if changed and write:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)


if __name__ == "__main__":
    main()
