"""Scores and their statistics: intervals, results, tables, advice."""
