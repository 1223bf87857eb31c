"""The command for a machine with a GPU, on a CPU: that it finds what is wrong, survives it, and says what it measured on."""

import json
import re
import subprocess
import sys

import pytest
import torch

from benchmarks.gpu import agreement, least, references, run, steps, tables, towers
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.cases import Place
from benchmarks.gpu.page import page
from benchmarks.gpu.run import Part
from benchmarks.gpu.sizes import FULL, QUICK
from fuxi_torchrec.encoders import ENCODERS
from fuxi_torchrec.ops.jagged import JaggedLayout
from fuxi_torchrec.ops.sampled_softmax.dispatch import per_token_sampled_softmax, shared_sampled_softmax
from fuxi_torchrec.ops.token_mixing.dispatch import mix_tokens
from fuxi_torchrec.profiling.flops import BLOCK_COSTS
from tests.helpers.absent import environment_without
from tests.helpers.command_line import ROOT

PLACE = Place(torch.device("cpu"), QUICK)
ABSENT = ("torchrec", "fbgemm_gpu", "pyarrow", "tensordict", "torchmetrics", "yaml", "jsonargparse", "rich", "duckdb", "iopath")


def blocked(fault=lambda out: out):
    """Token mixing in the place of the kernels, without the interpreter."""

    def mix(values, layout, channels, gaps, implementation):
        out = mix_tokens(values, layout, channels, gaps, "blocked" if implementation == "triton" else implementation)
        return fault(out) if implementation == "triton" else out

    return mix


def one_row_off(out):
    return torch.cat([out[:1] * (1 + 1e-3), out[1:]])


@pytest.mark.parametrize("form", ["pow", "bucketed", "mixed"])
def test_mixing_agrees_with_its_reference_and_a_row_off_by_a_thousandth_does_not(monkeypatch, form):
    monkeypatch.setattr(agreement, "mix_tokens", blocked())
    assert agreement.mixing(PLACE, form, 20, "fp32")["agrees"] == "yes"
    monkeypatch.setattr(agreement, "mix_tokens", blocked(one_row_off))
    row = agreement.mixing(PLACE, form, 20, "fp32")
    assert row["is_wrong"] and row["agrees"] == "NO"


