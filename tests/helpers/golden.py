"""The numbers of the research code."""

import ast
from pathlib import Path

import numpy as np

FILES = sorted((Path(__file__).parents[1] / "golden").glob("*.npz"))


def load(path):
    with np.load(path) as arrays:
        data = {name: arrays[name] for name in arrays.files}
    config = ast.literal_eval(str(data["config"]))
    return config, data, {name[len("param/") :]: data[name] for name in data if name.startswith("param/")}
