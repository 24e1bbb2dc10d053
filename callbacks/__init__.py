"""Lightning callbacks and loggers: they say when; the arithmetic is in seedlora."""

from seedlora.callbacks.json_lines import JSONLinesLogger as JSONLinesLogger
from seedlora.callbacks.progress import EnsembleProgressBar as EnsembleProgressBar
from seedlora.callbacks.seed_ensemble import SeedEnsembleCallback as SeedEnsembleCallback
from seedlora.callbacks.throughput import Throughput as Throughput
