"""What is looked at before a job is submitted, so that a mistake costs no node: everything here is a UserError or nothing.

All components look here, and none passes over what another one refuses. Inside an image nothing but the config can be
looked at, and paths are the image's own: they have to be full ones, and what is written has to lie on a mount.
"""

import glob
import os
import tempfile
import time
from functools import partial
from typing import TYPE_CHECKING, List, Optional, Tuple

from fuxi_torchrec.config import Config
from fuxi_torchrec.config.parsing import PATHS, load_config
from fuxi_torchrec.config.rules import check_table
from fuxi_torchrec.errors import UserError
from fuxi_torchrec.paths import absolute, is_address, names_in
from launch.mounts import on_mount, output_inside, path_inside
from launch.words import with_values, without

if TYPE_CHECKING:
    from launch.place import Place


def config(path: str, overrides: List[str], place: "Place", later: bool = False) -> Config:
    """Loads the run's config and checks it as its node will, with its data set where that can be seen from here; later:
    it is made before the job starts. Raises UserError."""
    loaded = load_config(path, overrides)
    device, gpus = loaded.trainer.device, place.resource.gpu
    check_device("trainer.device", device, place)
    if device != "auto" or gpus > 0:
        check_table(loaded, "cpu" if device == "cpu" else "cuda")
    if not loaded.data.path:
        raise UserError("data.path: no data set named; add -- --data.path DIR (made by 'fuxi-torchrec prepare')")
    for section, name in PATHS:
        if getattr(getattr(loaded, section), name):
            config_path(section, name, loaded, place)
    if not later:
        data_set(loaded, place)
    return loaded


def data_set(loaded: Config, place: "Place") -> None:
    """Checks a run's data set, where it can be seen from here. Raises UserError."""
    if place.image is not None:
        return
    from fuxi_torchrec.data.dataset import SequenceDataset, check_enough_data
    from fuxi_torchrec.data.splits import check_splits

    dataset = SequenceDataset(loaded.data.path)
    check_splits(dataset, loaded.data)
    check_enough_data(dataset, place.size)


def with_absolute_paths(overrides: List[str], loaded: Config, place: "Place") -> List[str]:
    """Makes the config's paths full ones among the overrides: a job may run in a copy of this folder."""
    for section, name in PATHS:
        key, value = f"--{section}.{name}", getattr(getattr(loaded, section), name)
        full = config_path(section, name, loaded, place) if value else value
        if full != value:
            overrides = [*without(overrides, key), key, full]
    return overrides


def widths(loaded: Config, place: "Place") -> None:
    """Checks that an elastic run can go on with any number of nodes. Raises UserError where its optimizer's state would not
    fit another."""
    table = loaded.table
    cut = table.sharding == "column_wise" and table.optimizer in (None, "rowwise_adagrad")
    if place.nodes.is_elastic and cut:
        raise UserError(
            f"--nnodes: {place.nodes}: rowwise_adagrad keeps a number for each part of a row, and column_wise cuts rows into "
            "other parts on other nodes; take -- --table.sharding row_wise, --table.optimizer adagrad, or one number of nodes"
        )


def config_path(section: str, name: str, loaded: Config, place: "Place") -> str:
    """Returns the full path of one of the config's keys. Raises UserError as `source` and `output` do."""
    find = source if section == "data" else output
    return find(f"{section}.{name}", getattr(getattr(loaded, section), name), place)


