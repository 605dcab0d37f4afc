"""What a run may spend on thinking: the section `[thinking]`, and how budgets and their keeping are reported.

A budget is a number of tokens, 0 for none, None for any number. Starts nothing and draws nothing: the learner draws
budgets (learner/budgets.py), the actors keep to them (actors/sampler.py).
"""

from __future__ import annotations

from typing import Annotated, Literal, Protocol, TypeAlias

from pydantic import Field, field_validator, model_validator

from broker.process.section import Section

Budget: TypeAlias = int | None
UNLIMITED = "unlimited"

_Share: TypeAlias = Annotated[float, Field(ge=0, le=1)]
_Tokens: TypeAlias = Annotated[int, Field(ge=1)]
_Weighted: TypeAlias = tuple[_Tokens, Annotated[float, Field(gt=0, allow_inf_nan=False)]]

_ROUNDING = 1e-9
_FLOORS = (1, 16, 64, 256, 1024, 4096)
BUDGET_BUCKETS = ("0", "1-15", "16-63", "64-255", "256-1023", "1024-4095", "4096+", UNLIMITED)
"""The values of every metric's label `budget`, so that their number is bounded."""


def budget_bucket(budget: Budget) -> str:
    """The bucket that a budget is counted in."""
    if budget is None:
        return UNLIMITED
    return BUDGET_BUCKETS[sum(budget >= floor for floor in _FLOORS)]


def budget_name(budget: Budget) -> str:
    """A budget as text: its number, or `unlimited`."""
    return UNLIMITED if budget is None else str(budget)


class Account(Protocol):
    """What of an episode says how it kept its budget; TrajectoryHead has it."""

    @property
    def num_overrun_tokens(self) -> int:
        """Thinking tokens beyond the budget."""
        ...

    @property
    def num_forced_stops(self) -> int:
        """How often the actor ended the thinking."""
        ...


def adherence(account: Account) -> Literal["kept", "over", "forced"]:
    """How an episode kept its budget: by itself; with thinking beyond it, where it is soft; or stopped by the actor."""
    if account.num_overrun_tokens:
        return "over"
    return "forced" if account.num_forced_stops else "kept"


class BudgetsSection(Section):
    zero: _Share = 0.0
    """Share of the groups with a budget of 0: they answer without thinking."""
    unlimited: _Share = 1.0
    """Share of the groups that may think as long as they like; with 1, the default, there are no budgets."""
    between: tuple[_Tokens, _Tokens] | None = None
    """Smallest and largest budget of all other groups, in tokens; drawn log-uniformly between them, both included."""
    choices: tuple[_Weighted, ...] = ()
    """Instead of between: budgets of all other groups with their weights, as [[16, 1.0], [64, 2.0]]."""

    @property
    def bounded(self) -> float:
        """Share of the groups with a budget above 0."""
        share = 1.0 - self.zero - self.unlimited
        return share if share > _ROUNDING else 0.0

    @property
    def largest(self) -> int:
        """The largest budget that is not unlimited; 0 where there is none."""
        return max((budget for budget, _ in self.choices), default=self.between[1] if self.between else 0)

    @model_validator(mode="after")
    def _fits_together(self) -> BudgetsSection:
        taken = self.zero + self.unlimited
        if taken > 1 + _ROUNDING:
            raise ValueError(f"zero + unlimited = {taken:g}; shares of the groups add up to 1 at most")
        if self.between is not None and self.choices:
            raise ValueError(f"between = {list(self.between)} and choices are both set; remove one of them")
        if self.between is not None and self.between[0] > self.between[1]:
            raise ValueError(f"between = {list(self.between)}; the smaller budget comes first")
        named = self.between is not None or bool(self.choices)
        if named and taken >= 1 - _ROUNDING:
            raise ValueError(
                f"zero + unlimited = {taken:g} leave no group for the budgets of between or choices; lower unlimited"
            )
        if not named and taken < 1 - _ROUNDING:
            raise ValueError(f"zero + unlimited = {taken:g}; say what the other groups have with between or choices")
        return self


