"""One more event and one request per user from a streaming state, against the full pass over the users' histories.

    python -m benchmarks.streaming [--users 64] [--events 2048] [--rounds 5] [--blocks 4] [--dim 256] [--heads 8]

Both answer the same question, the encoder's output for every user's next request. Prints one JSON line: median seconds of
each in interleaved rounds, their ratio, the norm-wise difference of the answers, and the bytes of a user's state.
"""

import argparse
import json
import statistics
import time

import torch

from fuxi_torchrec.config import ModelConfig
from fuxi_torchrec.encoders import build_encoder
from fuxi_torchrec.ops.jagged import JaggedLayout


def clock(work):
    """Runs the work; returns its seconds."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


@torch.inference_mode()
def compare(users: int, events: int, rounds: int, blocks: int, dim: int, heads: int) -> dict:
    """Times a request by the state and by a full pass, in turns; returns medians."""
    torch.manual_seed(0)
    config = ModelConfig(embedding_dim=dim, num_blocks=blocks, num_heads=heads, value_dim=dim // heads)
    encoder = build_encoder(config, padded_length=events, time_unit=1.0).eval()
    embeddings_BND = torch.randn(users, events, dim) * 0.02
    times_BN = 10**9 + torch.randint(0, 5000, (users, events + 1)).cumsum(1)
    at_B = times_BN[:, -1]
    last = events - rounds - 1
    flat_TD, flat_T = embeddings_BND[:, :last].flatten(0, 1), times_BN[:, :last].flatten()
    state = encoder.state_of(flat_TD, flat_T, JaggedLayout.from_lengths([last] * users))

    def stream(i):
        encoder.observe(state, embeddings_BND[:, i], times_BN[:, i])
        return encoder.query(state, at_B)

    def full(i):
        layout = JaggedLayout.from_lengths([i + 1] * users)
        next_T = torch.cat([times_BN[:, 1 : i + 1], at_B[:, None]], 1).flatten()
        outputs_TD = encoder(embeddings_BND[:, : i + 1].flatten(0, 1), times_BN[:, : i + 1].flatten(), next_T, layout)
        return outputs_TD[layout.offsets_B1[1:] - 1]

    seconds = {"stream": [], "full": []}
    for turn in range(rounds + 1):
        took, streamed = clock(lambda: stream(last + turn))  # noqa: B023 (called at once)
        took_full, expected = clock(lambda: full(last + turn))  # noqa: B023
        if turn:  # the first one warms up
            seconds["stream"].append(took)
            seconds["full"].append(took_full)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    bytes_a_user = sum(x.numel() * x.element_size() for x in state.tensors().values()) // users
    return {
        "users": users,
        "events": events,
        "stream_seconds": round(median["stream"], 5),
        "full_seconds": round(median["full"], 4),
        "ratio": round(median["full"] / median["stream"], 1),
        "difference": float((streamed - expected).norm() / expected.norm()),
        "state_bytes_a_user": bytes_a_user,
    }


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("users", 64), ("events", 2048), ("rounds", 5), ("blocks", 4), ("dim", 256), ("heads", 8)):
        parser.add_argument(f"--{name}", type=int, default=value)
    print(json.dumps(compare(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
