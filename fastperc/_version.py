"""The version, where nothing else need be imported to read it."""

__version__ = "0.1.0"
