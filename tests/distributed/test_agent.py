"""A job that torchrun has left a node out of does not train on the rest."""

import pytest

from fuxi_torchrec.distributed import agent
from fuxi_torchrec.errors import LostProcess

TORCHRUN = ["python", "-m", "torch.distributed.run"]


@pytest.mark.parametrize(
    "words, met, is_whole",
    [
        ([*TORCHRUN, "--nnodes", "2", "main.py"], "2", True),
        ([*TORCHRUN, "--nnodes", "2", "main.py"], "1", False),
        ([*TORCHRUN, "--nnodes=4", "main.py"], "3", False),
        ([*TORCHRUN, "--nnodes", "2:4", "main.py"], "2", True),
        ([*TORCHRUN, "--nnodes", "2:4", "main.py"], "1", False),
        ([*TORCHRUN, "main.py"], "1", True),
        (["bash"], "1", True),
        ([*TORCHRUN, "--nnodes", "2", "main.py"], None, True),  # not started by torchrun
    ],
)
def test_fewer_nodes_than_torchrun_was_told_are_a_lost_process(monkeypatch, words, met, is_whole):
    monkeypatch.setattr(agent, "_agent_command", lambda: words)
    monkeypatch.delenv("GROUP_WORLD_SIZE", raising=False)
    if met is not None:
        monkeypatch.setenv("GROUP_WORLD_SIZE", met)
    if is_whole:
        return agent.check_all_nodes_met()
    with pytest.raises(LostProcess, match=rf"{met} of \d nodes met, .*compare the hosts' clocks"):
        agent.check_all_nodes_met()

