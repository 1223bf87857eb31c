"""A part of benchmarks.gpu whose cases go wrong in every way; in the folder "hangs" the first one never ends."""

import os
import time

import torch

from benchmarks.gpu.cases import Case


def cases(place):
    def dies():
        os._exit(9)

    if place.folder == "hangs":
        return [Case("hangs", lambda: time.sleep(3600)), Case("comes too late", lambda: {})]
    return [
        Case("works", lambda: {"seconds": 0.5, "tokens": 10}),
        Case("raises", lambda: torch.ones(2) @ torch.ones(3)),
        Case("dies", dies),
        Case("works after that", lambda: {"seconds": 0.25, "tokens": 10}),
    ]
