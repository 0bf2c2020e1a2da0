"""All settings are in pyproject.toml. CMakeLists.txt builds fastperc._C."""

from setuptools import setup

setup()
