"""A wrong set of torch, torchrec and fbgemm is refused before it is imported, with the command that mends it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fuxi_torchrec import versions
from fuxi_torchrec.errors import UserError

ROOT = Path(__file__).parent.parent
NEEDS = {"tensordict": "0.15.3", "torchmetrics": "1.0.3", "pyre-extensions": "0.0.32", "tqdm": "4.70.1"}
PIP = f"{sys.executable} -m pip"


@pytest.fixture
def machine(monkeypatch):
    """machine(driver=False, **{distribution: version}) makes check_environment see just that."""

    def pretend(packages, driver=False, needs=NEEDS):
        monkeypatch.setattr(versions, "installed_version", {**needs, **packages}.get)
        monkeypatch.setattr(versions, "has_nvidia_driver", lambda: driver)

    return pretend


def refusal(device="auto") -> str:
    with pytest.raises(UserError) as error:
        versions.check_environment(device)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("torch", ["2.13.0", "2.13.0+cpu", "2.13.1+cu130"])
@pytest.mark.parametrize("driver", [False, True])
def test_the_pinned_cpu_set_is_accepted(machine, recwarn, torch, driver):
    machine({"torch": torch, "torchrec": "1.8.0", "fbgemm-gpu-cpu": "1.8.0"}, driver)
    versions.check_environment()
    assert not recwarn.list
    assert not versions.fbgemm_has_cuda()


def test_the_cuda_set_is_accepted_where_there_is_a_driver(machine, recwarn):
    machine({"torch": "2.13.0", "torchrec": "1.8.0", "fbgemm-gpu": "1.8.0"}, driver=True)
    versions.check_environment("cuda")
    assert not recwarn.list
    assert versions.fbgemm_has_cuda()


def test_the_cuda_build_without_a_driver(machine):
    machine({"torch": "2.13.0", "torchrec": "1.8.0", "fbgemm-gpu": "1.8.0"})
    message = refusal()
    assert "fbgemm-gpu 1.8.0 is the CUDA build" in message and "libnvidia-ml.so.1" in message
    assert message.endswith(
        f"{PIP} uninstall -y fbgemm-gpu && {PIP} install --no-deps torchrec==1.8.0 fbgemm-gpu-cpu==1.8.0"
    )


def test_a_newer_fbgemm_than_torch(machine):
    machine({"torch": "2.13.0", "torchrec": "1.8.0", "fbgemm-gpu-cpu": "1.9.0"})
    message = refusal()
    assert "torch 2.13.0, torchrec 1.8.0 and fbgemm-gpu-cpu 1.9.0 do not go together" in message
    assert "torch 2.13 needs torchrec 1.8 and fbgemm 1.8" in message
    assert message.endswith(f"To mend it: {PIP} install --no-deps torchrec==1.8.0 fbgemm-gpu-cpu==1.8.0")


def test_torch_stays_and_the_others_follow_it(machine):
    machine({"torch": "2.14.1", "torchrec": "1.8.0", "fbgemm-gpu": "1.8.0"}, driver=True)
    message = refusal()
    assert "torch 2.14 needs torchrec 1.9 and fbgemm 1.9" in message
    assert message.endswith(f"To mend it: {PIP} install --no-deps torchrec==1.9.2 fbgemm-gpu==1.9.0")


def test_both_builds_of_fbgemm(machine):
    machine({"torch": "2.13.0", "torchrec": "1.8.0", "fbgemm-gpu-cpu": "1.8.0", "fbgemm-gpu": "1.9.0"})
    message = refusal()
    assert "fbgemm-gpu-cpu 1.8.0 and fbgemm-gpu 1.9.0 are both installed" in message
    assert f"{PIP} uninstall -y fbgemm-gpu-cpu fbgemm-gpu && {PIP} install --no-deps" in message


def test_nothing_installed(machine):
    machine({}, needs={})
    message = refusal()
    assert "not installed: torch, torchrec, tensordict, torchmetrics, pyre-extensions, tqdm, fbgemm" in message
    assert f"{PIP} install torch==2.13.0 tensordict torchmetrics==1.0.3 pyre-extensions tqdm &&" in message


def test_torchrec_without_what_it_needs(machine):
    machine({"torch": "2.13.0", "torchrec": "1.8.0", "fbgemm-gpu-cpu": "1.8.0"}, needs={"tqdm": "4.70.1"})
    message = refusal()
    assert "not installed: tensordict, torchmetrics, pyre-extensions." in message
    assert f"{PIP} install tensordict torchmetrics==1.0.3 pyre-extensions &&" in message


def test_an_old_torch(machine):
    machine({"torch": "2.9.1", "torchrec": "1.4.0", "fbgemm-gpu-cpu": "1.4.0"})
    message = refusal()
    assert "torch 2.9.1 is too old" in message and f"{PIP} install torch==2.13.0 &&" in message


def test_the_device_asked_for(machine):
    machine({"torch": "2.13.0", "torchrec": "1.8.0", "fbgemm-gpu-cpu": "1.8.0"})
    assert "no NVIDIA driver" in refusal("cuda")
    machine({"torch": "2.13.0+cpu", "torchrec": "1.8.0", "fbgemm-gpu-cpu": "1.8.0"}, driver=True)
    message = refusal("cuda")
    assert "fbgemm-gpu-cpu 1.8.0 has no CUDA kernels" in message
    assert message.endswith(
        f"{PIP} uninstall -y fbgemm-gpu-cpu torch && {PIP} install torch==2.13.0"
        f" && {PIP} install --no-deps torchrec==1.8.0 fbgemm-gpu==1.8.0"
    )


def test_a_cpu_torch_beside_the_cuda_fbgemm(machine):
    machine({"torch": "2.13.0+cpu", "torchrec": "1.8.0", "fbgemm-gpu": "1.8.0"}, driver=True)
    assert "torch 2.13.0+cpu is a CPU build" in refusal()


@pytest.mark.parametrize(("torch", "others"), [("2.15.0", "1.10.0"), ("2.15.0a0+git1", "1.10.2"), ("3.0.0", "2.0.0")])
def test_a_newer_set_that_goes_together_is_let_through_with_a_warning(machine, torch, others):
    machine({"torch": torch, "torchrec": others, "fbgemm-gpu-cpu": others})
    with pytest.warns(UserWarning, match=f"torch {re.escape(torch)}, torchrec {others}.*newer"):
        versions.check_environment()


def test_a_newer_set_that_does_not_go_together_is_refused(machine):
    machine({"torch": "2.15.0", "torchrec": "1.9.2", "fbgemm-gpu-cpu": "1.9.0"})
    message = refusal()
    assert "torch 2.15 needs torchrec 1.10 and fbgemm 1.10" in message
    assert f"{PIP} install torch==2.13.0 && {PIP} install --no-deps torchrec==1.8.0 fbgemm-gpu-cpu==1.8.0" in message


def test_nightlies_are_not_judged(machine):
    machine({"torch": "2.15.0.dev20261101", "torchrec-nightly": "2026.11.1"})
    with pytest.warns(UserWarning, match="torchrec-nightly 2026.11.1"):
        versions.check_environment()


def test_this_environment_passes_without_importing_torch():
    code = (
        "import sys, fuxi_torchrec.versions as v; v.check_environment(); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'torchrec', 'fbgemm_gpu')))"
    )
    assert subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT).returncode == 0


def test_every_place_that_pins_the_set_pins_the_same_one():
    pinned = versions.PINNED
    base, cpu, cuda = ((ROOT / "requirements" / f"{name}.txt").read_text() for name in ("base", "cpu", "cuda"))
    assert f"\ntorch=={pinned['torch']}\n" in base
    assert f"\ntorchmetrics=={NEEDS['torchmetrics']}\n" in base
    for text, build in ((cpu, versions.CPU), (cuda, versions.CUDA)):
        assert f"\ntorchrec=={pinned['torchrec']}\n{build}=={pinned['fbgemm']}\n" in text
    extra = f'["torch=={pinned["torch"]}", "torchrec=={pinned["torchrec"]}", "fbgemm-gpu=={pinned["fbgemm"]}"]'
    assert extra in (ROOT / "setup.py").read_text()
