"""One number is of one model and one data set, and says what happened on the way to it."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torchattacks
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from fastadv_adapters import FastAttackModel, FastAttackWarning, Report, SafePGD, evaluate
from fastadv_adapters.evaluation import sharing
from fastadv_adapters.modules import seed_generators
from tests.evaluation.processes import forked, meeting_point, wait_for
from tests.evaluation.runs import EPS, FLOAT32, data, evaluated, net
from tests.networks.test_losing import Angles, bright_from
from tests.support.tools import attackable_net

pytestmark = pytest.mark.long


class Flipped(Dataset[tuple[Tensor, Tensor]]):
    """Images that are mirrored now and then."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = (part[index] for part in data(8))
        return x.flip(-1) if torch.rand(()) < 0.5 else x, y


class Dropping(nn.Module):
    """Always draws."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = attackable_net()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.inner(nn.functional.dropout(x, 0.1, training=True))
        return logits


def net_of(rank: int) -> nn.Module:
    """Another one for each rank."""
    other = attackable_net()
    with torch.no_grad():
        next(other.parameters()).mul_(1 + rank)
    return other


OTHERS: dict[str, tuple[Any, Any, str]] = {
    "weights": (net_of, lambda rank: data(8), "model hash"),
    "images": (lambda rank: attackable_net(), lambda rank: (data(9)[0][rank : rank + 8], data(8)[1]), "data hash"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_processes_with_another_model_or_other_data_make_no_number(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "SILENT", 2.0)
    monkeypatch.setattr(sharing, "_BEAT", 0.2)
    model, given, differs = OTHERS[name]

    def share(rank: int) -> None:
        if rank == 0:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("fastadv_adapters.evaluation.evaluating._attack", lambda *_: None)
                evaluated(given(rank), model=FastAttackModel(model(rank), **FLOAT32), output=tmp_path / "run")
            return
        with pytest.raises(ValueError, match=f"expected all processes to have the same {differs}, got .* in process 1"):
            evaluated(given(rank), model=FastAttackModel(model(rank), **FLOAT32), output=tmp_path / "run")

    place = meeting_point()
    both = [forked(lambda rank=rank: share(rank), RANK=str(rank), **place) for rank in range(2)]  # type: ignore[misc]
    assert wait_for(both[1]) == 0
    wait_for(both[0])


def test_images_that_are_others_each_time_are_refused() -> None:
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="expected data that gives the same images each time, got others in samples 0"):
        evaluated(Flipped())


def test_weights_are_those_of_now_whatever_the_options() -> None:
    model = attackable_net()
    fast = FastAttackModel(model, auto_update=False, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0)
    report = evaluated(model=fast)
    assert torch.equal(fast(data(2)[0]), model(data(2)[0]))
    assert report.clean_accuracy == pytest.approx((data()[1] == 0).float().mean().item())


def test_samples_that_were_on_their_way_when_an_audit_failed_are_attacked_again_and_the_report_says_so(
    tmp_path: Path,
) -> None:
    model, (x, _) = Angles(when_bright=0.3).eval(), bright_from(4)
    with torch.no_grad():
        y = model(x).argmax(1)
    with pytest.warns(FastAttackWarning, match="audit-failed"):
        found = evaluated(
            (x, y), "safe-pgd-ce-3", model=FastAttackModel(model, dtype=torch.bfloat16), output=tmp_path, eps=1e-5
        )
    text = "an audit failed on the way: gradients in torch.bfloat16 are not good enough"
    assert [text in note for note in found.notes].count(True) == 1
    assert found.notes == Report.load(tmp_path).notes
    standing = [row for row in found.samples if row.broken_by is None]
    assert standing, "some have to stand"
    assert any(row.backward == 6 for row in standing), "two attacks of three steps"
    again = evaluated((x, y), "safe-pgd-ce-3", model=FastAttackModel(model, **FLOAT32), eps=1e-5)
    assert not any(text in note for note in again.notes)
    assert {row.backward for row in again.samples if row.broken_by is None} == {3}


def test_an_attack_of_torchattacks_is_described_without_its_device_and_arrays() -> None:
    report = evaluated(
        data(8), [torchattacks.PGD(net(), eps=EPS, steps=1), torchattacks.TIFGSM(net(), eps=EPS, steps=1)]
    )
    for text in report.header["settings"]["attacks"].values():
        assert "eps=0.008" in text
        assert "device" not in text
        assert "tensor(" not in text
        assert text.endswith(")")


def test_an_attack_made_of_another_model_is_doubted() -> None:
    other = SafePGD(net_of(1), eps=EPS, steps=2)
    assert any("SafePGD was made of another model" in note for note in evaluated(data(8), other).notes)
    own = SafePGD(net(), eps=EPS, steps=2)
    assert not any("another model" in note for note in evaluated(data(8), own).notes)


def test_attacks_on_a_model_in_a_container_run_on_its_fast_copy() -> None:
    parallel = nn.DataParallel(net()).eval()
    report = evaluate(
        net(), data(8), torchattacks.PGD(parallel, eps=EPS, steps=2), eps=EPS, progress=False, options=FLOAT32
    )
    assert {row.backward for row in report.samples if row.broken_by != "clean"} == {2.0}


def test_images_of_samples_without_a_row_stay_out(tmp_path: Path) -> None:
    whole = evaluated(output=tmp_path)
    rows = tmp_path / "rows.jsonl"
    gone = next(row.index for row in whole.samples if row.linf is not None)
    kept = [line for line in rows.read_text("utf-8").splitlines(keepends=True) if f'"index": {gone},' not in line]
    assert len(kept) == len(whole.samples) - 1
    rows.write_text("".join(kept), encoding="utf-8")
    left = Report.load(tmp_path)
    assert gone in whole.adversarials()
    assert gone not in left.adversarials()
    left.triples(tmp_path / "t.png")


def test_random_numbers_of_the_caller_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, generator = Dropping().eval(), torch.Generator().manual_seed(1)
    loader = DataLoader(TensorDataset(*data(8)), batch_size=4, shuffle=True, generator=generator)
    touched: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", touched.append)
    before, own = torch.get_rng_state(), generator.get_state()
    reports = [
        evaluate(model, loader, torchattacks.PGD(model, eps=EPS, steps=1), eps=EPS, progress=False, options=FLOAT32)
        for _ in range(2)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(generator.get_state(), own)
    assert touched == [], "devices that the model is not on"
    assert reports[0].denied == reports[1].denied


def test_seeds_are_those_of_the_cpu() -> None:
    with torch.random.fork_rng(devices=[]):
        seed_generators(3, torch.device("cpu"))
        first = torch.rand(1)
        torch.manual_seed(3)
        assert torch.equal(first, torch.rand(1))


def test_a_fast_model_in_the_place_of_the_plain_one_is_copied_with_it() -> None:
    """So that what is evaluated is what was copied."""
    fast = FastAttackModel(net(), **FLOAT32)
    other = copy.deepcopy(fast)
    assert evaluated(model=other).robust_accuracy == evaluated(model=fast).robust_accuracy
