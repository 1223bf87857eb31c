"""What the commands print and write."""

from typing import Any, Callable, Dict

from fuxi_torchrec.errors import UserError


def _write(path: str, write: Callable[[], None]) -> None:
    try:
        write()
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def _print_splits(results: Dict[str, Any], dataset: Any, config: Any, run: str) -> None:
    from fuxi_torchrec.run.reporting import print_results

    for split in [name for name in results if " " not in name]:
        rows = {config.model.encoder: results[split], "popularity": results[f"popularity {split}"]}
        identity = dataset.identity
        title = (
            f"{identity.name}: {split} of {config.data.split}, {results[split]['users']:,} users against all "
            f"{identity.num_items:,} items (catalogue: {identity.catalogue}), seen ones left out. Run: {run}"
        )
        print_results(rows, title)