@pytest.mark.parametrize("kind", ["shared", "per_token"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_losses_agree_with_their_reference_and_a_temperature_off_by_a_hundredth_does_not(monkeypatch, kind, precision):
    function = {"shared": shared_sampled_softmax, "per_token": per_token_sampled_softmax}[kind]

    def use(temperature):
        def chunked(*args, implementation):
            return function(*args[:-1], temperature, implementation="chunked")

        monkeypatch.setattr(agreement, f"{kind}_sampled_softmax", chunked)
        return agreement.loss(PLACE, kind, precision)

    assert use(agreement.TAU)["agrees"] == "yes"
    assert use(1.01 * agreement.TAU)["is_wrong"]


def test_results_that_do_not_repeat_are_wrong(monkeypatch):
    calls = []

    def moved(out):
        calls.append(1)
        return out * (1 + 1e-7 * len(calls))

    monkeypatch.setattr(agreement, "mix_tokens", blocked(moved))
    row = agreement.mixing(PLACE, "pow", 20, "fp32")
    assert row["agrees"] == "yes" and row["repeats"] == "NO" and row["is_wrong"]


def test_the_spaced_times_put_no_gap_near_a_buckets_boundary():
    times = agreement.spaced_times(2000)
    gaps = (times[1:, None] - times[None, :-1]).tril()[::7].unique()
    buckets = gaps[gaps > 0].double().log() / 0.301
    assert ((buckets - buckets.round()).abs() > agreement.NEAR).all() and (times.diff() == 0).any()


@pytest.mark.slow
def test_a_part_survives_what_its_cases_do(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", ROOT)
    part, machine = run.run_part("towers", "tests.helpers.gpu_part", "cpu", True, 600.0, "")
    assert [row["case"] for row in part.rows] == ["works", "works after that"]
    failed = {one["case"]: one for one in part.failed}
    assert set(failed) == {"raises", "dies"}
    assert "RuntimeError" in failed["raises"]["error"] and "Traceback" in failed["raises"]["traceback"]
    assert failed["dies"]["error"] == "its process ended with code 9"
    assert not part.not_run
    assert machine["device"] == "cpu" and not tables.is_well([part])


@pytest.mark.slow
def test_a_case_that_hangs_is_stopped_when_the_time_runs_out_and_is_no_failure(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", ROOT)
    for seconds in (20.0, 60.0, 300.0):  # enough to begin it
        part, _ = run.run_part("towers", "tests.helpers.gpu_part", "cpu", True, seconds, "hangs")
        if not part.reason:
            break
    assert part.not_run == ["hangs (stopped)", "comes too late"] and tables.is_well([part])


@pytest.mark.thorough
def test_a_part_that_cannot_begin_says_why(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", ROOT)
    part, _ = run.run_part("towers", "tests.helpers.absent_module", "cpu", True, 600.0, "")
    assert part.reason.startswith("failed at its start: ModuleNotFoundError") and "Traceback" in part.failed[0]["traceback"]


@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_products_whose_bytes_are_counted_are_those_whose_flops_are(encoder):
    model = FULL.model(encoder)
    products, _ = least.BLOCKS[encoder](model)
    assert sum(2 * a * b for a, b in products) == BLOCK_COSTS[encoder](model).per_token


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_reference_tower_computes_what_the_tower_does(encoder, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)
    own, plain = towers.build(PLACE, encoder, 20), references.reference_tower(PLACE, encoder, 20)
    plain.load_state_dict(own.state_dict())
    lengths, times = [20, 1, 7], towers.times_of(28, PLACE.device)
    x_TD = torch.randn(28, QUICK.width)
    arguments = x_TD, times[:-1], times[1:], JaggedLayout.from_lengths(lengths)
    expected = own(*arguments)
    with references.plain_attention():
        torch.testing.assert_close(plain(*arguments), expected, rtol=1e-5, atol=1e-5)


def test_both_losses_have_the_reference_that_they_are_timed_against():
    generator = torch.Generator().manual_seed(0)
    outputs, positives, rows = (torch.randn(n, 8, generator=generator) for n in (9, 9, 6))
    own, index = torch.randint(-1, 6, (9,)), torch.randint(0, 6, (9, 4), dtype=torch.int32)
    pairs = [
        (shared_sampled_softmax, references.shared_reference, torch.arange(6)),
        (per_token_sampled_softmax, references.per_token_reference, index),
    ]
    for function, plain, drawn in pairs:
        arguments = outputs, positives, rows, drawn, own, 0.5
        torch.testing.assert_close(plain(*arguments), function(*arguments))


def kernel(stream, begin, duration, name="k"):
    return {"cat": "kernel", "name": name, "ts": begin, "dur": duration, "args": {"stream": stream}}


def test_the_overlap_is_what_other_streams_do_while_the_busiest_one_works():
    events = [kernel(7, 0, 10), kernel(7, 20, 10), kernel(9, 5, 10, "ncclKernel"), kernel(9, 22, 2), {"cat": "cpu_op"}]
    events.append({"cat": "cuda_runtime", "name": "cudaStreamSynchronize"})
    found = steps.exchange_of(steps.streams_of(events))
    assert found["overlap_of"] == pytest.approx(7 / 12) and found["exchange"]["work"] == {"ncclKernel": 1, "k": 1}
    assert steps.waits_of(events, 2) == {"cudaStreamSynchronize": 0.5}
    assert steps.exchange_of({}) == {"exchange": None}


def parts():
    sheet = {"case": "product bf16", "flops_per_second": 5e14, "sheet_flops_per_second": 1e15, "rate": "500 TFLOP/s"}
    copy = {"case": "copy", "bytes_per_second": 1e12, "rate": "1,000 GB/s"}
    tower = {"case": "fuxi_beta", "encoder": "fuxi_beta", "length": 512, "precision": "bf16", "seconds": 0.001}
    tower |= {"tokens": 1000, "flops": 1e11, "least_bytes": 1e8, "peak_bytes": 2**30}
    wrong = {"case": "mixing <pow>", "is_wrong": True, "agrees": "NO"}
    failure = {"case": "hstu", "error": "OutOfMemoryError: <all>", "traceback": "Traceback <1>"}
    made = [Part("ceilings", rows=[sheet, copy]), Part("agreement", rows=[wrong])]
    made += [Part("towers", rows=[tower], failed=[failure], not_run=["flash"]), Part("steps", reason="not run: no torchrec")]
    tables.complete(made)
    return made


def test_rates_and_shares_follow_from_what_was_measured():
    row = parts()[2].rows[0]
    shown = {name: row[name] for name in ("milliseconds", "tokens_per_second", "mfu", "of_product", "of_copy", "peak")}
    assert list(shown.values()) == ["1.000", "1,000,000", "10.0 %", "20.0 %", "10.0 %", "1,024 MiB"]


def test_the_table_says_what_is_wrong_and_what_was_not_run():
    lines = tables.verdicts(parts())
    assert lines == [
        "agreement: mixing <pow>: disagrees",
        "towers: hstu: failed: OutOfMemoryError: <all>",
        "towers: not run, there was no time left: flash",
        "steps: not run: no torchrec",
    ]
    assert not tables.is_well(parts())


def test_the_page_asks_nothing_of_another_place_and_escapes_what_it_shows():
    gpu = {"device": "cuda", "name": "A <GPU>", "memory_bytes": 2**30, "capability": "9.0", "torch": "2", "cuda": "13"}
    made = page(parts(), gpu, False, "python -m benchmarks.gpu")
    assert not re.search(r"https?:|src=|href=|@import|url\(", made)
    assert "A &lt;GPU&gt;" in made and "mixing &lt;pow&gt;" in made and "Traceback &lt;1&gt;" in made and "<svg" in made
    assert "<title>fuxi_torchrec on a GPU" in made


def test_a_cpus_numbers_are_called_a_cpus():
    cpu = {"device": "cpu", "name": "CPU, x86_64", "torch": "2"}
    assert "a CPU's numbers" in tables.text(parts(), cpu, True) and "nothing about a GPU" in tables.heading(cpu, True)
    made = page(parts(), cpu, True, "")
    assert "<title>fuxi_torchrec on a CPU" in made and "They say nothing about a GPU" in made


WRONG = [(["--device", "cuda"], "sees no GPU"), (["--device", "cpu", "--minutes", "0.1"], "too short")]


@pytest.mark.parametrize("words, said", WRONG, ids=["no GPU", "no time"])
def test_a_mistake_is_one_line(monkeypatch, capsys, tmp_path, words, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu", "--output", str(tmp_path / "out"), *words])
    assert main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line


def command(folder, environment, *parts_):
    words = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--minutes", "100", "--output", str(folder / "out")]
    words += ["--parts", *parts_] if parts_ else []
    done = subprocess.run(words, capture_output=True, text=True, timeout=6000, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((folder / "out" / "results.json").read_text())
    assert results["quick"] and results["machine"]["device"] == "cpu" and results["machine"]["interpreted"]
    assert "They say nothing about a GPU" in (folder / "out" / "index.html").read_text()
    return done, {part["name"]: part for part in results["parts"]}


@pytest.mark.slow
def test_every_part_runs_to_its_end(tmp_path):
    _, found = command(tmp_path, environment_without(tmp_path, (), ROOT))
    assert list(found) == list(run.PARTS)
    for part in found.values():
        assert part["rows"] and not part["failed"] and not part["not_run"] and not part["reason"]
    assert {row["encoder"] for row in found["towers"]["rows"] if "encoder" in row} == set(ENCODERS)
    assert {row["encoder"] for row in found["references"]["rows"] if "encoder" in row} == set(ENCODERS)


@pytest.mark.thorough
def test_torch_and_numpy_are_enough(tmp_path):
    environment = environment_without(tmp_path, ABSENT, ROOT)
    done, found = command(tmp_path, environment, "ceilings", "towers", "steps")
    assert found["steps"]["reason"] == "not run: torchrec, fbgemm_gpu, pyarrow is not installed here"
    assert "steps: not run: torchrec" in done.stdout
    for name in ("ceilings", "towers"):
        assert found[name]["rows"] and not found[name]["failed"] and not found[name]["not_run"]


@pytest.mark.slow
def test_the_kernels_agree_in_the_interpreter_without_torchrec(tmp_path):
    _, found = command(tmp_path, environment_without(tmp_path, ABSENT, ROOT), "agreement")
    rows = found["agreement"]["rows"]
    assert len(rows) > 15 and all(row["agrees"] == row["repeats"] == "yes" for row in rows)
