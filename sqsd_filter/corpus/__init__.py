"""Rows from anywhere, and the conversation in each row."""
