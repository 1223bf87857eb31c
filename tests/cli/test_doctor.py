"""`fuxi-torchrec doctor` tells what would stop training, and works where something is broken."""

import json
import logging
import subprocess
import sys

import pytest

from fuxi_torchrec import versions
from fuxi_torchrec.cli import doctor as command
from fuxi_torchrec.cli import probes, probes_inside
from fuxi_torchrec.cli.main import main
from fuxi_torchrec.ops.native import library
from tests.helpers.absent import environment_without
from tests.helpers.command_line import ROOT, mistake

TORCH = {"torch": "2.13.0", "cpu_capability": "AVX2", "threads": 2, "cuda": None, "cudnn": None, "nccl": None, "gpus": []}
KERNELS = {"loaded": True, "switched_off": False, "compiler": None, "flags": [], "folder": "/kept", "kept": 2, "said": ""}
KERNELS |= {"fixed_by": None, "measured": []}
GOOD = {"torch_inside": TORCH, "torchrec_inside": {"torchrec": "1.8.0"}, "kernels_inside": KERNELS}
SET = {"torch": "2.13.0", "torchrec": "1.8.0", "fbgemm-gpu-cpu": "1.8.0"}


@pytest.fixture
def machine(monkeypatch):
    """machine(packages, driver, **answers of children): what the probes see."""

    def pretend(packages=SET, driver=False, **answers):
        installed = dict.fromkeys(versions.TORCHREC_NEEDS, "1") | dict.fromkeys(
            (one for some, _ in probes.PACKAGES.values() for one in some[:1]), "1"
        )
        for name in ("torch", "torchrec", "fbgemm-gpu-cpu"):
            installed.pop(name, None)
        monkeypatch.setattr(versions, "installed_version", {**installed, **packages}.get)
        monkeypatch.setattr(versions, "has_nvidia_driver", lambda: driver)
        known = {name: (answer, "") for name, answer in GOOD.items()} | answers
        monkeypatch.setattr(probes, "inside", known.__getitem__)

    return pretend


