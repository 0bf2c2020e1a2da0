"""Training on a folder of photos: a recipe says what is trained and how, and :func:`train` runs it."""

from fastperc.training.loop import train
from fastperc.training.recipe import Recipe, Task
from fastperc.training.style import StyleRecipe
from fastperc.training.super_resolution import SuperResolutionRecipe

__all__ = ["Recipe", "StyleRecipe", "SuperResolutionRecipe", "Task", "train"]
