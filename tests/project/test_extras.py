"""What only some parts need is imported by them, with an error that says what to install."""

import sys
from pathlib import Path

import pytest

from fastadv_adapters.modules import need


def test_a_library_that_is_there_is_given() -> None:
    assert need("json.decoder", extra="cli") is sys.modules["json.decoder"]


def test_a_library_that_is_missing_is_named_with_its_extra() -> None:
    with pytest.raises(ImportError, match=r"expected the package not_there to be installed, .*\[cli\]"):
        need("not_there.inside", extra="cli")


def test_what_to_do_without_it_stands_at_the_end() -> None:
    with pytest.raises(ImportError, match=r"\[cli\]', or do without$"):
        need("not_there", extra="cli", otherwise="do without")


def test_an_import_that_fails_inside_a_library_is_its_own_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "needs_more.py").write_text("import not_there")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="not_there") as raised:
        need("needs_more", extra="cli")
    assert raised.value.name == "not_there"
