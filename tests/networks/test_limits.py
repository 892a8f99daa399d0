"""The limits that the pages promise."""

import pytest

from fastadv_adapters.networks import audit, nearness, schedule

FINDINGS = [  # docs/trust/audit.md
    (audit.Finding(8, 0, 0.99, 0.95), True),
    (audit.Finding(8, 0, 0.989, 0.96), False),
    (audit.Finding(8, 0, 0.995, 0.949), False),
    (audit.Finding(8, 1, 1.0, 1.0), False),
    (audit.Finding(8, 0, 0.5, 0.2, gain=0.95, least=0.9), True),
    (audit.Finding(8, 0, 0.5, 0.2, gain=0.949, least=1.0), False),
    (audit.Finding(8, 0, 0.5, 0.2, gain=1.0, least=0.899), False),
]


@pytest.mark.parametrize(("finding", "good"), FINDINGS)
def test_a_finding_is_good_within_the_limits_of_the_page(finding: audit.Finding, *, good: bool) -> None:
    assert finding.good is good


def test_the_other_limits_are_those_of_the_pages() -> None:
    assert (nearness.FAR, nearness.OLD, nearness.LOGITS_WITHIN, nearness.COSINE_ABOVE) == (0.07, 0.03, 1e-3, 0.99)
    assert (schedule.PASSES, schedule.SOON, audit.SAMPLES, audit.MOST) == (256, 64, 6, 32)
