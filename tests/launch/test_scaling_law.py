"""The scaling law: known parameters are recovered, intervals cover them, and a sweep's table becomes a report."""

import json
import os

import numpy as np
import pytest

from fuxi_torchrec import cli
from launch.scaling_law import __main__ as scaling_law
from launch.scaling_law.fit import Cost, Law, fit, frontier
from launch.sweep import __main__ as sweep
from launch.sweep.plan import read_plan
from launch.sweep.table import write_results
from tests.helpers.sweeps import write_sweep

TRUE = Law(E=5.0, A=8.0, alpha=0.4, B=300.0, beta=0.5)
NOISE = 0.001  # of log L: 0.005 nats


def points(random, law=TRUE, noise=NOISE):
    N, D = (grid.ravel() for grid in np.meshgrid(np.geomspace(2e3, 2e5, 4), np.geomspace(1e5, 1.6e6, 4)))
    return N, D, law.loss(N, D) * np.exp(random.normal(0, noise, len(N)))


def rows(N, D, L, items=2000):
    return [
        {
            "run": f"run-{i}",
            "status": "finished",
            "items": items,
            "width": 16,
            "non_embedding_parameters": int(n),
            "tokens": int(d),
            "flops": int(6 * n * d),
            "test/cross_entropy": float(loss),
            "test/ndcg@10": float(1 / loss),
        }
        for i, (n, d, loss) in enumerate(zip(N, D, L))
    ]


def test_exact_points_give_the_exact_law():
    found = fit(*points(np.random.default_rng(0), noise=0.0), resamples=1).law
    for name in ("E", "A", "alpha", "B", "beta"):
        assert getattr(found, name) == pytest.approx(getattr(TRUE, name), rel=1e-3)


@pytest.mark.parametrize("law", [TRUE, Law(8.0, 20.0, 0.25, 2000.0, 0.6)], ids=["one", "another"])
def test_noisy_points_give_nearly_the_law(law):
    found = fit(*points(np.random.default_rng(1), law), resamples=1).law
    assert found.E == pytest.approx(law.E, abs=0.15)
    assert found.alpha == pytest.approx(law.alpha, abs=0.08)
    assert found.beta == pytest.approx(law.beta, abs=0.08)


def test_a_few_outliers_hardly_move_the_law():
    """Two of 16 points 5 % too high: least squares of the same points would be far off."""
    N, D, L = points(np.random.default_rng(2))
    L[[3, 9]] *= 1.05
    assert fit(N, D, L, resamples=1).law.E == pytest.approx(TRUE.E, abs=0.15)


@pytest.mark.thorough
def test_intervals_cover_the_truth_about_as_often_as_they_say():
    """90 % intervals over 24 tables: from 16 up is what chance leaves of 24 at 90 % minus some for resampling so few."""
    covered = dict.fromkeys(("E", "alpha", "beta"), 0)
    for seed in range(24):
        found = fit(*points(np.random.default_rng(100 + seed)), resamples=40, seed=seed)
        for name in covered:
            low, high = found.parameter_interval(name)
            covered[name] += low <= getattr(TRUE, name) <= high
    assert all(16 <= count for count in covered.values()), covered


def test_the_frontier_is_where_no_other_size_is_better():
    cost = Cost.of(np.array([1e3, 1e4, 1e5]), np.ones(3), 6 * np.array([1e3, 1e4, 1e5]))
    flops = np.array([1e10, 1e12, 1e14])
    N, D, L = frontier(TRUE, cost, flops, (1e2, 1e9))
    assert 6 * N * D == pytest.approx(flops, rel=1e-6)
    for factor in (0.5, 2.0):
        assert (TRUE.loss(N * factor, D / factor) > L).all()
    growth = np.diff(np.log(N)) / np.diff(np.log(flops))
    assert growth == pytest.approx(TRUE.beta / (TRUE.alpha + TRUE.beta), rel=0.02)


@pytest.mark.thorough
def test_a_table_becomes_a_report_with_plots(tmp_path, capsys):
    """Two catalogues, two laws; the CSV of the same table gives the same."""
    random = np.random.default_rng(3)
    table = rows(*points(random)) + rows(*points(random, Law(7.0, 8.0, 0.4, 300.0, 0.5)), items=10_000)
    write_results(str(tmp_path), [*table, {"run": "lost", "status": "failed", "reason": "killed"}])
    assert scaling_law.main([str(tmp_path), "--resamples", "20"]) == 0
    out = tmp_path / "scaling-law"
    fits = json.loads((out / "fits.json").read_text())
    assert fits["2,000 items"]["E"] == pytest.approx(5.0, abs=0.15)
    assert fits["10,000 items"]["E"] == pytest.approx(7.0, abs=0.15)
    text = (out / "report.md").read_text()
    for name in ("loss-2-000-items.png", "loss-10-000-items.png", "compute.png", "ndcg.png"):
        assert f"({name})" in text and (out / name).stat().st_size > 10_000
    assert len((out / "points.csv").read_text().splitlines()) == 33
    assert any(name.startswith("events") for name in os.listdir(out / "tensorboard"))
    assert scaling_law.main([str(tmp_path / "results.csv"), "--resamples", "20", "--output", str(tmp_path / "again")]) == 0
    assert json.loads((tmp_path / "again" / "fits.json").read_text()) == fits


