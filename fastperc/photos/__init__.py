"""Photographs, from files to files: read, run through a network or an optimiser, written."""
