"""The limits that the pages promise."""

import pytest
import torch

from fastadv_adapters.networks import nearness, schedule
from fastadv_adapters.networks.finding import MOST, SAMPLES, Finding

FINDINGS = [  # docs/trust/audit.md
    (Finding(8, 0, 0.99, 0.95), True),
    (Finding(8, 0, 0.989, 0.96), False),
    (Finding(8, 0, 0.995, 0.949), False),
    (Finding(8, 1, 1.0, 1.0), False),
    (Finding(8, 0, 1.0, 1.0, lost=0.05), True),
    (Finding(8, 0, 1.0, 1.0, lost=0.051), False),
    (Finding(8, 0, 0.5, 0.2, gain=0.95, least=0.8), True),
    (Finding(8, 0, 0.5, 0.2, gain=0.949, least=1.0), False),
    (Finding(8, 0, 0.5, 0.2, gain=1.0, least=0.799), False),
]


@pytest.mark.parametrize(("finding", "good"), FINDINGS)
def test_a_finding_is_good_within_the_limits_of_the_page(finding: Finding, *, good: bool) -> None:
    assert finding.good is good


TOLD = [
    (Finding(8, 0, 0.98, 0.9), "exact ones is 0.98 (limit 0.99)"),
    (Finding(8, 0, 0.98996, 0.96), "exact ones is 0.98996 (limit 0.99)"),
    (Finding(8, 0, 0.995, 0.9496), "exact ones is 0.99, of the worst samples 0.9496 (limit 0.95)"),
    (Finding(8, 0, 0.5, 0.2, gain=0.9497, least=1.0), "gains 94.97% (limit 95%) of what it should"),
    (Finding(8, 0, 0.5, 0.2, gain=1.0, least=0.7996), "of what it should, of the worst samples 79.96% (limit 80%)"),
    (Finding(8, 0, 1.0, 1.0, lost=0.051), "5.1% (limit 5%) of the entries of gradients are zero"),
    (Finding(8, 0, 1.0, 1.0, off=0.0702), "off by 7.02% (limit 7%) of the largest"),
]


@pytest.mark.parametrize(("finding", "text"), TOLD, ids=[text for _, text in TOLD])
def test_figures_are_told_apart_from_their_limits(finding: Finding, text: str) -> None:
    assert text in str(finding)


def test_differences_are_told_apart_from_their_limits() -> None:
    logits = torch.tensor([[1.0, 0.0], [0.0, -1.0]])
    off = nearness.difference(([logits * 1.001003], []), ([logits], []))
    assert off == "the folded model's outputs differ by up to 0.001003 (limit 0.001) of a sample's largest"
    turned = torch.tensor([[0.9897, (1 - 0.9897**2) ** 0.5], [0, 1]])
    far = nearness.difference(([logits], [turned]), ([logits], [torch.eye(2)]))
    assert far == "the folded model's gradients differ, cosine 0.9897 (limit 0.99)"


@pytest.mark.parametrize(
    ("samples", "gain", "slight"), [(1, 0.8, True), (5, 0.9, True), (6, 0.9, False), (1, 0.7, False)]
)
def test_what_is_looked_for_again(samples: int, gain: float, *, slight: bool) -> None:
    assert Finding(samples, 0, 0.9, 0.9, gain=gain, least=gain).is_slight is slight
    assert not Finding(samples, 1, 0.9, 0.9, gain=gain, least=gain).is_slight
    assert not Finding(samples, 0, 0.9, 0.9).is_slight


def test_the_other_limits_are_those_of_the_pages() -> None:
    assert (nearness.FAR, nearness.OLD, nearness.LOGITS_WITHIN, nearness.COSINE_ABOVE) == (0.07, 0.03, 1e-3, 0.99)
    assert (schedule.PASSES, schedule.SOON, SAMPLES, MOST) == (256, 64, 6, 32)
