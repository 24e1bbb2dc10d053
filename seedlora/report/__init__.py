"""What a run shows: tables in the terminal, results as JSON."""

from seedlora.report.results import Results as Results
from seedlora.report.results import results as results
from seedlora.report.tables import model_commands as model_commands
from seedlora.report.tables import next_commands as next_commands
from seedlora.report.tables import results_table as results_table
from seedlora.report.tables import verdict as verdict
