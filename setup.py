"""Packages: jaxmerge, and configs/ as jaxmerge/configs. All else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
  packages=[*find_packages(include=["jaxmerge", "jaxmerge.*"]), "jaxmerge.configs"],
  package_dir={"jaxmerge.configs": "configs"},
)
