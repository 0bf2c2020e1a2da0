"""Trained networks as fast as the device runs them: :func:`freeze`, and the :class:`Engine` that it returns."""

from fastperc.engine.engine import Engine, freeze

__all__ = ["Engine", "freeze"]
