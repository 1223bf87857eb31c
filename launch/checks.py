"""What is looked at before a job is submitted, so that a mistake costs no node: everything here is a UserError or nothing.

Inside an image nothing but the config can be looked at from here, and paths are the image's own.
"""

import os
import tempfile
import time
from typing import TYPE_CHECKING, List, Optional, Sequence

from fuxi_torchrec.config import Config
from fuxi_torchrec.config.parsing import PATHS, load_config
from fuxi_torchrec.config.rules import check_table
from fuxi_torchrec.errors import UserError
from fuxi_torchrec.paths import absolute, is_address

if TYPE_CHECKING:
    from launch.place import Place

# Options that hold paths: relative ones mean the folder that the job is submitted from, wherever it runs.
PREPARE_PATHS = ("--source", "--output", "--item-titles", "--item_titles")


def config(path: str, overrides: List[str], place: "Place", later: bool = False) -> Config:
    """Loads the run's config and checks it as its node will, with its data set where that can be seen from here; later:
    it is made before the job starts. Raises UserError."""
    loaded = load_config(path, overrides)
    device, gpus = loaded.trainer.device, place.resource.gpu
    if device == "cuda" and gpus == 0 and (place.h or place.image):
        raise UserError("trainer.device: cuda, but no GPU is asked for; give -h h100x8 or --gpu, or take auto or cpu")
    if device != "auto" or gpus > 0:
        check_table(loaded, "cpu" if device == "cpu" else "cuda")
    if not loaded.data.path:
        raise UserError("data.path: no data set named; add -- --data.path DIR (made by 'fuxi-torchrec prepare')")
    if place.image is None and not later:
        from fuxi_torchrec.data.dataset import SequenceDataset, check_enough_data
        from fuxi_torchrec.data.splits import check_splits

        dataset = SequenceDataset(loaded.data.path)
        check_splits(dataset, loaded.data)
        check_enough_data(dataset, place.size)
    return loaded


def with_absolute_paths(overrides: List[str], loaded: Config, place: "Place") -> List[str]:
    """Makes the config's relative paths absolute among the overrides: a job may run in a copy of this folder."""
    if place.image is not None:
        return overrides
    for section, name in PATHS:
        key, value = f"--{section}.{name}", getattr(getattr(loaded, section), name)
        if value and absolute(value) != value:
            overrides = [*_without(overrides, key), key, absolute(value)]
    return overrides


def run_folder(config_path: str, output: Optional[str], resume: bool, place: "Place") -> str:
    """Returns the run folder's full path. By default runs/CONFIG-DATE-TIME, so that two submissions never meet.
    Raises UserError for a folder that cannot take the run."""
    if output is not None and is_address(output):
        raise UserError(f"--output: {output}: a run folder is no bucket; checkpoints can be: -- --trainer.checkpoint_folder")
    name = os.path.splitext(os.path.basename(config_path))[0]
    if place.image is not None:
        return _inside_image(output, name, place)
    output = absolute(output or os.path.join("runs", f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"))
    _check_writable(output)
    if os.path.exists(os.path.join(output, "config.yaml")) and not resume:
        raise UserError(f"--output: {output}: a run is already here; go on with it by --resume True, or name another")
    return output


def evaluation(run: str, options: List[str], place: "Place", later: bool = False) -> str:
    """Returns the full path of the run to be evaluated; later: it is trained before the job starts. Raises UserError for a
    folder that holds none."""
    if place.image is not None:
        return run
    from fuxi_torchrec.run.folder import RunFolder

    run = absolute(run)
    if not later:
        RunFolder.open(run).config()
    return run


def preparation(arguments: List[str], place: "Place") -> List[str]:
    """Checks the arguments of 'fuxi-torchrec prepare', parsed as there; returns them with absolute paths. Raises
    UserError."""
    from data_pipelines.cli import COMMANDS, parse

    if not arguments or arguments[0] not in COMMANDS:
        raise UserError(f"prepare: name a pipeline first: {', '.join(COMMANDS)}")
    options = parse(arguments)
    if place.image is not None:
        return arguments
    _check_writable(absolute(options.output))
    return _absolute_values(arguments, PREPARE_PATHS)




def _inside_image(output: Optional[str], name: str, place: "Place") -> str:
    if output is None or not output.startswith("/"):
        example = f"{(place.mounted or ['/data'])[0]}/runs/{name}"
        raise UserError(f"--output: name the run folder inside the image, on something mounted there, as in {example}")
    if not any(f"{output}/".startswith(f"{folder.rstrip('/')}/") for folder in place.mounted):
        lies = ", ".join(place.mounted) or "nothing"
        raise UserError(f"--output: {output} would be lost with the container: mounted into it is {lies}; see --mounts")
    return output


def _check_writable(folder: str) -> None:
    """Nothing is made here: a dry run leaves no trace."""
    there = folder
    while not os.path.lexists(there):
        there = os.path.dirname(there)
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UserError(f"--output: {folder}: cannot be written, {there}: {error.strerror}; name another folder") from None


def _without(arguments: List[str], option: str) -> List[str]:
    """The arguments less `option VALUE` and `option=VALUE`."""
    kept, skip = [], False
    for word in arguments:
        if not skip and word != option and not word.startswith(f"{option}="):
            kept.append(word)
        skip = word == option
    return kept


def _absolute_values(arguments: List[str], options: Sequence[str]) -> List[str]:
    """The arguments with the values of `options` absolute; an option may have several."""
    made, of_path = [], False
    for word in arguments:
        if word.startswith("--"):
            option, equals, value = word.partition("=")
            of_path = option in options and not equals
            made.append(f"{option}={absolute(value)}" if option in options and equals else word)
        else:
            made.append(absolute(word) if of_path else word)
    return made
