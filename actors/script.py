"""A turn that a reference policy wrote, drawn as if it were sampled: so demonstrations keep to the budgets, too.

Owns where such a turn is cut: at the tags of thinking, so that its tokens have the boundaries that sampling and closing
give. Only asked by the sampler; never decides when thinking is over.
"""

from __future__ import annotations

import numpy as np

from actors.engine import FinishReason, Sample
from actors.renderer import REFERENCE_VERSION, Renderer
from actors.thinking import Thinking
from broker.protocol.trajectory import VersionRun


class Script:
    """What is left of one turn; its tokens have the version of a reference and log-probs of 0.

    allowed: thinking tokens that the turn may have, 0 where thinking is closed already, None for any number. is_open:
    whether the turn's header has opened thinking. within: thinking tokens after which the turn closes its thinking by
    itself, None for wherever it does. Where a soft budget may be overrun, demonstrations show how it is kept.
    """

    def __init__(
        self,
        thinking: Thinking,
        renderer: Renderer,
        text: str,
        allowed: int | None,
        is_open: bool,
        within: int | None = None,
    ) -> None:
        self._opening, self._closing = thinking.settings.tags
        self._end = ("", renderer.turn(""))
        texts, tags = thinking.pieces(text), thinking.settings.tags
        last = texts.pop() if texts and not texts[-1].isspace() and texts[-1] not in tags else ""
        self._pieces = [(piece, (renderer.tag if piece in tags else renderer.inside)(piece)) for piece in texts]
        self._pieces.append((last, renderer.turn(last)))
        thinks = self._pieces[0][0] == self._opening
        if allowed == 0 and thinks:
            self.skip_thinking()
        elif is_open and thinks:
            del self._pieces[0]
        elif is_open:  # the context has opened it: a turn that does not think closes it
            self._pieces.insert(0, (self._closing, thinking.closing(True)))
        if within is not None:
            self._shorten(within, len(renderer.tag(self._closing)), is_open)

    def draw(self, max_tokens: int) -> Sample:
        """The next tokens; never beyond an opening tag, at which the actor may have a word to say."""
        ids: list[int] = []
        while self._pieces and len(ids) < max_tokens:
            text, piece = self._pieces.pop(0)
            room = max_tokens - len(ids)
            ids += piece[:room]
            if len(piece) > room:
                self._pieces.insert(0, (text, piece[room:]))
            elif text == self._opening:
                break
        runs = (VersionRun(*REFERENCE_VERSION, len(ids)),)
        finish: FinishReason = "length" if self._pieces and len(ids) == max_tokens else "stop"
        return Sample(np.asarray(ids, np.int32), np.zeros(len(ids), np.float32), runs, finish)

    def _shorten(self, within: int, num_closing: int, is_open: bool) -> None:
        """Leave out what is thought beyond so many tokens, those of the closing tags included."""
        if within < num_closing and self._pieces[0][0] == self._opening:
            self.skip_thinking()
        kept, left = [], within
        for text, ids in self._pieces[:-1]:
            if text in (self._opening, self._closing):
                left -= num_closing if text == self._closing else 0
                is_open = text == self._opening
            elif is_open:
                ids = ids[: max(0, left - num_closing)]
                left -= len(ids)
            kept.append((text, ids))
        self._pieces = [(text, ids) for text, ids in kept if ids] + self._pieces[-1:]

    def skip_thinking(self) -> None:
        """The actor has closed thinking: what is left of it, and the gap behind it, is not written any more."""
        closings = [i for i, (text, _) in enumerate(self._pieces) if text == self._closing]
        self._pieces = self._pieces[closings[0] + 1 :] if closings else [self._end]
        if self._pieces[0][0].isspace():
            del self._pieces[0]
