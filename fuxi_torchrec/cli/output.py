"""What the commands print and write."""

from typing import TYPE_CHECKING, Callable, Dict

from fuxi_torchrec.errors import UserError

if TYPE_CHECKING:
    from fuxi_torchrec.config import Config
    from fuxi_torchrec.data.dataset import SequenceDataset


def write_output(path: str, write: Callable[[], None]) -> None:
    """Calls `write`, which writes to `path`. Raises UserError, naming it, where that fails."""
    try:
        write()
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def print_splits(
    results: Dict[str, Dict[str, float]], dataset: "SequenceDataset", config: "Config", run: str
) -> None:
    """Prints a table for each split, the model above popularity; results: by split, and by "popularity " + split."""
    from fuxi_torchrec.run.reporting import print_results

    for split in [name for name in results if " " not in name]:
        rows = {config.model.encoder: results[split], "popularity": results[f"popularity {split}"]}
        identity = dataset.identity
        title = (
            f"{identity.name}: {split} of {config.data.split}, {results[split]['users']:,} users against all "
            f"{identity.num_items:,} items (catalogue: {identity.catalogue}), seen ones left out. Run: {run}"
        )
        print_results(rows, title)
