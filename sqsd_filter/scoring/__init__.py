"""Scoring room: one row in, its danger, safety and risk out."""
