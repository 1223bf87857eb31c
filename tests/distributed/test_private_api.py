"""The private names of torch and TorchRec still mean what the library takes them for; one test a name."""

import inspect
import io
import pickle
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.optim import RowWiseAdagrad

from fuxi_torchrec.distributed import private_api
from fuxi_torchrec.distributed.world import start_world
from fuxi_torchrec.sharding.planner import sharder


@pytest.fixture
def world():
    with start_world("cpu") as world:
        yield world


@pytest.fixture
def table():
    """An item table of 4 rows whose optimizer runs inside backward."""
    config = EmbeddingConfig(name="item", embedding_dim=4, num_embeddings=4, feature_names=["events"])
    table = EmbeddingCollection(tables=[config], device=torch.device("meta"))
    settings = {"lr": 0.1}
    private_api.apply_optimizer_in_backward(RowWiseAdagrad, table.parameters(), settings, register_hook=False)
    return table


def test_an_own_connection_reaches_the_process_groups_store(world):
    private_api.own_store().set("key", "value")
    assert private_api.own_store().get("key") == b"value" and isinstance(private_api.own_store(), dist.Store)


def test_the_flight_recorder_holds_gloos_collectives(world):
    dist.all_reduce(torch.ones(3))
    recorded = pickle.loads(private_api.flight_recorder_trace())
    assert "gloo:all_reduce" in [entry["profiling_name"] for entry in recorded["entries"]]


def test_a_checkpoints_memory_format_is_a_member_of_an_enumeration():
    assert {"TORCH_CONTIGUOUS_FORMAT", "TORCH_CHANNELS_LAST", "TORCH_PRESERVE_FORMAT"} == set(
        private_api.MemoryFormatEncoding.__members__
    )


def test_the_names_of_the_memory_snapshot_are_those_of_this_torch():
    """What they do needs a GPU, and the allocator's own is not even in a CPU build; torch.compile's list names it."""
    from torch._dynamo import trace_rules

    assert "torch._C._cuda_attach_out_of_memory_observer" in Path(trace_rules.__file__).read_text()
    assert {"max_entries"} <= set(inspect.signature(torch.cuda.memory._record_memory_history).parameters)
    assert {"filename"} <= set(inspect.signature(torch.cuda.memory._dump_snapshot).parameters)
    # What is called in one of them is called with these names (a CPU build fails beyond them).
    for call in (private_api.record_memory_history, private_api.on_out_of_memory):
        with pytest.raises((RuntimeError, AttributeError, AssertionError)):
            call(1)


def test_a_fake_tensor_knows_where_its_bytes_are_in_the_file():
    values, file = torch.arange(10.0), io.BytesIO()
    torch.save(values, file)
    file.seek(0)
    with private_api.FakeTensorMode():
        fake = torch.load(file, weights_only=True)
    begin = private_api.offset_in_checkpoint(fake)
    assert file.getvalue()[begin : begin + 40] == values.numpy().tobytes()


def test_rows_and_columns_are_narrowed_together():
    values = torch.arange(12).view(3, 4)
    assert torch.equal(private_api.narrow_tensor_by_index(values, (1, 2), (2, 1)), values[1:3, 2:3])


def test_a_parameter_with_an_optimizer_in_backward_is_known(table):
    assert all(map(private_api.is_trained_in_backward, table.parameters()))
    assert not private_api.is_trained_in_backward(nn.Parameter(torch.zeros(1)))


def test_the_planner_s_choice_can_be_read(table):
    planner = EmbeddingShardingPlanner(topology=Topology(world_size=1, compute_device="cpu"))
    assert private_api.best_plan(planner) == []
    planner.plan(table, [sharder("cpu")])
    assert [option.name for option in private_api.best_plan(planner)] == ["item"]


def test_a_profiler_that_records_is_seen():
    assert not private_api.is_profiling()
    with torch.profiler.profile():
        assert private_api.is_profiling()


def test_a_sharded_table_s_state_is_a_sharded_tensor(world, table):
    from torchrec.distributed.model_parallel import DistributedModelParallel

    model = DistributedModelParallel(nn.ModuleDict({"table": table}), device=world.device, sharders=[sharder("cpu")])
    assert isinstance(model.module["table"].state_dict()["embeddings.item.weight"], private_api.ShardedTensor)


def test_no_other_file_of_the_library_uses_a_private_name_of_torch():
    private = re.compile(r"""(?<!["'.\w])(torch|torchrec|dist)(\.\w+)*(\._[a-z]| import _)""")
    library = Path(private_api.__file__).parents[1]
    found = [path.name for path in library.rglob("*.py") if private.search(path.read_text())]
    assert found == ["private_api.py"]
