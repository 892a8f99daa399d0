"""The limits that the pages promise."""

import pytest

from fastadv_adapters.networks import nearness, schedule
from fastadv_adapters.networks.finding import MOST, SAMPLES, Finding

FINDINGS = [  # docs/trust/audit.md
    (Finding(8, 0, 0.99, 0.95), True),
    (Finding(8, 0, 0.989, 0.96), False),
    (Finding(8, 0, 0.995, 0.949), False),
    (Finding(8, 1, 1.0, 1.0), False),
    (Finding(8, 0, 0.5, 0.2, gain=0.95, least=0.8), True),
    (Finding(8, 0, 0.5, 0.2, gain=0.949, least=1.0), False),
    (Finding(8, 0, 0.5, 0.2, gain=1.0, least=0.799), False),
]


@pytest.mark.parametrize(("finding", "good"), FINDINGS)
def test_a_finding_is_good_within_the_limits_of_the_page(finding: Finding, *, good: bool) -> None:
    assert finding.good is good


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
