"""Folders that are whole or not there, on a disk or behind a URL; and trying again where it helps."""
