"""Tests that coverage leaves out: what they run in the package runs in others too, and it takes half of their time."""

from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PROJECT = TESTS / "project"
# Of 20,500 steps from line to line that all tests take these files alone take 50. To find such files anew:
# `python -m pytest --cov --cov-context=test`, and ask the data for lines whose contexts are all of one file.
FILES = {
    TESTS / name
    for name in (
        "adapters/test_default_decisions.py",
        "adapters/test_exact_gradients.py",
        "adapters/test_foolbox_by_default.py",
        "adapters/test_minimum_norm.py",
        "adapters/test_peers_foolbox.py",
        "adapters/test_peers_foolbox_attacks.py",
        "adapters/test_peers_torchattacks.py",
        "attack/test_auto_loss.py",
        "attack/test_cycles.py",
        "attack/test_rescue.py",
        "attack/test_safe_pgd.py",
        "attack/test_work.py",
        "engines/test_compiled.py",
        "evaluation/test_without_a_class.py",
        "folding/test_inplace.py",
        "folding/test_memo.py",
        "kernels/test_prepacked.py",
        "kernels/test_shapes.py",
        "model/test_architectures.py",
        "model/test_confident.py",
        "model/test_inspection.py",
        "model/test_interrupts.py",
        "model/test_lifecycle.py",
        "model/test_threads.py",
        "model/test_wrappers.py",
        "networks/test_experts.py",
        "networks/test_followed.py",
        "networks/test_freshness.py",
        "networks/test_losing.py",
        "networks/test_schedule.py",
    )
}


def is_uncounted(item: pytest.Item) -> bool:
    """Whether a test is of these files, of the project's own, or a property test."""
    is_property = getattr(getattr(item, "obj", None), "is_hypothesis_test", False)
    return is_property or item.path in FILES or item.path.is_relative_to(PROJECT)
