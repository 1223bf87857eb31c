"""The `import-reference` and `export-reference` commands: checkpoints of the authors' research code, which are torch.save's of
{"model_state_dict": {name: tensor}}. Imports torch only once the arguments are right."""

import os
import pickle
from typing import Any, List, Mapping, Optional

from fuxi_torchrec.cli.options import add_model_options, saved_model
from fuxi_torchrec.config import Config
from fuxi_torchrec.config.parsing import OneLineParser, add_config_arguments, make_paths_absolute, parse_config
from fuxi_torchrec.errors import UserError
from fuxi_torchrec.files import JsonObject
from fuxi_torchrec.versions import check_environment

TABLE_NAME = "_embedding_module._item_emb.weight"
WRAPPED = "module."  # how DistributedDataParallel begins every name
# Beside its parameters the research code saves buffers, which its configuration gives.
BUFFERS = ("_attn_mask",)
MOST_ROWS_AN_ITEM = 100  # of a table by source ids
# How the research code calls its encoders' parameters, and what model.encoder can read them.
TOWERS = {
    "_fuxi.": ("fuxi_beta", "fuxi_alpha"),
    "_hstu.": ("hstu",),
    "attention_layers.": ("sasrec",),
}


def import_research(arguments: List[str]) -> int:
    """Makes a run folder of a research checkpoint, for `evaluate`, `recommend`, and `train --resume`."""
    parser = OneLineParser(
        prog="fuxi-torchrec import-reference",
        usage="fuxi-torchrec import-reference CHECKPOINT --config CONFIG.yaml --data.path DIR --output RUN_DIR",
        description="Makes a run folder of a checkpoint of the authors' research code.",
    )
    parser.add_argument("checkpoint", type=str, help="File that the research code saved.")
    parser.add_argument("--output", type=str, default=None, help="Run folder to make.")
    add_config_arguments(parser)
    if any(argument in ("-h", "--help") for argument in arguments):
        parser.parse_args(["--help"])
    config, options = parse_config(parser, *_without_config(arguments))
    for name, value in (("--output", options.output), ("--data.path", config.data.path)):
        if not value:
            raise UserError(f"import-reference: give {name}, the {'run folder' if name == '--output' else 'data set'}")
    from fuxi_torchrec.data.format import read_identity

    make_paths_absolute(config)
    read_identity(config.data.path)
    check_environment(config.trainer.device)
    _import(options.checkpoint, config, options.output)
    print(f"{options.checkpoint} is now the run {options.output}")
    return 0


def _without_config(arguments: List[str]) -> Any:
    """(path that --config names, the other arguments)."""
    for position, word in enumerate(arguments):
        if word == "--config" and position + 1 < len(arguments):
            return arguments[position + 1], arguments[:position] + arguments[position + 2 :]
        if word.startswith("--config="):
            return word.split("=", 1)[1], arguments[:position] + arguments[position + 1 :]
    raise UserError("import-reference: name the model's config, as in --config configs/ml-1m/….yaml")


def _import(checkpoint: str, config: Config, output: str) -> None:
    import torch

    from fuxi_torchrec.checkpoint.manager import create_optimizer_state
    from fuxi_torchrec.checkpoint.research_adapter import load_research_params
    from fuxi_torchrec.data.dataset import SequenceDataset
    from fuxi_torchrec.distributed.world import start_world
    from fuxi_torchrec.encoders import build_encoder
    from fuxi_torchrec.run.folder import RunFolder
    from fuxi_torchrec.sharding.model_parallel import local_parts
    from fuxi_torchrec.training.build import build_trainer

    dataset = SequenceDataset(config.data.path)
    time_unit = dataset.identity.time_unit
    encoder = build_encoder(config.model, padded_length=config.padded_length, time_unit=time_unit)
    table_VD = torch.zeros(dataset.identity.num_items, config.model.embedding_dim)
    params = read_checkpoint(checkpoint)
    _check_tower(checkpoint, params, config)
    params[TABLE_NAME] = _dense_rows(checkpoint, params, dataset)
    try:
        load_research_params(encoder, table_VD, params)
    except UserError as error:
        raise UserError(f"{checkpoint}: {error}") from None
    with start_world(config.trainer.device, config.trainer.timeout_minutes) as world:
        if world.size > 1:
            raise UserError("import-reference: run it as one process")
        run = RunFolder.create(output, config, dataset.identity, resume=False)
        trainer = build_trainer(config, dataset, run, world)
        try:
            create_optimizer_state(trainer.model, trainer.optimizer)  # as a step does, so that training can go on
            trainer.model.module.tower.encoder.load_state_dict(encoder.state_dict())
            for row, column, part in local_parts(trainer.model):
                part.copy_(table_VD[row : row + part.shape[0], column : column + part.shape[1]])
            trainer.save(is_best=True)
            trainer.checkpoints.wait()
        finally:
            trainer.progression.close()