class SoftSection(Section):
    overrun_rate: float | None = Field(default=None, ge=0, lt=1)
    """Share of the episodes that may think beyond their budget (epsilon). Set, budgets are soft: thinking may go on up
    to `limit` times the budget, and what goes beyond the budget costs reward, at a price (lambda) that is adapted until
    the share is this one. Not set: every budget is kept strictly, and there is nothing to pay for."""
    limit: float = Field(default=2.0, gt=1, le=16)
    """Thinking is stopped at this multiple of a soft budget."""
    price: float = Field(default=1.0, gt=0)
    """The price that the run begins with: the reward that thinking twice as long as the budget costs."""
    price_rate: float = Field(default=0.5, gt=0, le=10)
    """By how much one step moves the price's logarithm, for each unit that the share of overruns is above or below its
    target."""
    price_gain: float = Field(default=3.0, ge=0, le=10)
    """By how much it moves the price's logarithm for each unit that this share has changed since the step before: it
    gives way while a policy learns to think less, and not only when the share has fallen below its target."""
    price_memory: float = Field(default=0.7, ge=0, lt=1)
    """The share that the price follows is a mean over the steps, in which each weighs this much of the next. One step's
    few groups have budgets and tasks by chance, and so a share by chance."""
    price_bounds: tuple[float, float] = (0.05, 10.0)
    """The price never leaves these bounds. For an overrun of a few tokens to cost as much as a right answer earns, it
    may have to be several times that reward. The smaller one is above 0, because the price is multiplied."""

    @model_validator(mode="after")
    def _ordered(self) -> SoftSection:
        low, high = self.price_bounds
        if not 0 < low <= self.price <= high < float("inf"):
            raise ValueError(
                f"price = {self.price:g} with price_bounds = [{low:g}, {high:g}]; it must lie between them, and both "
                "above 0"
            )
        return self


class ThinkingSection(Section):
    per: Literal["turn", "episode"] = "turn"
    """What a budget is for: each `turn`, or the whole `episode`, whose later turns do not think once it is spent."""
    tags: tuple[str, str] = ("<think>", "</think>")
    """What opens and what closes thinking. What stands between them is no answer, and no call in it is made."""
    opens: Literal["policy", "context"] = "policy"
    """Who writes the opening tag: the `policy` where it wants to think, or the `context` in every turn that may, for
    models that do not begin by themselves. (A chat format that ends its header with the tag needs neither.)"""
    stop_phrase: str = " Time is up, so I answer with what I have."
    """Written before the closing tag where thinking has reached its limit; never trained on."""
    tell: Literal["sentence", "qwen3", "none"] = "sentence"
    """How the policy is told its budget, at the end of the first user message: in a `sentence`, unlimited by none; as
    Qwen3 switches thinking, with /think or /no_think and the sentence; or not at all (`none`)."""
    budgets: BudgetsSection = BudgetsSection()
    soft: SoftSection = SoftSection()

    @field_validator("tags")
    @classmethod
    def _check_tags(cls, tags: tuple[str, str]) -> tuple[str, str]:
        opening, closing = tags
        if not opening or not closing or opening in closing or closing in opening:
            raise ValueError(f"tags = {list(tags)}; two texts, neither of which is part of the other")
        return tags

    @model_validator(mode="after")
    def _phrase_closes_nothing(self) -> ThinkingSection:
        if any(tag in self.stop_phrase for tag in self.tags):
            raise ValueError(f"stop_phrase = {self.stop_phrase!r} contains a tag; it comes before the closing one")
        return self

    def limit(self, budget: Budget) -> Budget:
        """Thinking tokens at which an actor stops the thinking of this budget."""
        if budget is None or self.soft.overrun_rate is None:
            return budget
        return int(budget * self.soft.limit)
