"""The `bench` command. Imports torch only once its arguments are right."""

import importlib.util
import os
import statistics
import sys
import tempfile
import time
from typing import TYPE_CHECKING, Dict, List, Sequence, Tuple, get_args

from fuxi_torchrec.config import Config, EncoderName
from fuxi_torchrec.config.parsing import OneLineParser, add_config_arguments, parse_options
from fuxi_torchrec.config.rules import check, check_table
from fuxi_torchrec.errors import UserError

if TYPE_CHECKING:
    import torch

    from fuxi_torchrec.bench.report import BenchMachine
    from fuxi_torchrec.bench.timing import BenchSize
    from fuxi_torchrec.distributed.world import World

DEFAULT_ENCODERS = "fuxi_beta,fuxi_alpha,hstu,sasrec,flash"
DEFAULT_LENGTHS = "128,512,2048,8192"
MEASURED_PRODUCT = 2048


def bench(arguments: List[str]) -> int:
    """Runs `fuxi-torchrec bench`; returns the exit code. Raises UserError."""
    parser = OneLineParser(
        prog="fuxi-torchrec bench",
        usage="fuxi-torchrec bench [--encoders NAME,…] [--lengths N,…] [--tokens T] [--steps S] [--section.key value …]",
        description="Times training steps on random users, by stage, encoder and length: prints a table, and writes JSON, "
        "CSV and a plot. The encoders of one length run in turns, and every number is the median over the turns; leave the "
        "machine alone meanwhile. Every key of a config can be given, such as --model.embedding_dim 256 or --trainer.precision "
        "bf16, but for data.*, which the random users replace; the defaults are ML-1M base's.",
    )
    names = get_args(EncoderName)
    parser.add_argument("--encoders", type=str, default=DEFAULT_ENCODERS, help=f"Of {', '.join(names)}.")
    parser.add_argument("--lengths", type=str, default=DEFAULT_LENGTHS, help="Longest sequences, 2 or more each.")
    parser.add_argument("--tokens", type=int, default=8192, help="Inputs of a step, whatever the length.")
    parser.add_argument("--items", type=int, default=3706, help="Catalogue; the default is ML-1M's.")
    parser.add_argument("--steps", type=int, default=5, help="Steps that are timed, after two that are not.")
    parser.add_argument(
        "--peak-tflops",
        type=float,
        default=None,
        help="What a device can do at most, that MFU is taken against: trainer.peak_tflops. Default: a known GPU's, else the "
        "rate of a matrix product, measured first.",
    )
    parser.add_argument("--device", type=str, default=None, help="auto, cpu or cuda: trainer.device.")
    parser.add_argument("--output", type=str, default=os.path.join("runs", "bench"), help="Folder of the files it writes.")
    add_config_arguments(parser)
    if not arguments:
        example = "fuxi-torchrec bench --encoders fuxi_beta,sasrec --lengths 128,512"
        raise UserError(f"bench: takes minutes and the whole machine; say what to time, as in '{example}' (see --help)")
    config, options = parse_options(parser, arguments)
    if options.device is not None:
        if options.device not in ("auto", "cpu", "cuda"):
            raise UserError(f"--device: '{options.device}' is none of auto, cpu, cuda")
        config.trainer.device = options.device
    if options.peak_tflops is not None:
        config.trainer.peak_tflops = options.peak_tflops
    encoders, lengths = _names(options.encoders, names), _numbers(options.lengths)
    items, steps = options["items"], options.steps  # a namespace has a method of that name
    for name, value in (("--items", items), ("--steps", steps)):
        if value < 1:
            raise UserError(f"{name}: {value} must be at least 1")
    if options.tokens < max(lengths):
        raise UserError(f"--tokens: {options.tokens} are fewer than the longest of --lengths, {max(lengths)}")
    for encoder in encoders:
        _check_case(config, encoder, max(lengths))
    _check_output(options.output)
    return _run(config, encoders, lengths, (options.tokens, items, steps), options.output)