def run_folder(config_path: str, given: Optional[str], resume: bool, place: "Place") -> str:
    """Returns the run folder's full path. By default runs/CONFIG-DATE-TIME, so that two submissions never meet.
    Raises UserError for a folder that cannot take the run."""
    if given is not None and is_address(given):
        raise UserError(f"--output: {given}: a run folder is no bucket; checkpoints can be: -- --trainer.checkpoint_folder")
    name = os.path.splitext(os.path.basename(config_path))[0]
    if given is None and place.image is None:
        given = os.path.join("runs", f"{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    folder = output("--output", given, place, f"runs/{name}")
    if place.image is None and os.path.exists(os.path.join(folder, "config.yaml")) and not resume:
        raise UserError(f"--output: {folder}: a run is already here; go on with it by --resume True, or name another")
    return folder


def evaluation(run: str, options: List[str], place: "Place", later: bool = False) -> Tuple[str, List[str]]:
    """Checks the arguments of 'fuxi-torchrec evaluate', parsed as there; returns the full path of the run, and the
    options with full paths. later: the run is trained before the job starts. Raises UserError."""
    from fuxi_torchrec.cli.evaluate import check_split, parse
    from fuxi_torchrec.run.folder import RunFolder

    if place.nodes.is_elastic:
        raise UserError(f"--nnodes: {place.nodes}: an evaluation does not go on with other nodes; give one number")
    given = parse([run, *options])
    run = source("--run", run, place)
    options = with_values(options, ("--data.path",), partial(source, place=place))
    options = with_values(options, ("--output",), partial(output, place=place))
    if given.device is not None:
        check_device("--device", given.device, place)
    if place.image is not None:
        on_mount("--run", run, place.mounted)
    elif not later:
        folder = RunFolder.open(run)
        loaded = folder.config([] if given.device is None else ["--trainer.device", given.device])
        check_device("trainer.device", loaded.trainer.device, place)
        check_split(given.split, loaded.data)
        _check_checkpoint(given.checkpoint, loaded.trainer.checkpoint_folder or folder.checkpoints)
        _check_data(absolute(given.data.path or loaded.data.path))
    return run, options


def preparation(arguments: List[str], place: "Place") -> List[str]:
    """Checks the arguments of 'fuxi-torchrec prepare', parsed as there; returns them with full paths. Raises
    UserError."""
    from data_pipelines.cli import COMMANDS, parse, path_options

    if not arguments or arguments[0] not in COMMANDS:
        raise UserError(f"prepare: name a pipeline first: {', '.join(COMMANDS)}")
    parse(arguments)
    arguments = with_values(arguments, tuple(path_options() - {"--output"}), partial(source, place=place))
    return with_values(arguments, ("--output",), partial(output, place=place, example="data/mine"))


def begins(arguments: List[str], place: "Place") -> None:
    """Checks that a pipeline, whose arguments `preparation` made, can begin: its sources are there, and no data set where
    it makes one. Raises UserError."""
    from data_pipelines.cli import parse, path_options

    options = parse(arguments)
    if place.image is not None:
        return
    with_values(arguments, tuple(path_options() - {"--output"}), _check_there)
    if not options.overwrite and not is_address(options.output):
        _refuse_data_set(options.output)


def source(option: str, path: str, place: "Place") -> str:
    """Returns the full path of what the job reads; addresses stay as they are. Raises UserError."""
    return absolute(path) if place.image is None else path_inside(option, path, place.mounted)


def output(option: str, path: Optional[str], place: "Place", example: str = "runs/mine") -> str:
    """Returns the full path of what the job writes; addresses stay as they are. Nothing is made here: a dry run leaves
    no trace.

    Raises UserError where it cannot be written, and inside an image also where it would be lost with the container;
    example: what the message suggests below a mount.
    """
    if place.image is not None:
        return output_inside(option, path, place.mounted, example)
    if not path:
        raise UserError(f"{option}: no name given; write one such as {example}")
    full = absolute(path)
    if not is_address(full):
        _check_writable(option, full)
    return full


def check_device(key: str, device: str, place: "Place") -> None:
    """Checks that a job on the GPU asks for one. Raises UserError."""
    if device == "cuda" and place.resource.gpu == 0 and (place.h or place.image):
        raise UserError(f"{key}: cuda, but no GPU is asked for; give -h h100x8 or --gpu, or take auto or cpu")


def _check_there(option: str, path: str) -> str:
    if not is_address(path) and not os.path.exists(path) and not glob.glob(path):
        raise UserError(f"{option}: {path}: no such file; name one that is there")
    return path


def _refuse_data_set(folder: str) -> None:
    from fuxi_torchrec.data.format import IDENTITY_FILE

    if os.path.exists(os.path.join(folder, IDENTITY_FILE)):
        raise UserError(f"--output: {folder}: a data set is there already; pass --overwrite or choose another --output")


def _check_data(folder: str) -> None:
    from fuxi_torchrec.data.format import read_identity

    if not is_address(folder):
        read_identity(folder)


def _check_checkpoint(which: str, folder: str) -> None:
    """What cannot be seen from here (a bucket, perhaps with the job's rights alone) is left to the job."""
    if is_address(folder):
        return
    there = sorted(name for name in names_in(folder) if name.startswith("step-"))
    if not there:
        raise UserError(f"--run: {folder}: no checkpoint here; train the run first")
    if which not in ("best", "last", *there):
        raise UserError(f"--checkpoint: {which}: not in {folder}; name best, last or one of {', '.join(there)}")


def _check_writable(option: str, path: str) -> None:
    there = path
    while not os.path.lexists(there):
        there = os.path.dirname(there)
    if there == path and os.path.isfile(there):
        there = os.path.dirname(there)  # a file that is written anew
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UserError(f"{option}: {path}: cannot be written, {there}: {error.strerror}; name another") from None
