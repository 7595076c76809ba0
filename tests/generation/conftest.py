"""Tiny models on disk, shared by the tests of this folder."""

import pytest


@pytest.fixture(scope="session")
def lm(save_tiny):
    return save_tiny("vocabulary")


@pytest.fixture(scope="session")
def rm(save_tiny):
    return save_tiny("reward", seed=1)
