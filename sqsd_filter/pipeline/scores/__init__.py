"""Scores by conversation: kept as they come, shared between runs, joined with the rows."""
