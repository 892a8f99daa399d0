"""Errors of the package name arguments of Python; on a command line they are options."""

import re

NAMES = ("attacks", "batch_size", "bounds", "data", "eps", "limit", "norm", "output", "repeats", "resume", "seed")
"""Arguments of ``evaluate`` and ``compare`` that are options of the same name."""

_NAME = f"({'|'.join(NAMES)})"
_SUBJECT = re.compile(rf"^expected {_NAME}(?= (?:to (?:be|give|hold|name)|of at least)\b| \()")
_TRUTH = re.compile(rf"\b{_NAME}=(True|False)\b")
_GIVEN = re.compile(rf"\b{_NAME}=(\([^)]*\)|\"[^\"]*\"|[\w.+/-]*\w)")


def as_options(text: str) -> str:
    """The text of an error with ``--bounds 0,1`` for ``bounds=(0, 1)``, and with options as its subject."""
    text = _SUBJECT.sub(lambda found: f"expected {_option(found[1])}", text)
    text = _TRUTH.sub(lambda found: f"--{'' if found[2] == 'True' else 'no-'}{_option(found[1])[2:]}", text)
    return _GIVEN.sub(lambda found: f"{_option(found[1])} {_plain(found[2])}", text)


def _plain(value: str) -> str:
    return value.strip('()"').replace(" ", "")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
