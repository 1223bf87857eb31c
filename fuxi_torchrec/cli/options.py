"""The options of every command that uses a run's saved model. No torch until `saved_model` is called."""

from typing import TYPE_CHECKING, ContextManager

from fuxi_torchrec.paths import absolute

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from fuxi_torchrec.evaluation.load_model import SavedModel


def add_verify_option(parser: "ArgumentParser") -> None:
    """Adds --verify to a command's options."""
    parser.add_argument("--verify", action="store_true", help="Read the whole data set first and compare its checksums.")


def add_model_options(parser: "ArgumentParser") -> None:
    """Adds the options that say which saved model is used, on which device and data set."""
    parser.add_argument("--checkpoint", type=str, default="best", help="best, last, or a folder under checkpoints/.")
    parser.add_argument("--data.path", type=str, default=None, help="The data set, if it has moved since training.")
    parser.add_argument("--device", type=str, default=None, help="auto, cpu or cuda; default: as trained.")
    add_verify_option(parser)


def saved_model(options: "Namespace") -> "ContextManager[SavedModel]":
    """Loads a run's saved model, as a context manager. `options` has "run" and those of `add_model_options`."""
    from fuxi_torchrec.run.folder import RunFolder
    from fuxi_torchrec.versions import check_environment

    run = RunFolder.open(options.run)
    path = options.data.path
    overrides = [] if path is None else ["--data.path", absolute(path)]
    if options.device is not None:
        overrides += ["--trainer.device", options.device]
    config = run.config(overrides)
    check_environment(config.trainer.device)
    from fuxi_torchrec.evaluation.load_model import open_model

    return open_model(run, config, options.checkpoint, options.verify)
