"""Wrong use and bad input: status 2, one line, no traceback, nothing half-written left."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastadv_adapters.cli import main
from fastadv_adapters.cli.failing import NAMES, as_options
from fastadv_adapters.cli.speaking import LINGER

from .conftest import Run

NET = "networks_of_a_user.py:Net"
ON = ("--data", "data.npz")
FAST = ("--attacks", "safe-pgd-1", "--no-progress")


class Code:
    """What runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("made_by_weights",)


def failed(result: Any, text: str) -> None:
    assert result.exit_code == 2, result.output
    assert text in result.stderr
    assert result.stderr.startswith("fastadv: ")
    assert len(result.stderr.splitlines()) == 1
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("no_colon", *ON), "expected a model as MODULE:NAME, got 'no_colon'"),
        (("nowhere.py:Net", *ON), "expected a file, got nowhere.py, which is not there"),
        (("no_such_module:Net", *ON), "expected no_such_module to be importable, got ModuleNotFoundError"),
        (("networks_of_a_user.py:Nett", *ON), "to have Nett, got none of that name"),
        (("networks_of_a_user.py:raises", *ON), "to make a model without arguments, got KeyError: 'no such file'"),
        (("networks_of_a_user.py:other", *ON), "to make a torch.nn.Module, got str"),
        (("networks_of_a_user.py:number", *ON), "to be a model or to make one, got int"),
        ((NET, "--data", "nothing.npz"), "expected a file of data, got nothing.npz"),
        ((NET, "--data", "nothing"), "expected data as a .npz or .safetensors file"),
        ((NET, "--data", "networks_of_a_user.py"), "got 'networks_of_a_user.py': save x and y as one of these"),
        ((NET, "--data", "networks_of_a_user.py:raises"), "to make data without arguments, got KeyError"),
        ((NET, "--data", "weights.safetensors"), "expected arrays x and y in weights.safetensors, got 1."),
        ((NET, "--data", "images"), "expected a folder with a folder of images per class, got images without any"),
        ((NET, *ON, "--eps", "8/0"), "expected a number or a fraction, got '8/0'"),
        ((NET, *ON, "--eps=-1"), "expected --eps to be finite and at least 0"),
        ((NET, *ON, "--norm", "l3"), "expected --norm to be one of"),
        ((NET, *ON, "--bounds", "0"), "expected two numbers as bounds, got '0'"),
        ((NET, *ON, "--bounds", "0,0.1"), "bounds of your data as --bounds lower,upper"),
        ((NET, "--data", "networks_of_a_user.py:arrays"), "a pair of tensors (x, y), got ndarray and ndarray: pass"),
        (
            (NET, "--data", "networks_of_a_user.py:like_bytes"),
            "Divide x by 255; or, if the model takes such values, pass --bounds 0,255",
        ),
        ((NET, *ON, "--device", "tpu9"), "expected a device that is there, got 'tpu9'"),
        ((NET, *ON, "--weights", "nothing.pt"), "expected a file of weights, got nothing.pt"),
        ((NET, *ON, "--weights", "data.npz"), "expected data.npz to hold weights"),
        ((NET, *ON, "--weights", "data.safetensors"), "without 1.bias, 1.weight and with x, y"),
        ((NET, *ON, "--weights", "networks_of_a_user.py"), "expected weights and nothing else"),
    ],
)
def test_bad_input_is_one_line(fastadv: Run, folder: Path, arguments: tuple[str, ...], text: str) -> None:
    (folder / "images").mkdir()
    before = sorted(folder.iterdir())
    failed(fastadv("compare", *arguments), text)
    failed(fastadv("evaluate", *arguments, *FAST, "--output", "run"), text)
    assert [path for path in sorted(folder.iterdir()) if path.name != "__pycache__"] == before


def test_compare_needs_one_kind_of_input(fastadv: Run) -> None:
    failed(fastadv("compare", NET), "expected --input or --data, got neither")
    failed(fastadv("compare", NET, *ON, "--input", "3x2x2"), "expected --input or --data, got both")
    failed(fastadv("compare", NET, "--input", "3*2"), "expected the shape of one image as input, got '3*2'")
    failed(fastadv("compare", NET, "--input", "3x3x3"), "shapes cannot be multiplied")
    failed(fastadv("evaluate", NET), "expected data to evaluate on, got none")


