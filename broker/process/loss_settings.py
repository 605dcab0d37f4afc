"""What the loss can be told: the section `[learner.loss]`, and which of its choices go together. Computes nothing."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from broker.process.section import Section

Kind = Literal["grpo", "cispo", "gspo", "dppo_tv", "decoupled", "reinforce"]
Correction = Literal["truncated", "window", "guard"]

_ALL: tuple[Correction, ...] = ("truncated", "window", "guard")
_CORRECTIONS: dict[Kind, tuple[Correction, ...]] = {
    "grpo": _ALL,
    "cispo": _ALL,
    "gspo": ("guard",),
    "dppo_tv": ("truncated", "guard"),
    "decoupled": _ALL,
    "reinforce": (),
}


class LossSection(Section):
    kind: Kind = "grpo"
    """The policy loss: `grpo` PPO's clip against the behaviour policy; `cispo` the truncated importance weight on the
    score function; `gspo` the clip on a sequence's ratio; `dppo_tv` a mask by total variation instead of the clip;
    `decoupled` PPO's clip against the policy at the batch's beginning, weighted by that policy's ratio to the behaviour
    policy; `reinforce` the plain score function."""
    importance: tuple[Literal["truncated", "window", "guard", "auto"], ...] = ("auto",)
    """What is done about tokens that another policy sampled: `truncated` caps the importance weight at importance_cap,
    `window` masks tokens outside token_window, `guard` masks sequences outside sequence_guard; [] for none. `auto`: all
    three (gspo: guard; dppo_tv: truncated and guard; reinforce: none)."""
    aggregation: Literal["auto", "token", "sequence", "constant"] = "auto"
    """What counts alike in the loss: every `token` of the step; every episode (`sequence`); every episode by the sum
    over its tokens divided by constant_tokens (`constant`). `auto`: sequence for gspo, token for all others."""
    constant_tokens: int = Field(default=1024, ge=1)
    """With aggregation `constant`, what an episode's sum is divided by: the length of a long one."""
    clip_low: float = Field(default=0.2, ge=0, lt=1)
    """grpo, decoupled: the ratio's lower clip, 1 - clip_low."""
    clip_high: float = Field(default=0.28, ge=0)
    """grpo, decoupled: the ratio's upper clip, 1 + clip_high (clip-higher)."""
    sequence_clip: tuple[float, float] = (3e-4, 4e-4)
    """gspo: how far a sequence's ratio may be below and above 1 before it is clipped."""
    divergence_bound: float = Field(default=0.2, gt=0, le=1)
    """dppo_tv: a token whose probability has moved by more than this, and would be moved on, is masked."""
    importance_cap: float = Field(default=2.0, ge=1)
    """Cap of the token-level truncated importance weight."""
    token_window: tuple[float, float] = (0.5, 5.0)
    """Tokens whose ratio lies outside are masked."""
    sequence_guard: tuple[float, float] = (0.5, 2.0)
    """Sequences whose geometric-mean ratio lies outside are masked."""
    drift_penalty: float = Field(default=1e-3, ge=0)
    """Weight of the squared log-ratio to the behaviour policy."""
    reference_kl: float = Field(default=0.0, ge=0)
    """Weight of the KL to the reference policy, the one that reinforcement learning began with; 0 needs no
    reference."""
    reference_estimator: Literal["k1", "k2", "k3"] = "k3"
    """How that KL is estimated: k1 and k2 have the exact gradient, k3 is GRPO's, of less variance where it is small."""
    entropy_bonus: float = Field(default=0.0, ge=0)
    """Weight of the policy's entropy, which is subtracted from the loss."""
    baseline: Literal["mean", "leave_one_out"] = "mean"
    """The group's baseline."""
    divide_by_std: bool = False
    """Divide a group's advantages by the standard deviation of its rewards, as GRPO was published."""
    overlong: Literal["keep", "mask", "soft"] = "keep"
    """Episodes that ended for want of tokens: `keep` trains on them with their reward, `mask` leaves them out of
    gradient and baseline, `soft` trains and lowers the reward of every episode as it comes near overlong_tokens.
    Time-outs are graded on what was reached and trained on always."""
    overlong_tokens: int = Field(default=0, ge=0)
    """soft: sampled tokens of an episode from which on 1 is subtracted from its reward."""
    overlong_buffer: int = Field(default=0, ge=0)
    """soft: how many tokens before that the punishment begins, growing linearly from 0."""

    @property
    def corrections(self) -> tuple[Correction, ...]:
        """`importance`, with `auto` resolved."""
        chosen = tuple(correction for correction in self.importance if correction != "auto")
        return chosen if "auto" not in self.importance else _CORRECTIONS[self.kind]

    @property
    def aggregated_by(self) -> Literal["token", "sequence", "constant"]:
        """`aggregation`, with `auto` resolved."""
        if self.aggregation == "auto":
            return "sequence" if self.kind == "gspo" else "token"
        return self.aggregation

    @model_validator(mode="after")
    def _fits_together(self) -> LossSection:
        self._check_importance()
        if self.kind == "gspo" and self.aggregated_by != "sequence":
            raise ValueError(
                f'aggregation = "{self.aggregation}" with kind = "gspo", whose ratio belongs to the whole sequence; '
                'set "auto" or "sequence"'
            )
        for name, (low, high) in (("token_window", self.token_window), ("sequence_guard", self.sequence_guard)):
            if not 0 <= low < 1 < high:
                raise ValueError(f"{name} = [{low:g}, {high:g}]; it must enclose 1 and begin at 0 or above")
        if min(self.sequence_clip) < 0 or self.sequence_clip[0] >= 1:
            raise ValueError(
                f"sequence_clip = {list(self.sequence_clip)}; the first must be in [0, 1), the second >= 0"
            )
        if self.overlong == "soft" and not 0 < self.overlong_buffer < self.overlong_tokens:
            raise ValueError(
                f'overlong = "soft" with overlong_tokens = {self.overlong_tokens} and overlong_buffer = '
                f"{self.overlong_buffer}; set overlong_tokens to the most tokens an episode may sample, and "
                "overlong_buffer between 0 and that"
            )
        return self

    def _check_importance(self) -> None:
        chosen = self.corrections
        if len(set(self.importance)) < len(self.importance) or ("auto" in self.importance and len(self.importance) > 1):
            raise ValueError(f'importance = {list(self.importance)}; name each correction once, or "auto" alone')
        if self.kind == "cispo" and "truncated" not in chosen:
            raise ValueError(
                f'importance = {list(chosen)} with kind = "cispo", which is the truncated importance weight; add '
                '"truncated", or choose kind = "reinforce" for none'
            )
        if self.kind == "reinforce" and "truncated" in chosen:
            raise ValueError(
                f'importance = {list(chosen)} with kind = "reinforce", which has no importance weight to truncate; '
                'choose kind = "cispo" for the score function with a truncated weight'
            )
        if self.kind == "gspo" and set(chosen) - {"guard"}:
            raise ValueError(
                f'importance = {list(chosen)} with kind = "gspo", whose ratio belongs to the whole sequence; '
                'only "guard" goes with it'
            )
