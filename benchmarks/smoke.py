"""`make smoke`: the whole job on generated MovieLens-like data, by the commands a user would type.

    python -m benchmarks.smoke [--folder runs/smoke]

Nothing is downloaded: an archive in MovieLens-1M's own file format is generated, so that the real pipeline reads it.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time

import pyarrow.parquet as pq

CONFIG = os.path.join("configs", "smoke", "fuxi-beta.yaml")


def main() -> None:
    """Prepares, trains, evaluates and recommends; ends the program where a command fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", default=os.path.join("runs", "smoke"), help="what is made goes here; emptied first")
    folder = parser.parse_args().folder
    archive, data, run = (os.path.join(folder, name) for name in ("ml-like.zip", "data", "run"))
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    started = time.perf_counter()

    command("prepare", "synthetic", "--format", "ml-1m", "--users", 2000, "--items", 1000, "--events-per-user", 60,
            "--output", archive)  # fmt: skip
    command("prepare", "movielens", "--source", archive, "--output", data)
    command("train", CONFIG, "--data.path", data, "--output", run)
    users = pq.read_table(os.path.join(data, "train"), columns=["user_id"])["user_id"].to_pylist()[:3]
    command("recommend", run, "--users", ",".join(map(str, users)), "--k", 10)

    print(f"\nDone in {time.perf_counter() - started:.0f} s. The run is in {run}; look at its curves with")
    print(f"  {os.path.join(os.path.dirname(sys.executable), 'tensorboard')} --logdir {run}/tensorboard")


def command(*words: object) -> None:
    """Shows a command as a user would type it, and runs it; stops where it fails."""
    arguments = [str(word) for word in words]
    print(f"\n$ fuxi-torchrec {shlex.join(arguments)}", flush=True)
    code = subprocess.run([sys.executable, "-m", "fuxi_torchrec", *arguments]).returncode
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