def asked(capsys):
    """(exit code, {probe: what it found})"""
    code = main(["doctor", "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert answer["fine"] == (code == 0)
    return code, {probe.pop("name"): probe for probe in answer["probes"]}


def test_where_all_is_fine_the_code_is_0_and_every_line_has_a_value(machine, capsys):
    machine()
    code, found = asked(capsys)
    assert code == 0 and list(found) == [name for name, _ in probes.PROBES]
    assert all(probe["value"] and not probe["stops"] for probe in found.values())
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.endswith("nothing here would stop training\n")


def test_a_wrong_pair_of_versions_stops_training_and_the_command_that_mends_it_is_shown(machine, capsys):
    machine({**SET, "fbgemm-gpu-cpu": "1.9.0"})
    code, found = asked(capsys)
    assert code == 1
    together = found["versions together"]
    assert together["stops"] and "do not go together" in together["problem"]
    assert together["mend"].endswith("pip install --no-deps torchrec==1.8.0 fbgemm-gpu-cpu==1.8.0")
    assert main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "stops training: versions together: torch 2.13.0" in shown and f"to mend it: {together['mend']}" in shown
    assert shown.endswith("training would stop here\n")


def test_a_library_that_cannot_be_imported_stops_training(machine, capsys):
    machine(torchrec_inside=(None, "OSError: libtorch.so: undefined symbol"))
    code, found = asked(capsys)
    assert code == 1 and found["torchrec imports"]["stops"]
    assert "undefined symbol" in found["torchrec imports"]["problem"]
    assert "--force-reinstall --no-deps torchrec==1.8.0 fbgemm-gpu-cpu==1.8.0" in found["torchrec imports"]["mend"]


def test_a_package_that_prepare_alone_needs_is_a_remark(machine, capsys):
    machine({**SET, "duckdb": None})
    code, found = asked(capsys)
    assert code == 0 and found["duckdb"]["problem"] == "prepare needs it"
    machine({**SET, "pyarrow": None})
    code, found = asked(capsys)
    assert code == 1 and found["pyarrow"]["mend"].endswith("pip install pyarrow")


def test_without_a_compiler_or_a_folder_training_is_slower_and_goes_on(machine, capsys):
    said = "no C compiler (cc, gcc, clang or $CC)"
    machine(kernels_inside=({**KERNELS, "loaded": False, "folder": None, "said": said}, ""))
    code, found = asked(capsys)
    assert code == 0
    assert found["CPU kernels"]["problem"] == said and "apt install gcc" in found["C compiler"]["mend"]
    assert "XDG_CACHE_HOME" in found["kernels' folder"]["mend"]


def test_a_driver_that_the_installed_set_cannot_use_is_told(machine, capsys):
    machine(driver=True)
    code, found = asked(capsys)
    driver = found["NVIDIA driver"]
    assert code == 0 and "fbgemm-gpu-cpu 1.8.0 has no CUDA kernels" in driver["problem"]
    assert "fbgemm-gpu==1.8.0" in driver["mend"]
    machine(driver=True, torch_inside=({**TORCH, "cuda": "13.0", "cudnn": 9}, ""))
    assert "torch sees no GPU" in asked(capsys)[1]["GPUs"]["problem"]


def test_a_probe_that_fails_costs_its_own_line_only():
    def fails():
        raise KeyError("flags")

    answers = command.ask([("first", fails), ("second", lambda: probes.Finding("seen"))])
    assert [finding.value for _, finding in answers] == ["unknown", "seen"]
    assert "KeyError: 'flags'" in answers[0][1].problem and not answers[0][1].stops


def test_the_kernels_target_follows_from_the_flags(machine, monkeypatch):
    compiler = library.find_compiler()
    if compiler is None:
        pytest.skip("there is no C compiler here")
    answer = {**KERNELS, "compiler": compiler, "flags": ["-O3", "-DQUITE=1", "-D__ARM_NEON=1"]}
    monkeypatch.setattr(probes, "inside", lambda name: (answer, ""))
    assert probes.kernels_target().value == "NEON: -O3 -DQUITE=1 -D__ARM_NEON=1"


def test_what_runs_have_measured_of_kernels_and_pytorch_is_told(machine):
    machine()
    assert "none has here yet" in probes.kernels_choice().value
    measured = [[{"row_wise": 2.0, "token_mixing": 0.8}, ["token_mixing"]], [{"row_wise": 3.0}, []]]
    machine(kernels_inside=({**KERNELS, "measured": measured}, ""))
    told = probes.kernels_choice().value
    assert "at 2 size(s)" in told and "row_wise 2.0 to 3.0" in told and told.endswith("left to PyTorch at some: token_mixing")
    machine(kernels_inside=({**KERNELS, "measured": measured, "fixed_by": "1"}, ""))
    assert probes.kernels_choice().value == "kernels, fixed by FUXI_TORCHREC_NATIVE=1"
    machine(kernels_inside=({**KERNELS, "loaded": False}, ""))
    assert probes.kernels_choice().value == "nothing to choose from"


def test_what_the_loading_of_the_kernels_says_is_kept(monkeypatch):
    def says():
        logging.getLogger("fuxi_torchrec.ops.native.library").warning("could not be compiled")

    monkeypatch.setattr(library, "library", says)
    answer = probes_inside.kernels_inside()
    assert answer["loaded"] is False and answer["said"] == "could not be compiled"


def test_a_wrong_option_is_one_line(capsys):
    assert "unrecognized arguments: --jason" in mistake(capsys, "doctor", "--jason")


@pytest.mark.thorough
def test_where_hardly_anything_is_installed_every_line_is_shown_all_the_same(tmp_path):
    absent = ("torch", "torchrec", "fbgemm_gpu", "numpy", "pyarrow", "jsonargparse", "yaml", "rich")
    environment = environment_without(tmp_path, absent, ROOT) | {"LC_ALL": "C", "PYTHONUTF8": "0"}
    environment |= {"HOME": str(tmp_path / "absent")}
    command = [sys.executable, "-m", "fuxi_torchrec", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, cwd=ROOT)
    assert done.returncode == 1, done.stderr
    found = {probe["name"]: probe for probe in json.loads(done.stdout)["probes"]}
    assert list(found) == [name for name, _ in probes.PROBES]
    assert found["torch imports"]["problem"] == "ModuleNotFoundError: No module named 'torch'"
    assert found["torch imports"]["stops"] and found["home"]["problem"]
    assert "No module named 'torch'" in found["GPUs"]["problem"] and not found["GPUs"]["stops"]


@pytest.mark.thorough
def test_this_machine_is_looked_at(tmp_path):
    command = [sys.executable, "-m", "fuxi_torchrec", "doctor", "--json"]
    environment = environment_without(tmp_path, ("nothing",), ROOT)
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {probe["name"]: probe["value"] for probe in json.loads(done.stdout)["probes"]}
    assert found["torch imports"].startswith("yes: ") and found["torchrec imports"].startswith("yes: ")
    assert found["threads"] == "1 (OMP_NUM_THREADS = 1)"
