"""Scores by conversation: stored as they are computed, shared between runs, and joined with the rows."""
