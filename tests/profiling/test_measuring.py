"""Training tells how fast it is, and measuring does not make it wait: tokens/s, MFU, traces, losses left on the device."""

import inspect
import json
import os
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fuxi_torchrec.config.rules import check
from fuxi_torchrec.data.dataset import SequenceDataset
from fuxi_torchrec.distributed.world import start_world
from fuxi_torchrec.errors import UserError
from fuxi_torchrec.ops.native import library as native
from fuxi_torchrec.profiling.flops import training_flops
from fuxi_torchrec.profiling.peak_flops import known_peak
from fuxi_torchrec.profiling.stages import STAGES, StageClock, clocked, stage
from fuxi_torchrec.profiling.trace import RECORDED_STEPS, SKIPPED_STEPS, TRACE_FILE
from fuxi_torchrec.run.folder import RunFolder
from fuxi_torchrec.training.build import build_trainer
from tests.helpers.training_runs import losses, tiny, train

pytestmark = pytest.mark.thorough


def lines(output):
    return [line for line in RunFolder(str(output)).metrics() if "loss" in line]


def run_trainer(config, output, profile=False, before=lambda trainer: None):
    dataset = SequenceDataset(config.data.path)
    with start_world("cpu") as world:
        run = RunFolder.create(str(output), config, dataset.identity, False)
        trainer = build_trainer(config, dataset, run, world, profile=profile)
        before(trainer)
        trainer.fit()
        return trainer


def test_every_log_line_has_tokens_a_second_and_mfu_against_the_stated_peak(small_dataset, tmp_path, capsys):
    config = tiny(small_dataset, max_epochs=1, peak_tflops=1e-3)
    run_trainer(config, tmp_path / "run")
    batches = lengths_of_batches(config)
    terminal = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step")]
    assert len(lines(tmp_path / "run")) == len(batches) == len(terminal)
    for line, lengths, text in zip(lines(tmp_path / "run"), batches, terminal):
        seconds = sum(lengths) / line["tokens_per_second"]
        flops = training_flops(config.model, lengths, config.loss.num_negatives)
        assert line["mfu"] == pytest.approx(flops / seconds / 1e9)
        assert "tokens/s" in text and "MFU" in text
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert {"train/mfu", "train/tokens_per_second"} <= set(events.Tags()["scalars"])


def lengths_of_batches(config):
    """The lengths of every batch of the first epoch."""
    from fuxi_torchrec.data.loader import StreamCursor, TrainingStream
    from fuxi_torchrec.data.negative_sampler import NegativeSampler

    dataset = SequenceDataset(config.data.path)
    sampler = NegativeSampler(config.loss, dataset.identity.num_items, config.trainer.seed)
    stream = TrainingStream(dataset, config.data, sampler, config.trainer.seed)
    return [batch.host_lengths for batch in stream.epoch(StreamCursor())]


def test_without_a_known_peak_there_is_no_mfu(small_dataset, tmp_path):
    train(tiny(small_dataset, max_epochs=1), tmp_path / "run")
    assert not any("mfu" in line for line in lines(tmp_path / "run"))
    with pytest.raises(UserError, match="trainer.peak_tflops: 0 must be at least 1e-06"):
        check(tiny(small_dataset, peak_tflops=0))


@pytest.mark.parametrize(
    "name, fp32, bf16",
    [
        ("NVIDIA A100-SXM4-80GB", 19.5, 312.0),
        ("NVIDIA H100 80GB HBM3", 66.9, 989.4),
        ("NVIDIA H100 PCIe", 51.2, 756.0),
        ("Tesla T4", 8.1, None),
        ("NVIDIA A10G", None, None),
    ],
)
def test_a_gpu_is_known_by_the_words_of_its_name(name, fp32, bf16):
    assert (known_peak(name, "fp32"), known_peak(name, "bf16")) == (fp32, bf16)


def test_a_profile_is_a_trace_of_some_steps_with_every_stage(small_dataset, tmp_path):
    config = tiny(small_dataset, max_epochs=1)
    config.data.batch_size = 8  # no evaluation among the recorded steps
    run_trainer(config, tmp_path / "run", profile=True)
    trace = json.load(open(tmp_path / "run" / "profile" / TRACE_FILE))
    ranges = Counter(event["name"] for event in trace["traceEvents"] if event.get("cat") == "user_annotation")
    pieces = {name: 2 if name == "lookup and exchange" else 1 for name in STAGES}  # asked for, and waited for
    assert {name: ranges[name] for name in STAGES} == {name: RECORDED_STEPS * count for name, count in pieces.items()}
    assert all(event["dur"] >= 0 for event in trace["traceEvents"] if event.get("ph") == "X")


def test_a_run_too_short_for_a_profile_says_so(small_dataset, tmp_path, capsys):
    run_trainer(tiny(small_dataset, max_steps=3), tmp_path / "run", profile=True)
    assert f"no profile: the run ended before its step {SKIPPED_STEPS + 1}" in capsys.readouterr().err
    assert not (tmp_path / "run" / "profile").exists()


