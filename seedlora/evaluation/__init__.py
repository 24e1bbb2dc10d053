"""Scores and their uncertainty."""

from seedlora.evaluation.statistics import Difference as Difference
from seedlora.evaluation.statistics import Score as Score
from seedlora.evaluation.statistics import adjust_over_tasks as adjust_over_tasks
from seedlora.evaluation.statistics import holm as holm
from seedlora.evaluation.statistics import mcnemar as mcnemar
from seedlora.evaluation.statistics import paired_difference as paired_difference
from seedlora.evaluation.statistics import wilson as wilson