def _names(text: str, known: Tuple[EncoderName, ...]) -> List[EncoderName]:
    by_name: Dict[str, EncoderName] = {name: name for name in known}
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in by_name:
            raise UserError(f"--encoders: unknown {name!r}; there are {', '.join(known)}")
    if not names:
        raise UserError(f"--encoders: name at least one of {', '.join(known)}")
    return [by_name[name] for name in dict.fromkeys(names)]


def _numbers(text: str) -> List[int]:
    try:
        numbers = [int(number) for number in text.split(",")]
    except ValueError:
        raise UserError(f"--lengths: '{text}' is no list of whole numbers, like 128,512") from None
    if min(numbers) < 2:
        raise UserError(f"--lengths: {min(numbers)} is too short; a sequence has at least 2 events")
    return sorted(set(numbers))


def _check_case(config: Config, encoder: EncoderName, longest: int) -> None:
    before = config.model.encoder, config.data.max_sequence_length
    config.model.encoder, config.data.max_sequence_length = encoder, longest
    check(config)
    config.model.encoder, config.data.max_sequence_length = before


def _check_output(folder: str) -> None:
    """Before minutes of work."""
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"--output: {folder} cannot be written ({error.strerror}); name another folder") from None


def _run(
    config: Config, encoders: Sequence[EncoderName], lengths: List[int], sizes: Tuple[int, int, int], output: str
) -> int:
    from fuxi_torchrec.versions import check_environment

    check_environment(config.trainer.device)
    from fuxi_torchrec.bench import report as bench_report
    from fuxi_torchrec.bench.timing import BenchSize, check_memory, run_bench
    from fuxi_torchrec.distributed.failures import fail_together
    from fuxi_torchrec.distributed.world import device_type, start_world
    from fuxi_torchrec.training.compile import check_compiler

    trainer = config.trainer
    check_table(config, device_type(trainer.device))
    if trainer.compile:
        check_compiler(device_type(trainer.device))
    with start_world(trainer.device, trainer.timeout_minutes) as world, fail_together(world):

        def report(text: str) -> None:
            if world.is_main:
                print(text, file=sys.stderr, flush=True)

        if importlib.util.find_spec("matplotlib") is None:
            report("there will be no plot: it takes matplotlib (pip install matplotlib)")
        size = BenchSize(*sizes)
        check_memory(config, encoders, max(lengths), size, world.device)
        machine = _machine(config, world, size)
        peak = world.from_main(machine["peak_tflops"]) * 1e12
        rows = run_bench(config, encoders, lengths, size, world, peak, report)
        if world.is_main:
            bench_report.show(rows, machine)
            written = bench_report.write(rows, machine, config.to_dict(), output)
            print("written to " + ", ".join(written))
    return 0


def _machine(config: Config, world: "World", size: "BenchSize") -> "BenchMachine":
    """What the numbers were taken on, and the peak that MFU is taken against: stated, known, or measured here."""
    import torch

    from fuxi_torchrec.profiling.peak_flops import peak_flops

    device, peak = world.device, peak_flops(config.trainer, world.device)
    source = "stated" if config.trainer.peak_tflops is not None else "a data sheet's"
    if peak is None:
        peak, source = _product_rate(device), f"a {MEASURED_PRODUCT:,}³ float32 product here"
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "ranks": world.size,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "precision": config.trainer.precision,
        "peak_tflops": peak / 1e12,
        "peak_source": source,
        "items": size.items,
        "steps": size.steps,
        "torch": torch.__version__,
    }


def _product_rate(device: "torch.device") -> float:
    """FLOP/s of the quicker ones of some float32 matrix products."""
    import torch

    n, seconds = MEASURED_PRODUCT, []
    m = torch.randn(n, n, device=device)
    for _ in range(7):
        start = time.perf_counter()
        (m @ m)[0, 0].item()
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / statistics.median(sorted(seconds)[:3])


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return "CPU"
