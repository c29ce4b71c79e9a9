"""The package is described in pyproject.toml; this is the place for extension modules, of which it has none yet."""

from setuptools import setup

setup()
