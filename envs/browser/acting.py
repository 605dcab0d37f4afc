"""What can be done on a page: click, type, select, press, scroll. Input goes to the browser as a person's would.

Raises ToolError, in words for the policy, where an element does not take what is asked of it. Knows no episode.
"""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from envs.browser.cdp import CdpError
from envs.browser.keys import key_events, typed_events
from envs.browser.page import Page
from envs.browser.snapshot import FIELDS, Element, plain
from envs.tools import ToolError

MAX_TYPED = 2000
STROKE_BY_STROKE = 200  # longer texts arrive at once, as if pasted
WHEEL = 500
WIDTH, HEIGHT = 1024, 768

# Fields with parts or pickers of their own are set as their pickers do; all others are emptied, to be typed into.
_FOCUS = """function(text) {
  if (this.disabled) return 'disabled';
  if (this.readOnly) return 'readonly';
  this.focus();
  if (['date', 'time', 'month', 'week', 'datetime-local', 'color', 'range'].includes(this.type)) {
    this.value = text;
    this.dispatchEvent(new Event('input', {bubbles: true}));
    this.dispatchEvent(new Event('change', {bubbles: true}));
    return this.value === text ? 'set' : 'refused';
  }
  if (this.select) this.select();
  else if (this.isContentEditable) getSelection().selectAllChildren(this);
  else return 'nothing';
  return 'focused';
}"""
_SELECT = """function(wanted) {
  if (!this.options) return 'nothing';
  const names = [...this.options].map(each => each.label.replace(/\\s+/g, ' ').trim());
  const index = names.indexOf(wanted);
  if (this.disabled || (index >= 0 && this.options[index].disabled)) return 'disabled';
  if (index < 0) return 'missing';
  this.focus();
  if (this.multiple) this.options[index].selected = !this.options[index].selected;
  else this.selectedIndex = index;
  this.dispatchEvent(new Event('input', {bubbles: true}));
  this.dispatchEvent(new Event('change', {bubbles: true}));
  return 'selected';
}"""
# Where an element is not covered by another: the number of its rectangle, and the shares of its width and height. The
# middle, else the nearest to it; null where there is no such place, as with a field that hides beneath its label.
_UNCOVERED = """function() {
  const root = this.getRootNode(), shares = [0.5, 0.3, 0.7, 0.1, 0.9, 0.02, 0.98];
  if (!this.getClientRects || !root.elementFromPoint) return null;
  const far = place => Math.hypot(place[0] - 0.5, place[1] - 0.5);
  const places = shares.flatMap(x => shares.map(y => [x, y])).sort((one, other) => far(one) - far(other));
  for (const [number, rect] of [...this.getClientRects()].entries()) {
    if (rect.width < 1 || rect.height < 1) continue;
    for (const [x, y] of places) {
      const hit = root.elementFromPoint(rect.left + x * rect.width, rect.top + y * rect.height);
      if (hit && this.contains(hit)) return [number, x, y];
    }
  }
  return null;
}"""


async def click(page: Page, element: Element) -> None:
    """A click with the left button on the middle of an element, or where it is not covered by another one."""
    x, y = await _place(page, element)
    await _mouse(page, x, y)


async def _mouse(page: Page, x: float, y: float) -> None:
    button: dict[str, Any] = {"x": x, "y": y, "button": "left", "clickCount": 1}
    await _in_order(
        page,
        ("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": x, "y": y}),
        ("Input.dispatchMouseEvent", {"type": "mousePressed", "buttons": 1, **button}),
        ("Input.dispatchMouseEvent", {"type": "mouseReleased", "buttons": 0, **button}),
    )


async def _in_order(page: Page, *commands: tuple[str, dict[str, Any]]) -> None:
    """Send commands together; they are carried out in this order."""
    *first, (method, parameters) = commands
    answers = [page.post(each, **values) for each, values in first]
    await page.send(method, **parameters)
    await asyncio.gather(*answers)


async def _place(page: Page, element: Element) -> tuple[float, float]:
    try:
        await page.send("DOM.scrollIntoViewIfNeeded", backendNodeId=element.node)
        uncovered = await page.call(element.node, _UNCOVERED)
        found = await page.send("DOM.getContentQuads", backendNodeId=element.node)
    except CdpError:
        raise ToolError(f"the {_named(element)} is not there any more, or cannot be seen") from None
    quads = found["quads"]
    if uncovered is not None and uncovered[0] < len(quads):
        return _inside(quads[uncovered[0]], uncovered[1], uncovered[2])
    for quad in quads:
        xs, ys = quad[0::2], quad[1::2]
        if max(xs) - min(xs) >= 1 and max(ys) - min(ys) >= 1:
            return _inside(quad, 0.5, 0.5)
    raise ToolError(f"the {_named(element)} cannot be seen")


def _inside(quad: list[float], across: float, down: float) -> tuple[float, float]:
    """The point at these shares of a parallelogram, which is given clockwise from its upper left corner."""
    (left, top), (right, right_top), _, (low_left, low) = zip(quad[0::2], quad[1::2], strict=True)
    return (
        left + across * (right - left) + down * (low_left - left),
        top + across * (right_top - top) + down * (low - top),
    )


def _named(element: Element) -> str:
    return f'{element.role} "{plain(element.name, 60)}"'


async def write(page: Page, element: Element, text: str) -> None:
    """Type a text into a field, in place of what it holds."""
    if len(text) > MAX_TYPED:
        raise ToolError(f"a text may have {MAX_TYPED} characters")
    if element.role not in FIELDS and element.role != "combobox":
        raise ToolError(f"the {_named(element)} is no field to type into")
    state = await _called(page, element, _FOCUS, text)
    if state == "focused":
        await _in_order(page, *_strokes(text))
    elif state != "set":
        reason = {"refused": f"does not take {plain(text, 60)!r}", "nothing": "is no field to type into"}
        raise ToolError(f"the {_named(element)} {reason.get(state, f'is {state}')}")


def _strokes(text: str) -> list[tuple[str, dict[str, Any]]]:
    pressed = [("Input.dispatchKeyEvent", event) for event in key_events("Delete")]
    if len(text) > STROKE_BY_STROKE or "\n" in text:
        return [*pressed, ("Input.insertText", {"text": text})]
    return [*pressed, *(("Input.dispatchKeyEvent", event) for each in text for event in typed_events(each))]


async def select(page: Page, element: Element, option: str) -> None:
    """Choose an option of a selection by its name; of one that takes several, add it or take it away."""
    wanted = " ".join(option.split())
    state = await _called(page, element, _SELECT, wanted)
    if state == "missing":
        raise ToolError(f"the {_named(element)} has no option {plain(wanted, 60)!r}")
    if state != "selected":
        raise ToolError(f"the {_named(element)} {'is disabled' if state == 'disabled' else 'is no selection'}")


async def _called(page: Page, element: Element, function: str, argument: str) -> Any:
    try:
        return await page.call(element.node, function, argument)
    except CdpError:
        raise ToolError(f"the {_named(element)} is not there any more") from None


async def press(page: Page, key: str) -> None:
    """Press a key where the focus is."""
    await _in_order(page, *(("Input.dispatchKeyEvent", event) for event in key_events(key)))


async def scroll(page: Page, direction: Literal["up", "down"], element: Element | None) -> None:
    """Turn the wheel over an element, or over the middle of the page."""
    x, y = await _place(page, element) if element else (WIDTH / 2, HEIGHT / 2)
    delta = WHEEL if direction == "down" else -WHEEL
    await page.send("Input.dispatchMouseEvent", type="mouseWheel", x=x, y=y, deltaX=0, deltaY=delta)
