"""Directions by contrast: between the updates that unsafe rows cause and those that other rows cause."""
