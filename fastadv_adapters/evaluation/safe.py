"""``SafePGD`` in an evaluation: a batch that is kept full."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor, nn

from ..attack import LEAST_ROWS, Departed, Entrants, SafePGD, Streaming, doubt_steps, stream_of
from .describing import code_of, described
from .identity import are_one
from .rows import Case
from .seeds import seed_of, seeded
from .stages import Attack, Setting, Stage

AVERAGED = 10
"""Over how many passes gradients of a model that draws random numbers are averaged."""

RIVALS = 9
"""How many of the likeliest other classes "targeted" raises, one after the other."""


@dataclass(frozen=True)
class Safe(Attack):
    """``SafePGD`` as it was asked for.

    Attributes:
        settings: of :class:`~fastadv_adapters.SafePGD`, but for the model, the budget and the bounds.
        targeted: whether each start raises one of the likeliest other classes.
        given: budget, norm and bounds of an attack that was given, which those of the evaluation have to be.
        made_of: the model of an attack that was given.
    """

    settings: dict[str, Any]
    targeted: bool = False
    given: tuple[float, str, tuple[float, float]] | None = None
    made_of: nn.Module | None = None

    @property
    def description(self) -> str:
        """All settings."""
        settings = {**self.settings, "targeted": self.targeted}
        code = code_of(self.settings["loss"]) if callable(self.settings.get("loss")) else ""
        return f"SafePGD({', '.join(f'{k}={described(v)}' for k, v in settings.items())}){code}"

    def doubt(self, model: nn.Module) -> str | None:
        """Whether it was made of another model, or its steps are in other units than its budget."""
        if self.made_of is None or self.given is None:
            return None
        if are_one(self.made_of, model):
            short = doubt_steps(self.given[0], self.settings["alpha"], self.settings["steps"])
            return None if short is None else f"{self.name}: {short}"
        return (
            f"{self.name} was made of another model, a {type(self.made_of).__name__}; here it attacks the model that "
            f"is evaluated. To transfer its images, pass a callable (model, x, y) that runs it"
        )

    def stage(self, setting: Setting, eps: float) -> Stage:
        """The attack with this budget, which has to be its own if it was given."""
        if self.given not in (None, (eps, setting.norm, setting.bounds)):
            raise ValueError(
                f"expected SafePGD with eps, norm and bounds of the evaluation, {(eps, setting.norm, setting.bounds)}, "
                f"got {self.given}: make it with these, or name it (safe-pgd-ce-50, say)"
            )
        attack = SafePGD(
            setting.fast, eps=eps, norm=setting.norm, bounds=setting.bounds, early_stop=True, **self.settings
        )
        rivals = min(RIVALS, setting.classes - 1) if self.targeted else 0
        way = Streaming(
            norm=setting.norm,
            eps=eps,
            bounds=setting.bounds,
            starts=rivals or (attack.restarts if attack.random_start else 1),
            capacity=max(LEAST_ROWS, setting.batch_size),
            seed_of=lambda index, start: seed_of(setting.seed, self.name, index, start),
            clearance=setting.judge.clearance,
            passes=AVERAGED if setting.random else 1,
        )
        return SafeStage(self.name, eps, setting, attack, way, rivals)


@dataclass
class SafeStage(Stage):
    """Samples on their way through ``SafePGD``.

    Attributes:
        attack: its settings and networks.
        way: how the stream runs.
        rivals: how many classes each sample is pushed to, 0 if the loss chooses.
    """

    attack: SafePGD
    way: Streaming
    rivals: int

    def run(self, source: Iterator[Case]) -> Iterator[tuple[Case, Tensor, bool]]:
        """A sample leaves as soon as it is broken or out of steps, and the next takes its place.

        If an audit has failed since it came in, a sample that stands is attacked again after all others.
        """
        networks = self.setting.fast._networks
        while True:
            again: list[Case] = []
            for case, x, claimed, failed in self._once(source):
                if failed < networks.failed and not claimed:
                    again.append(case)
                else:
                    yield case, x, claimed
            if not again:
                return
            source = iter(again)

    def _once(self, source: Iterator[Case]) -> Iterator[tuple[Case, Tensor, bool, int]]:
        """Each sample once, with how many audits had failed when it came in."""
        inside: dict[int, tuple[Case, int]] = {}
        stream = stream_of(self.attack, self.way, rivals=self.rivals > 0, largest_label=self.setting.classes - 1)

        def entrants(room: int) -> Entrants | None:
            cases = list(islice(source, room))
            inside.update((case.index, (case, self.setting.fast._networks.failed)) for case in cases)
            return self._entrants(cases) if cases else None

        for gone in self._reproducible(stream.run(entrants)):
            counted = zip(gone.forwards.tolist(), gone.backwards.tolist(), gone.seconds.tolist(), strict=True)
            for index, x, claimed, counts in zip(gone.index, gone.x, gone.claimed.tolist(), counted, strict=True):
                case, failed = inside.pop(index)
                case.add(*counts)
                yield case, x, claimed, failed

    def _reproducible(self, stream: Iterator[Departed]) -> Iterator[Departed]:
        """The same; a model that draws random numbers draws the same ones in every run."""
        for number in count():
            with seeded(seed_of(self.setting.seed, self.name, number), self.setting.judge.device):
                gone = next(stream, None)
            if gone is None:
                return
            yield gone

    def _entrants(self, cases: list[Case]) -> Entrants:
        device = self.setting.judge.device

        def whole(values: list[Any]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        rivals = whole([case.rivals[: self.rivals] for case in cases]).view(len(cases), self.rivals)
        x = torch.stack([case.x for case in cases])
        return Entrants(whole([case.index for case in cases]), x, whole([case.label for case in cases]), rivals)
