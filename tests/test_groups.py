"""Tests that share a module's fixture run in one process; xdist and pytest must agree on how that is said."""

import os

import pytest


@pytest.fixture(scope="module")
def shared():
    return os.getpid()


def test_a_module_with_a_shared_fixture_is_a_group(shared, request):
    if not request.config.getoption("loadgroup", False):
        pytest.skip("everything runs in one process")
    assert request.node.nodeid.endswith("@test_groups")
