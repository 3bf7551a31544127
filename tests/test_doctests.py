"""Every example in a docstring does what it shows."""

import doctest
import importlib
import pkgutil

import pytest
import torch

import bnkit


def modules():
    for found in pkgutil.walk_packages(bnkit.__path__, "bnkit."):
        if not found.name.startswith("bnkit.conf"):
            yield found.name


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
@pytest.mark.parametrize("name", modules())
def test_the_examples_hold(name):
    # What every reader has imported.
    names = {"bnkit": bnkit, "Moments": bnkit.Moments, "torch": torch}
    assert doctest.testmod(importlib.import_module(name), extraglobs=names).failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    assert sum(bool(test.examples) for name in modules() for test in finder.find(importlib.import_module(name))) > 30
