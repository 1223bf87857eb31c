"""The benchmark command: a table, JSON, CSV and a picture of the same numbers."""

import csv
import json
import platform
import subprocess
import sys

import numpy as np
import pytest
import torch

from fuxi_torchrec.bench.random_dataset import random_dataset, random_lengths
from fuxi_torchrec.cli.main import main
from fuxi_torchrec.config import ModelConfig
from fuxi_torchrec.profiling.flops import training_flops
from fuxi_torchrec.profiling.memory import PeakMemory
from fuxi_torchrec.profiling.stages import STAGES
from tests.helpers.command_line import ROOT, mistake

pytestmark = pytest.mark.thorough

SMALL = ("--tokens", "200", "--steps", "2", "--model.embedding_dim", "8", "--model.value_dim", "8", "--device", "cpu")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    names = ("--encoders", "fuxi_beta,sasrec", "--lengths", "40,25", "--peak-tflops", "0.5")
    assert main(["bench", *names, *SMALL, "--output", str(folder)]) == 0
    return folder


def test_every_case_has_its_stages_flops_rates_and_memory(results):
    whole = json.load(open(results / "bench.json"))
    rows = whole["rows"]
    assert [(row["length"], row["encoder"]) for row in rows] == [
        (25, "fuxi_beta"), (25, "sasrec"), (40, "fuxi_beta"), (40, "sasrec")
    ]  # fmt: skip
    assert whole["machine"]["peak_tflops"] == 0.5 and whole["machine"]["peak_source"] == "stated"
    for row in rows:
        config = ModelConfig(encoder=row["encoder"], embedding_dim=8, value_dim=8)
        assert row["tokens"] == 200 and row["flops"] == training_flops(config, random_lengths(row["length"], 200, 0), 128)
        assert list(row["stages"]) == list(STAGES) and all(seconds > 0 for seconds in row["stages"].values())
        assert row["tokens_per_second"] == pytest.approx(200 / row["seconds"])
        assert row["mfu"] == pytest.approx(row["flops"] / row["seconds"] / 0.5e12)
        assert row["peak_bytes"] is None or row["peak_bytes"] >= 0


def test_the_files_say_the_same(results):
    rows = json.load(open(results / "bench.json"))["rows"]
    with open(results / "bench.csv", newline="") as file:
        for row, line in zip(rows, csv.DictReader(file), strict=True):
            assert float(line["seconds"]) == row["seconds"] and line["encoder"] == row["encoder"]
            assert float(line["encoder forward seconds"]) == row["stages"]["encoder forward"]
    picture = (results / "bench.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000


@pytest.mark.parametrize(
    "words, said",
    [
        (("--encoders", "lstm"), "--encoders: unknown 'lstm'; there are fuxi_beta"),
        (("--encoders", ","), "--encoders: name at least one of"),
        (("--lengths", "128,long"), "--lengths: '128,long' is no list of whole numbers"),
        (("--lengths", "128,1"), "--lengths: 1 is too short; a sequence has at least 2 events"),
        (("--tokens", "100"), "--tokens: 100 are fewer than the longest of --lengths, 8192"),
        (("--tokens", "1000000000000"), "fuxi_beta with 1,000,000,000,000 tokens needs about"),
        (("--model.embedding_dim", "10000000"), "model.embedding_dim: 10000000 must be at most 65536"),
        (("--steps", "x"), "steps"),
        (("--items", "0"), "--items: 0 must be at least 1"),
        (("--items", "1000000000000"), "GB are free; ask for fewer --tokens or --items"),
        (("--steps", "0"), "--steps: 0 must be at least 1"),
        (("--peak-tflops", "0"), "trainer.peak_tflops: 0.0 must be at least 1e-06"),
        (("--device", "tpu"), "--device: 'tpu' is none of auto, cpu, cuda"),
        (("--device", "cuda"), "cuda"),
        (("--model.dropout", "2"), "model.dropout: 2.0 must be less than 1"),
        (("--encoders", "sasrec", "--model.num_heads", "3"), "model.num_heads: 3 heads do not divide"),
        (("--model.padded_length", "300"), "model.padded_length: 300 is shorter than data.max_sequence_length 8192"),
        (("--output", "/proc/nowhere"), "--output: /proc/nowhere cannot be written"),
    ],
)
def test_mistakes_are_one_line(capsys, tmp_path, words, said):
    if said == "cuda" and torch.cuda.is_available():
        return
    assert said in mistake(capsys, "bench", "--output", tmp_path, *words)


@pytest.mark.parametrize("longest, tokens", [(128, 8192), (8192, 8192), (30, 31), (2, 17)])
def test_random_users_have_the_tokens_asked_for_and_the_longest_length(longest, tokens):
    lengths = random_lengths(longest, tokens, seed=0)
    assert lengths.sum() == tokens and lengths.max() == lengths[0] == longest and lengths.min() >= 1
    dataset = random_dataset(longest, tokens, items=50, seed=0)
    starts, ends = dataset.rows.offsets_U1[:-1], dataset.rows.offsets_U1[1:]
    assert np.array_equal(ends - starts, lengths + 2)
    assert all((np.diff(dataset.rows.timestamps_E[a:b]) >= 0).all() for a, b in zip(starts, ends))


def test_peak_memory_sees_what_came_and_went():
    memory = PeakMemory(torch.device("cpu"))
    memory.restart()
    torch.ones(16 * 2**20).sum()
    peak = memory.peak()
    assert peak is None or 48 * 2**20 < peak < 200 * 2**20
    memory.restart()
    assert memory.peak() is None or memory.peak() < 48 * 2**20


PAGES = """
import resource, sys, torch
from fuxi_torchrec.profiling.memory import keep_freed_memory
keep_freed_memory()
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3): [torch.ones(10**7) for _ in range(4)]
before = faults()
for _ in range(5): [torch.ones(10**7) for _ in range(4)]
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library, which training leaves as it is")
def test_training_takes_the_memory_of_freed_tensors_again_with_few_page_faults():
    """Five rounds of 160 MB would be 195,000 pages of 4 KiB."""
    done = subprocess.run([sys.executable, "-c", PAGES], capture_output=True, text=True, check=True, cwd=ROOT)
    assert int(done.stdout) < 195_000 / 10
