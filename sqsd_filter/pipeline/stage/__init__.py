"""Shards of rows, and the engines that score them: in this process, or on Ray."""
