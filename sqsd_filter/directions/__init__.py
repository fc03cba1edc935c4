"""Directions room: the compass (a pack of adapters) is made, read and checked here."""