def read_checkpoint(path: str) -> JsonObject:
    """Reads {name: float array} of a research checkpoint, as DistributedDataParallel or the bare model saved it.
    Nothing but weights is unpickled. Raises UserError, naming the file."""
    import torch

    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: cannot read this checkpoint ({error.strerror or error})") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, UnicodeDecodeError):
        raise UserError(
            f"{path}: not a checkpoint of weights that torch.load(…, weights_only=True) reads; save the model's "
            'state_dict by torch.save({"model_state_dict": model.state_dict()}, …)'
        ) from None
    weights = saved.get("model_state_dict", saved) if isinstance(saved, Mapping) else None
    if not isinstance(weights, Mapping) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise UserError(f"{path}: holds no model_state_dict, a mapping from names to tensors")
    named = {name.removeprefix(WRAPPED): value for name, value in weights.items()}
    return {name: value.float().numpy() for name, value in named.items() if not name.endswith(BUFFERS)}


def _check_tower(path: str, params: JsonObject, config: Config) -> None:
    for prefix, encoders in TOWERS.items():
        if any(name.startswith(prefix) for name in params) and config.model.encoder not in encoders:
            raise UserError(
                f"{path}: holds parameters of {' or '.join(encoders)} ({prefix}…), and the config's model.encoder is "
                f"{config.model.encoder}; name the config that it was trained by"
            )
    if TABLE_NAME not in params:
        raise UserError(f"{path}: parameter {TABLE_NAME} is missing; is this a checkpoint of the research code?")


def _dense_rows(path: str, params: JsonObject, dataset: Any) -> Any:
    """The item table with a padding row and then the data set's items, whichever way the checkpoint has its rows."""
    import numpy as np

    table, num_items = params[TABLE_NAME], dataset.identity.num_items
    source_V = _source_rows(dataset)
    if source_V is not None and len(table) == source_V.max() + 1:
        return np.concatenate([table[:1], table[source_V]])
    if len(table) == num_items + 1:
        return table
    by_source = "" if source_V is None else f" or {source_V.max() + 1} (by the source's own ids)"
    raise UserError(
        f"{path}: parameter {TABLE_NAME} has {len(table)} rows, the data set asks for {num_items + 1}{by_source}; name "
        "the data set that it was trained on with --data.path"
    )


def _source_rows(dataset: Any) -> Optional[Any]:
    """The source's own item ids [V], which are the research code's rows; None where they can be no rows."""
    import numpy as np

    source_V = dataset.items(["source_id"])["source_id"].to_numpy()
    return source_V if np.issubdtype(source_V.dtype, np.integer) and source_V.min() >= 1 else None


def export_research(arguments: List[str]) -> int:
    """Writes a run's saved model under the research code's names, as its training loop saves it."""
    parser = OneLineParser(
        prog="fuxi-torchrec export-reference",
        description="Writes a run's saved model as a checkpoint that the authors' research code can load.",
    )
    parser.add_argument("run", type=str, help="Run folder.")
    parser.add_argument("--rows", type=str, default="source", help="Rows of the item table: source (ids) or dense (ids + 1).")
    add_model_options(parser)
    parser.add_argument("--output", type=str, default=None, help="File to write; default: RUN_DIR/reference.pt.")
    options = parser.parse_args(arguments)
    if options.rows not in ("source", "dense"):
        raise UserError(f"--rows: {options.rows} is neither source nor dense")
    output = options.output or os.path.join(options.run, "reference.pt")
    with saved_model(options) as saved:
        if saved.world.size > 1:
            raise UserError("export-reference: run it as one process")
        _export(saved, options.rows, output)
    print(f"written to {output}")
    return 0


def _export(saved: Any, rows: str, output: str) -> None:
    import torch

    from fuxi_torchrec.checkpoint.research_adapter import export_research_params
    from fuxi_torchrec.files import file_aside
    from fuxi_torchrec.sharding.model_parallel import local_parts

    table_VD = torch.zeros(saved.dataset.identity.num_items, saved.config.model.embedding_dim)
    for row, column, part in local_parts(saved.model):
        table_VD[row : row + part.shape[0], column : column + part.shape[1]] = part.cpu()
    params = {
        name: torch.from_numpy(values)
        for name, values in export_research_params(saved.model.module.tower.encoder, table_VD).items()
    }
    if rows == "source":
        source_V = _source_rows(saved.dataset)
        if source_V is None:
            raise UserError("--rows source: the data set's own item ids are no positive integers; take --rows dense")
        if source_V.max() > MOST_ROWS_AN_ITEM * len(source_V):
            raise UserError(f"--rows source: ids go up to {source_V.max()}, far beyond the items' number; take --rows dense")
        by_source = torch.zeros(int(source_V.max()) + 1, table_VD.shape[1])
        by_source[torch.from_numpy(source_V.copy())] = table_VD
        params[TABLE_NAME] = by_source
    try:
        with file_aside(output) as aside:
            torch.save({"epoch": saved.epoch, "model_state_dict": params}, aside)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{output}: cannot be written ({getattr(error, 'strerror', None) or error})") from None