@pytest.mark.parametrize(
    ("x", "y", "text"),
    [
        ((0.0, 1.0), (0, 3), "expected labels below the number of classes, 3, got 3"),
        ((0.0, 1.0), (1, 3), "ount labels from 0, and check that they belong to the model's task"),
        ((0.0, 1.0), (0, -1), "expected labels of at least 0"),
        ((0.0, 1.0), (0.0, 1.0), "to be integers, got float64 of shape (2,): save the classes"),
        ((0.0, 1.5), (0, 1), "expected x within bounds (0, 1)"),
        ((0.0, np.nan), (0, 1), "expected x to be finite"),
        ((0, 1), (0, 1), "to be floating, or bytes, got int64"),
        ((0.0, 1.0), (0, 1, 2), "label"),
    ],
)
def test_bad_arrays_are_one_line(fastadv: Run, x: tuple[float, float], y: tuple[float, ...], text: str) -> None:
    np.savez("bad.npz", x=np.broadcast_to(np.array(x)[:, None, None, None], (2, 3, 2, 2)), y=np.array(y))
    failed(fastadv("compare", NET, "--data", "bad.npz"), text)
    failed(fastadv("evaluate", NET, "--data", "bad.npz", *FAST, "--output", "run"), text)
    assert not Path("run").exists()


def test_arrays_of_objects_and_weights_with_code_are_not_run(fastadv: Run) -> None:
    np.savez("objects.npz", x=np.array([Code()], dtype=object), y=np.array([0]), allow_pickle=True)
    failed(fastadv("compare", NET, "--data", "objects.npz"), "expected objects.npz to hold arrays, got ValueError")
    torch.save(Code(), "code.pt")
    Path("plain.pt").write_bytes(pickle.dumps(Code()))
    for name in ("code.pt", "plain.pt"):
        failed(fastadv("compare", NET, *ON, "--weights", name), f"expected weights and nothing else, got {name}")
    assert not Path("made_by_weights").exists()


def test_weights_of_another_shape_or_kind_are_named(fastadv: Run) -> None:
    torch.save({"1.weight": torch.zeros(3, 11), "1.bias": torch.zeros(3)}, "shape.pt")
    torch.save([1, 2], "list.pt")
    torch.save({"net": {}, "optimizer": {}, "epoch": 3, "loss": 0.1}, "checkpoint.pt")
    text = "got a dictionary of net, optimizer, epoch and 1 more: save model.state_dict() alone"
    failed(fastadv("compare", NET, *ON, "--weights", "checkpoint.pt"), text)
    Path("broken.safetensors").write_bytes(b"no header")
    text = "expected 1.weight of shape (3, 12), got (3, 11) in shape.pt"
    failed(fastadv("compare", NET, *ON, "--weights", "shape.pt"), text)
    failed(fastadv("compare", NET, *ON, "--weights", "list.pt"), "under 'state_dict', got list: save")
    failed(
        fastadv("compare", NET, *ON, "--weights", "broken.safetensors"), "expected broken.safetensors to hold weights"
    )


def test_requirements_and_attacks_that_do_not_exist(fastadv: Run) -> None:
    failed(fastadv("evaluate", NET, *ON, *FAST, "--require", "speed>=2"), "expected a requirement on robust or clean")
    failed(fastadv("evaluate", NET, *ON, *FAST, "--require", "robust>=40"), "expected a requirement between 0 and 1")
    failed(fastadv("evaluate", NET, *ON, "--attacks", "pgd"), "expected --attacks to name")


def test_folders_that_cannot_be_used(fastadv: Run, folder: Path) -> None:
    what = ("evaluate", NET, *ON, *FAST)
    assert fastadv(*what, "--output", "run").exit_code == 0
    failed(fastadv(*what, "--output", "run", "--eps", "0.1"), "eps")
    failed(fastadv(*what, "--output", "run", "--no-resume"), "run")
    failed(fastadv(*what, "--output", "data.npz"), "data.npz")
    failed(fastadv(*what, "--output", "/proc/nowhere"), "/proc/nowhere")
    failed(fastadv("report", "nowhere"), "expected the folder of an evaluation, got nowhere")


