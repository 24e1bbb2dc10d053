"""What a run shows: tables in the terminal, results as JSON."""
