"""The `plan` command. Imports torch only once its arguments are right."""

from typing import List, Optional, Tuple

from fuxi_torchrec.config import Config
from fuxi_torchrec.config.parsing import OneLineParser, add_config_arguments, parse_config
from fuxi_torchrec.config.rules import check_table
from fuxi_torchrec.data.format import read_identity
from fuxi_torchrec.errors import UserError


def plan(arguments: List[str]) -> int:
    """Runs `fuxi-torchrec plan`; returns the exit code, 1 where the plan does not fit. Raises UserError."""
    parser = OneLineParser(
        prog="fuxi-torchrec plan",
        usage="fuxi-torchrec plan CONFIG.yaml --world-size N [--local-world-size n] [--hbm 80GB] [--items V] …",
        description="Plans the run of CONFIG.yaml for a cluster that need not be here. Exit code 1: it does not fit.",
    )
    parser.add_argument("--world-size", type=int, default=1, help="Ranks in all.")
    parser.add_argument("--local-world-size", type=int, default=None, help="Ranks of a host; default: 8 at most.")
    parser.add_argument("--hbm", type=str, default=None, help="GPU memory of a rank, like 80GB; none: ranks on CPUs.")
    parser.add_argument("--ddr", type=str, default="128GB", help="Host memory of a rank.")
    parser.add_argument("--items", type=int, default=None, help="Catalogue; default: that of data.path.")
    parser.add_argument("--events-per-user", type=float, default=None, help="Default: the mean of data.path, or the window.")
    parser.add_argument("--output", type=str, default="plan.json", help="Where the plan is written.")
    add_config_arguments(parser)
    if any(argument in ("-h", "--help") for argument in arguments):
        parser.parse_args(["--help"])
    if not arguments or arguments[0].startswith("-"):
        raise UserError("plan: name a config first, as in 'fuxi-torchrec plan configs/smoke/fuxi-beta.yaml'")
    config, options = parse_config(parser, arguments[0], arguments[1:])
    local = options.local_world_size or min(options.world_size, 8)
    if options.world_size < 1 or local < 1 or options.world_size % local:
        raise UserError(f"--local-world-size: {local} ranks a host do not make --world-size {options.world_size}")
    check_table(config, "cuda" if options.hbm else "cpu")
    items, events = _catalogue_size(config, options["items"], options.events_per_user)
    from fuxi_torchrec.files import write_aside
    from fuxi_torchrec.sharding import report as plan_report
    from fuxi_torchrec.sharding.planner import Machine

    hbm = plan_report.parse_size(options.hbm, "--hbm") if options.hbm else 0
    ddr = plan_report.parse_size(options.ddr, "--ddr")
    speeds = config.table.intra_host_gb_s, config.table.inter_host_gb_s
    machine = Machine("cuda" if hbm else "cpu", hbm, ddr, options.world_size, local, *speeds)
    report = plan_report.report(config, machine, items, events)
    plan_report.show(report)
    try:
        write_aside(options.output, report.to_json())
    except OSError as error:
        raise UserError(f"{options.output}: cannot be written ({error.strerror})") from None
    print(f"written to {options.output}")
    return 0 if report.fits else 1


def _catalogue_size(config: Config, items: Optional[int], events: Optional[float]) -> Tuple[int, float]:
    """(items, mean events of a user), from the data set where they aren't given."""
    for name, value in (("--items", items), ("--events-per-user", events)):
        if value is not None and value < 1:
            raise UserError(f"{name}: {value} must be at least 1")
    if items is None and not config.data.path:
        raise UserError("--items: give the number of items, or a data set with --data.path")
    mean = float(config.data.max_sequence_length + 1)
    if items is None:
        identity = read_identity(config.data.path)
        items, mean = identity.num_items, identity.num_events / max(identity.num_users, 1)
    return items, mean if events is None else events
