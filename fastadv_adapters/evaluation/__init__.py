"""A data set attacked and reported.

``evaluating`` is the whole of it; ``planning`` looks at everything first: ``data`` reads samples by index (of anything
but ``lookalikes`` of data), ``attacks`` says what runs on them. ``safe`` (a batch that is kept full), ``standard``
(AutoAttack) and ``libraries`` (with callables) are ``stages`` that samples (``rows``) pass one after the other
(``running``), judged by the plain model (``confirming``); ``describing`` says what an attack is. ``store`` keeps what
is finished, for the model and data that ``identity`` names (by hashes of ``content``), ``sharing`` shares the work
among processes, ``seeds`` makes random numbers that depend on neither, ``progress`` shows how far it is, and
``report`` with ``pictures`` tells what was found. ``metric`` is the same number in a training loop; it alone needs
torchmetrics, and is imported by name.
"""

from .evaluating import evaluate
from .report import Report
from .rows import Row

__all__ = ["Report", "Row", "evaluate"]
