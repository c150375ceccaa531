"""Fixtures of several adapters' tests."""

import pytest
from support.bbbc021 import make_bbbc021
from support.small_bbbc021 import FEW


@pytest.fixture
def small_bbbc021(tmp_path):
    """Two plates with four wells of one field of view."""
    make_bbbc021(tmp_path, treatments=FEW, sites=1, size=(24, 16))
    return tmp_path
