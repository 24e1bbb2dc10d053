"""Merge rules: pure functions of :class:`~seedlora.factors.LoRAFactors`, one paper per file."""

from seedlora.merge._lowrank import gram as gram
from seedlora.merge._lowrank import means as means
from seedlora.merge._lowrank import variances as variances
from seedlora.merge._lowrank import weighted_sum as weighted_sum
from seedlora.merge._methods import METHODS as METHODS
from seedlora.merge._methods import MergeRule as MergeRule
from seedlora.merge._methods import Method as Method
from seedlora.merge._methods import bind as bind
from seedlora.merge._seedlora import seedlora as seedlora
from seedlora.merge._soup import soup as soup