def test_a_full_disk(fastadv: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compare = ("compare", NET, "--input", "3x2x2", "--repeats", "1", "--batch-size", "4")
    failed(fastadv(*compare, "--json", "/dev/full"), "No space left on device")
    before = sorted(folder.iterdir())

    def full(self: Path, text: str, **_: Any) -> int:
        self.touch()
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", full)
    failed(fastadv("info", "--json", "info.json"), "No space left on device")
    failed(fastadv(*compare, "--json", "c.json"), "No space left on device")
    assert sorted(folder.iterdir()) == before


def test_files_that_cannot_be_written_are_told_before_anything_is_computed(fastadv: Run, folder: Path) -> None:
    assert fastadv("evaluate", NET, *ON, *FAST, "--output", "run").exit_code == 0
    before = sorted(folder.iterdir())
    commands = {
        ("info",): ("--json",),
        ("compare", NET, *ON): ("--json", "--plot"),
        ("evaluate", NET, *ON, *FAST): ("--json", "--plot", "--triples"),
        ("report", "run"): ("--json", "--plot", "--triples"),
        ("demo",): ("--json", "--plot"),
    }
    no_folder = "expected a file that can be written to, got nowhere/a.png: No such file or directory"
    for command, options in commands.items():
        for option in options:
            result = fastadv(*command, option, "nowhere/a.png")
            failed(result, no_folder)
            assert result.stdout == ""
            if option != "--json":
                for name in ("a", "a.xyz"):
                    result = fastadv(*command, option, name)
                    failed(result, "expected a picture with one of the endings ")
                    assert f"png, ps, raw, rgba, svg, svgz, tif, tiff, webp, got '{name}'" in result.stderr
                    assert result.stdout == ""
    failed(fastadv("info", "--json", "run"), "expected a file that can be written to, got run: Is a directory")
    assert sorted(folder.iterdir()) == before


def test_a_disk_that_is_full_in_the_middle_of_an_evaluation(fastadv: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    what = ("evaluate", NET, *ON, *FAST, "--output", "run")
    real, left = os.fsync, [3]  # header, adversarials, lines

    def full(handle: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        for written in (0, 1, 2):
            left[0] = written
            failed(fastadv(*what), "No space left on device")
            assert list(Path("run").glob("*.unfinished")) == []
    assert fastadv(*what).exit_code == 0, "it goes on once there is room"


def test_an_interrupted_evaluation_says_that_it_goes_on(fastadv: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **options: object) -> None:
        raise KeyboardInterrupt

    what = ("evaluate", NET, *ON, *FAST, "--output", "run")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", stop)
        result = fastadv(*what)
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1].startswith("fastadv: interrupted: what is finished is in run")
    assert "Traceback" not in result.output
    assert fastadv(*what).exit_code == 0
    with monkeypatch.context() as patch:
        patch.setattr("fastadv_adapters.cli.app.evaluate", stop)
        assert fastadv(*what[:-2]).stderr.splitlines()[-1] == "fastadv: interrupted, nothing is kept (see --output)"
        patch.setattr("fastadv_adapters.cli.app.compare", stop)
        assert fastadv("compare", NET, *ON).stderr.splitlines()[-1] == "fastadv: interrupted"


def test_debug_shows_where_an_error_comes_from(fastadv: Run) -> None:
    result = fastadv("compare", "networks_of_a_user.py:raises", *ON, "--debug")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert "networks_of_a_user.py" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("fastadv: expected networks_of_a_user.py:raises to make a model")


def test_a_module_that_raises_is_told_and_forgotten(fastadv: Run) -> None:
    Path("broken_module.py").write_text("import networks_of_a_user\n1 / 0\n", encoding="utf-8")
    for _ in range(2):
        result = fastadv("compare", "broken_module.py:Net", *ON)
        failed(result, "expected broken_module.py to be importable, got ZeroDivisionError")
    assert "broken_module" not in sys.modules


def test_without_its_libraries_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "pip install 'fastadv_adapters[cli]'" in capsys.readouterr().err


def test_without_autoattack_evaluate_names_attacks_that_need_nothing(
    fastadv: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    result = fastadv("evaluate", "networks_of_a_user.py:Four", "--data", "data.npz")
    failed(result, "got none: pip install 'fastadv_adapters[autoattack]', or --attacks quick\n")
    assert fastadv("evaluate", "networks_of_a_user.py:Four", "--data", "data.npz", "--attacks", "quick").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("compare",), "Missing argument 'MODULE:FACTORY'"),
        (("compare", NET, "--no-such-option"), "No such option: --no-such-option"),
        (("evaluate", NET, "--limit", "0"), "Invalid value for '--limit': "),
        (("evaluate", NET, "--batch-size", "many"), "Invalid value for '--batch-size'"),
        (("no-such-command",), "No such command 'no-such-command'"),
        (("info", "more"), "unexpected extra argument"),
    ],
)
def test_wrong_use_is_one_line(fastadv: Run, arguments: tuple[str, ...], text: str) -> None:
    result = fastadv(*arguments)
    failed(result, text)
    assert result.stderr.endswith(" --help\n")


