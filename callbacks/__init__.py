"""Lightning callbacks and loggers: they say when; the arithmetic is in seedlora."""

from callbacks.json_lines import JSONLinesLogger as JSONLinesLogger
from callbacks.progress import EnsembleProgressBar as EnsembleProgressBar
from callbacks.seed_ensemble import SeedEnsembleCallback as SeedEnsembleCallback
from callbacks.throughput import Throughput as Throughput
