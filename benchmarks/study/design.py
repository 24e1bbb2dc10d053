"""Say what the study asks, of which tasks, by which cells, and what would prove each idea wrong.

The question: n replicas are trained for T steps each and merged. At the same tokens one can train one seed for n T
steps, or one seed for T steps with n times the rows in each. When is the merged adapter better than both?

Where a replica stands in its training matters, so each task has a *floor*: the number of epochs after which one seed,
trained with its own schedule, has its lowest validation loss (``floors.py`` finds it, by a seed that no cell has, with
the learning rate that is best there). Cells lie at a third of it, at it, and at three times it.

**What would prove each idea wrong**, written before the first cell was trained. A difference counts where its interval
over the cells leaves 0 out; "better" is a lower test loss or more exact matches, both are reported.

1. *Independent seeds*: at a length they are not worth it if the wide batch, at the best of three rates by validation,
   beats soup by 0.01 nats or more on two of three tasks, or the long seed at its best validation does.
2. *Branch*: if the loss is monotone in the part that the trunk takes, one of its ends is better, and the scheme goes.
3. *Local averaging*: if it is no better than soup of independent seeds and than the wide batch, it goes. *Outer step*:
   if one seed with it is as good, within 0.005 nats, the gain is the outer step's, not the ensemble's.
4. *Sweep*: if soup of three rates is no better than soup of three seeds at one rate, sweeping buys choice alone.
5. *Exponential mean*: if soup of the means is not better than soup by 0.005 nats, it adds nothing to fusing; if the
   long seed's mean is as good as soup, fusing adds nothing to it.
6. *The paper's rule, gains, KnOTS*: the claim is of accuracy after long training. If at three times the floor the rule
   has no more exact matches than soup on two of three tasks, the claim does not hold here.
7. *Best fused step*: if it is no better than soup of the last steps, and than soup of each seed's own best, at the
   floor and past it, it goes.
8. *The sentence* "train longer, or fuse?": wrong if its sign is wrong in more than 1 of 5 cells whose truth is shown.

What beats the best control on two of three tasks, by an interval that leaves 0 out, becomes a recipe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

BATCH, RANK = 8, 8
SETS = ((11, 42, 202), (7, 19, 83), (101, 303, 505))
EIGHT = (1, 2, 3, 4, 5, 6, 7, 8)
COUNTS = (2, 3, 5, 8)
#: Of no cell: it finds the floors, at these rates and lengths in epochs, each of which three divides.
SCOUT, RATES, EPOCHS = 4711, (1e-3, 2e-3, 4e-3, 8e-3), (3, 6, 12, 24)
#: Lengths in floors.
LENGTHS = (1 / 3, 1.0, 3.0)
#: Validations of a replica in a fit.
VALIDATIONS = 8
#: An exponential mean looks back over this part of a replica's steps.
EMA_PART = 0.1


@dataclass(frozen=True)
class Task:
    """A generated task.

    Args:
        name: of the reasoning-gym data set.
        options: of it.
        num_train: rows of an epoch, a multiple of the batch.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    num_train: int = 120

    @property
    def data(self) -> dict[str, Any]:
        """Return arguments of the data module."""
        return {
            "task": self.name,
            "task_options": dict(self.options),
            "num_train": self.num_train,
            "num_val": 256,
            "num_test": 512,
        }


#: By label. Answers of ``spell_backward`` have ten tokens and more, those of the others two or three.
TASKS: Mapping[str, Task] = {
    "sums": Task("chain_sum", {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1}, 160),
    "letter_counting": Task("letter_counting", {"min_words": 3, "max_words": 6}),
    "spell_backward": Task("spell_backward", {"min_word_len": 10, "max_word_len": 16}),
}


@dataclass(frozen=True)
class Way:
    """One way to spend the budget of a cell: one run of the product.

    Args:
        options: of the ensemble callback.
        seeds: whether it trains ``all`` of a cell, or the ``first``, for as many tokens as all.
        rates: factors of the learning rate, one for each seed.
        ema: whether exponential means are kept.
        validates: whether it is validated in training; the others are merged without.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    seeds: str = "all"
    rates: Sequence[float] = ()
    ema: bool = False
    validates: bool = False


#: By label. The first one also trains the controls: the long seed and the wide batches.
WAYS: Mapping[str, Way] = {
    "independent": Way({"controls": "equal_tokens"}, ema=True, validates=True),
    "one start": Way({"scheme": "branch", "trunk": 0.0}),
    "branch 0.5": Way({"scheme": "branch", "trunk": 0.5}),
    "local": Way({"scheme": "local"}),
    "outer": Way({"scheme": "local", "outer_learning_rate": 0.7}),
    "outer, one seed": Way({"scheme": "local", "outer_learning_rate": 0.7}, seeds="first"),
    "rates": Way({"sweep_mode": "zip"}, rates=(0.5, 1.0, 2.0)),
    "best fused": Way({"keep": "best_fused"}, validates=True),
    "best seeds": Way({"keep": "best"}, validates=True),
}


@dataclass(frozen=True)
class Cell:
    """One task at one length with one set of seeds, in all ways; or, as ``counts``, with two to eight seeds.

    Args:
        task: of :data:`TASKS`.
        length: of each replica, in floors of the task.
        seeds: of the replicas.
        kind: ``ways``, ``controls`` (independent seeds and their controls alone) or ``counts``.
    """

    task: str
    length: float
    seeds: tuple[int, ...]
    kind: str = "ways"

    @property
    def name(self) -> str:
        """Return a name for people and folders."""
        return f"{self.task}_{self.length:.2g}_{'-'.join(map(str, self.seeds))}_{self.kind}"


def design(*, small: bool, tasks: Sequence[str] = tuple(TASKS)) -> list[Cell]:
    """Return all cells, in the order of what one wants to know next: each task once before any a second time.

    Args:
        small: whether the base model is the small one; of another, independent seeds and their controls are asked.
        tasks: labels.
    """
    if not small:
        lengths = (1.0, 1 / 3, 3.0)
        return [Cell(task, length, seeds, "controls") for seeds in SETS for length in lengths for task in tasks]
    cells = [Cell(task, length, SETS[0]) for length in (1.0, 3.0, 1 / 3) for task in tasks]
    cells += [Cell(task, length, SETS[1]) for length in (1.0, 3.0, 1 / 3) for task in tasks]
    cells += [Cell(task, 1.0, EIGHT, "counts") for task in tasks]
    return cells + [Cell(task, length, SETS[2]) for length in (1.0, 3.0, 1 / 3) for task in tasks]
