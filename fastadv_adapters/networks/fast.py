"""One fast network in one precision, with what runs it."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from ..engines import EagerEngine, GiveUp, make_engine
from ..folding import Trace, build_fast
from ..kernels import lay_nothing_out
from ..modules import EngineName, Precision, outside_of_transforms


class Fast:
    """A fast network and its engine.

    Args:
        source: what is copied and followed.
        trace: what folds.
        precision: of the network.
        engine: the engine asked for.
        give_up: told why, once, if that engine cannot run this network.
        keeps: whether weights stay as they are between updates, so that what depends on them alone is kept.

    Attributes:
        folded: the network.
        precision: how it computes.
        engine: what runs it.
        ends: names of the layers that hand out full precision in calls that ask for it.
    """

    def __init__(
        self,
        source: nn.Module,
        trace: Trace | None,
        precision: Precision,
        engine: EngineName,
        give_up: GiveUp,
        keeps: bool = True,
    ) -> None:
        self.precision = precision
        self._name, self._give_up = engine, give_up
        self.ends: set[str] = set()
        self._behind, self._used = False, True
        if trace is not None and not precision.half:
            trace = trace.without_streams()  # float32 has digits enough for a mean
        self.folded = build_fast(source, trace, precision, lays_out_ahead=keeps and engine != "compile")
        if not keeps:
            lay_nothing_out(self.folded.network)
        self._run_anew()

    def _run_anew(self) -> None:
        network, around = self.folded.network, self.folded.balanced
        self.engine = make_engine(self._name, network, self.precision, around=around, give_up=self._give_up)

    def eager(self) -> EagerEngine:
        """Runs the network's own code, once."""
        return EagerEngine(self.folded.network, self.precision, convert=True, around=self.folded.balanced)

    def follow(self, *, later: bool = False) -> None:
        """Bring the network up to date, in place.

        Args:
            later: not before it is used, if nobody has used it since the last time.
        """
        self._behind = True
        if later and not self._used:
            return
        for refresh in self.folded.refreshes:
            refresh()
        self.engine.follow()
        self._behind = self._used = False

    def caught_up(self, lock: AbstractContextManager[Any]) -> "Fast":
        """This network, up to date for use; no update comes meanwhile if it takes this lock."""
        self._used = True
        if self._behind:
            with lock, torch.inference_mode(False), torch.no_grad(), outside_of_transforms():
                if self._behind:
                    self.follow()
                    self._used = True
        return self

    def end_at(self, layers: Iterable[str]) -> None:
        """Let half precision end at these layers in the calls that ask for it."""
        new = set(layers) - self.ends
        if new and self.precision.half:
            self.ends |= new
            self.folded.end_at(sorted(new))
            self._run_anew()  # what was compiled or recorded knows other classes, and other tensors
