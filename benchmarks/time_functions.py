"""What has a run learned about time? Plots each block's weight of a past event against the time since then.

    python -m benchmarks.time_functions RUN_DIR [--output docs/time-functions.svg]

Prints the parameters too. The picture in the README is of `make smoke`'s run.
"""

import argparse

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks.reproduce.plots import LONGEST_GAP, TIMES, time_map  # noqa: E402
from benchmarks.reproduce.records import channel_weights  # noqa: E402
from fuxi_torchrec.errors import UserError  # noqa: E402
from fuxi_torchrec.evaluation.load_model import open_model  # noqa: E402
from fuxi_torchrec.run.folder import RunFolder  # noqa: E402


def main() -> None:
    """Runs the program from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", metavar="RUN_DIR", help="a run of an encoder with a channel `temporal`")
    parser.add_argument("--output", default="time-functions.svg", help="PNG, SVG or PDF, by its ending")
    options = parser.parse_args()
    try:
        draw(options.run, options.output)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")


def draw(path: str, output: str) -> None:
    """Writes the plot of the run in the folder `path`. Raises UserError for a run without a temporal channel."""
    run = RunFolder.open(path)
    with open_model(run, run.config(), "best") as saved:
        blocks = channel_weights(saved.model.module.tower.encoder)
    channels = {number: block["temporal"] for number, block in enumerate(blocks, 1) if "temporal" in block}
    if not channels:
        raise UserError(f"{path}: this model has no temporal channel; name a run of fuxi_beta with one")
    seconds = np.geomspace(1, LONGEST_GAP, 200)
    figure, axis = plt.subplots(figsize=(7.5, 3.2))
    for number, channel in channels.items():
        print(f"block {number}: {channel}")
        axis.plot(seconds, time_map(channel, seconds), label=f"block {number}")
    axis.axhline(0, color="black", linewidth=0.6)
    axis.set_xscale("log")
    axis.set_xticks(list(TIMES.values()), list(TIMES))
    axis.minorticks_off()
    axis.set(xlabel="time from the past event to the next one", ylabel="weight of the past event")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(output, bbox_inches="tight", dpi=110)


if __name__ == "__main__":
    main()