@pytest.mark.thorough
def test_encoders_are_compared_at_equal_flops(tmp_path):
    """At each budget the best run within it, of each encoder, wherever both have one."""
    table = []
    for encoder, law, dearer in (("good", TRUE, 1.0), ("poor", Law(TRUE.E + 0.5, TRUE.A, TRUE.alpha, TRUE.B, TRUE.beta), 3.0)):
        for row in rows(*points(np.random.default_rng(5), law, 0.0)):
            table.append({**row, "model.encoder": encoder, "flops": int(row["flops"] * dearer)})
    write_results(str(tmp_path), table)
    assert scaling_law.main([str(tmp_path), "--resamples", "3"]) == 0
    text = (tmp_path / "scaling-law" / "report.md").read_text()
    section = text.split("## Encoders at equal FLOPs, 2,000 items")[1].split("##")[0]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("| ")]
    assert lines[0] == ["FLOPs", "good", "poor"] and len(lines) == 6
    for budget, *cells in lines[1:]:
        for encoder, cell in zip(("good", "poor"), cells):
            within = [r for r in table if r["model.encoder"] == encoder and r["flops"] <= float(budget) * 1.01]
            assert cell.startswith(f"{min(r['test/cross_entropy'] for r in within):.4f}")
    assert float(lines[1][0]) == pytest.approx(min(r["flops"] for r in table if r["model.encoder"] == "poor"), rel=0.01)


@pytest.mark.thorough
def test_a_tiny_sweep_end_to_end(tmp_path):
    """Three sizes, three lengths of training; the runs are trained here, and the sweep takes them as finished."""
    data = str(tmp_path / "data")
    synthetic = "prepare synthetic --users 60 --items 40 --events-per-user 12 --clusters 4 --output"
    assert cli.main([*synthetic.split(), data]) == 0
    settings = {"data.path": data, "data.max_sequence_length": 12, "data.batch_size": 8, "evaluation.every_epochs": None}
    settings.update({"trainer.device": "cpu", "loss.num_negatives": 8})
    grid = {"dial": [1, 2, 3], "trainer.max_steps": [2, 4, 7]}
    path = write_sweep(tmp_path, set=settings, width_per_block=4, grid=grid)
    plan = read_plan(path)
    for run in plan.runs:
        output = str(tmp_path / "out" / "runs" / run.name)
        assert cli.main(["train", run.config, "--output", output, *run.overrides]) == 0
    assert sweep.main([path, "--output", str(tmp_path / "out")]) == 0
    assert scaling_law.main([str(tmp_path / "out"), "--resamples", "5"]) == 0
    found = json.loads((tmp_path / "out" / "scaling-law" / "fits.json").read_text())["40 items"]
    assert found["runs"] == 9 and found["floor"] > 0
    assert "The data's own floor" in (tmp_path / "out" / "scaling-law" / "report.md").read_text()


def complain(arguments, capsys):
    assert scaling_law.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("error: ")
    return said


def test_tables_that_no_law_fits_are_one_line(tmp_path, capsys):
    assert "no results table" in complain([str(tmp_path)], capsys)
    (tmp_path / "empty.csv").write_text("run,status\n")
    assert "the table is empty" in complain([str(tmp_path / "empty.csv")], capsys)
    (tmp_path / "other.parquet").write_text("no such thing")
    assert "not a table" in complain([str(tmp_path / "other.parquet")], capsys)
    good = rows(*points(np.random.default_rng(4)))
    write_results(str(tmp_path), good[:4])
    assert "4 finished runs are fewer than the law's 5 parameters" in complain([str(tmp_path)], capsys)
    write_results(str(tmp_path), good[:8])
    assert "2 different values of tokens" in complain([str(tmp_path)], capsys)
    write_results(str(tmp_path), [{**row, "status": "failed"} for row in good])
    assert "none of its 16 runs has finished" in complain([str(tmp_path)], capsys)
    write_results(str(tmp_path), [{**good[0], "flops": None}, *good[1:]])
    assert "run-0: flops is None" in complain([str(tmp_path)], capsys)