def test_a_stage_clock_adds_up_the_pieces_of_a_stage():
    with clocked(StageClock(torch.device("cpu"))) as clock:
        for _ in range(2):
            with stage("loss"):
                pass
    assert clock.seconds["loss"] > 0 and set(clock.take()) == set(STAGES) and clock.take()["loss"] == 0


def read_late(trainer):
    """As on a GPU."""
    trainer.reads_every_step = False


def test_losses_read_at_log_lines_are_those_read_at_every_step(small_dataset, tmp_path):
    config = tiny(small_dataset, max_epochs=1, log_every_steps=4, checkpoint_every_steps=3)
    config.evaluation.every_steps = 7
    every, late = (
        run_trainer(config, tmp_path / name, before=before) for name, before in (("every", lambda t: None), ("late", read_late))
    )
    assert losses(tmp_path / "every") == losses(tmp_path / "late")
    for here, there in zip(every.model.parameters(), late.model.parameters()):
        assert torch.equal(here, there)


def poison_at(step):
    """Breaks the table before a step."""

    def arrange(trainer):
        read_late(trainer)
        inner = trainer.step

        def poisoned(batch):
            if trainer.state.cursor.step == step - 1:
                with torch.no_grad():
                    next(trainer.model.parameters()).fill_(float("nan"))
            return inner(batch)

        trainer.step = poisoned

    return arrange


def test_a_loss_that_diverges_between_log_lines_is_named_and_nothing_since_is_saved(small_dataset, tmp_path):
    config = tiny(small_dataset, log_every_steps=8, checkpoint_every_steps=2)
    read_late = "step 5: the loss is not finite, read after step 6; nothing of the steps 5 to 6 is saved"
    with pytest.raises(UserError, match=read_late + r"; users of its batch: \d+"):
        train(config, tmp_path / "run", before=poison_at(5))
    saved = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if path.is_dir())
    assert len(saved) == 2 and all(int(name.split("-")[-1]) <= 4 for name in saved)


def test_parameters_that_are_not_finite_are_never_saved(small_dataset, tmp_path):
    """An update can break a model whose loss was finite."""

    def break_an_update(trainer):
        inner = trainer.optimizer.step

        def step():
            inner()
            if trainer.state.cursor.step == 1:  # in the second step
                with torch.no_grad():
                    list(trainer.model.parameters())[-1].view(-1)[0] = float("inf")

        trainer.optimizer.step = step

    config = tiny(small_dataset, max_steps=3, checkpoint_every_steps=1)
    with pytest.raises(UserError, match="step 2: the model's parameters are not finite, and not saved"):
        train(config, tmp_path / "run", before=break_an_update)


READERS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__")


class NoWaiting(TorchDispatchMode):
    """Refuses what makes a host wait for a device: reading a tensor, or a result whose size depends on values. Tables that
    ops/jagged.py makes on the host, from lengths that the host has, may be read."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        refused = name in ("_local_scalar_dense", "nonzero", "_unique2", "masked_select", "equal")
        # DistributedDataParallel keeps a table of used parameters on the host.
        refused = refused and not (name == "_local_scalar_dense" and args[0].dtype == torch.int32)
        assert not refused or on_the_host(), name
        return function(*args, **(kwargs or {}))

    def __enter__(self):
        self.patches = pytest.MonkeyPatch()
        for name in READERS:
            self.patches.setattr(torch.Tensor, name, only_on_the_host(getattr(torch.Tensor, name)))
        return super().__enter__()

    def __exit__(self, *error):
        self.patches.undo()
        return super().__exit__(*error)


def only_on_the_host(read):
    def checked(*args):
        assert on_the_host(), f"{read.__name__} of a tensor"
        return read(*args)

    return checked


def on_the_host():
    """Whether the reader is ops/jagged.py, or a look that is taken on a CPU alone."""
    frames = inspect.stack(context=0)
    jagged = os.path.join("ops", "jagged.py")
    return any(frame.filename.endswith(jagged) or frame.function == "_check_rows" for frame in frames)


@pytest.mark.parametrize("negatives", ["per_token", "shared", "mixed"])
def test_a_step_never_waits_for_the_device(small_dataset, tmp_path, monkeypatch, negatives):
    """What PyTorch's operators do in a step that a GPU would take too: no dropout, which draws seeds on a CPU."""
    monkeypatch.setattr(native, "library", lambda: None)
    config = tiny(small_dataset, max_steps=2)
    config.loss.negatives = negatives
    config.model.dropout = config.model.input_dropout = 0.0
    config.optimizer.clip_grad_norm = 1.0

    def watch(trainer):
        read_late(trainer)
        inner = trainer.step

        def watched(batch):
            with NoWaiting():
                return inner(batch)

        trainer.step = watched

    run_trainer(config, tmp_path / "run", before=watch)