def test_help_is_no_failure(fastadv: Run) -> None:
    assert fastadv("--help").exit_code == 0
    assert fastadv("compare", "--help").exit_code == 0
    without = fastadv()
    assert without.exit_code == 2
    assert "Commands:" in without.output


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Pass the bounds of your data as bounds=(lower, upper), or clamp x", "as --bounds lower,upper, or clamp x"),
        (
            "folder for resume=False, got a: go on with resume=True",
            "folder for --no-resume, got a: go on with --resume",
        ),
        ("got None: pass output=FOLDER", "got None: pass --output FOLDER"),
        ("pip install 'fastadv_adapters[autoattack]', or attacks=\"quick\"", "[autoattack]', or --attacks quick"),
        ("expected eps to be finite", "expected --eps to be finite"),
        ("expected bounds (lower, upper) with lower < upper", "expected --bounds (lower, upper) with lower < upper"),
        ("expected batch_size to be at least 1", "expected --batch-size to be at least 1"),
        ("expected x within bounds (0, 1), got", "expected x within bounds (0, 1), got"),
        ("expected data as a .npz file", "expected data as a .npz file"),
    ],
)
def test_errors_name_options_and_no_arguments_of_python(text: str, said: str) -> None:
    assert as_options(text).endswith(said)


def test_every_name_that_is_taken_for_an_option_is_one(fastadv: Run) -> None:
    helps = "".join(fastadv(command, "--help").output for command in ("compare", "evaluate"))
    assert [name for name in NAMES if f"--{name.replace('_', '-')} " not in helps.replace(",", " ")] == []


def test_of_several_processes_the_first_one_speaks(fastadv: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr("fastadv_adapters.cli.speaking.time.sleep", waited.append)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(folder / "error.json"))
    monkeypatch.setenv("RANK", "0")
    failed(fastadv("evaluate", NET, "--data", "nothing.npz"), "expected a file of data")
    assert waited == []
    told = json.loads((folder / "error.json").read_text(encoding="utf-8"))["message"]["message"]
    assert told.startswith("fastadv: expected a file of data, got nothing.npz")
    monkeypatch.setenv("RANK", "1")
    result = fastadv("evaluate", NET, "--dat", "nothing.npz")
    assert waited == [LINGER], "torchrun ends it meanwhile if the first one fails, too"
    assert result.exit_code == 2
    assert result.stderr.startswith("fastadv (process 1): No such option: --dat")


def test_of_several_processes_the_first_one_falls_short(fastadv: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fastadv("evaluate", NET, *ON, *FAST, "--output", "run").exit_code == 0
    for rank, status in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        result = fastadv("report", "run", "--require", "robust>1")
        assert result.exit_code == status
        assert bool(result.output) == (rank == "0")


@pytest.mark.long
def test_torchrun_ends_with_the_error(folder: Path) -> None:
    what = ("-m", "fastadv_adapters", "evaluate", NET, "--data", "nothing.npz", "--output", "run")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *what]
    here = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=here)
    assert done.returncode != 0
    line = "fastadv: expected a file of data, got nothing.npz, which is not there: check --data"
    assert done.stderr.splitlines().count(line) == 1
    assert f"traceback : {line}" in done.stderr[done.stderr.index("Root Cause") :]
