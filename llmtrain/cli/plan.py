"""`llmtrain plan`: memory, time, energy and cost of a command line, before anything is launched."""

import json
import subprocess
import sys
from pathlib import Path

from llmtrain.cli import exits
from llmtrain.cli.flags import Flag, listing, parse
from llmtrain.errors import UserError

FLAGS = [
    Flag("--help", "this text", "-h"),
    Flag("--all-infra", "a line for each option of infra, instead of a page for one"),
    Flag("--json", "for machines: the plan, or with --all-infra a plan for each option"),
    Flag("--config-dir", "a directory with your own options, laid out as conf/", "-cd", "DIR"),
    Flag("--config-name", "another defaults list than train", "-cn", "NAME"),
]
USAGE = """llmtrain plan [FLAG] [GROUP=OPTION] [KEY=VALUE] ...     as for `llmtrain train`

  llmtrain plan model=qwen3_0_6b infra=h100     what that training would need, without such a device
  llmtrain plan --all-infra trainer=dpo         memory, time and cost on each kind of machine
"""
WHAT_A_RUN_LOADS = """
import llmtrain.training.run
import llmtrain.plan.machine as machine
print(machine.resident_bytes())
"""


@exits
def main(argv: list[str] | None = None) -> int:
    """Plan the one command line. Ends with 0 where the plan does not fit, too: it is an answer."""
    flags, overrides = parse(sys.argv[1:] if argv is None else argv, FLAGS)
    if "--help" in flags:
        print(USAGE)
        print("\n".join(listing(FLAGS)))
        return 0
    from llmtrain.config.compose import load_config
    from llmtrain.config.options import conf_directory, options

    directories = [Path(flags["--config-dir"])] if "--config-dir" in flags else []
    name = flags.get("--config-name", "train")
    config = load_config(overrides, directories, name)
    choices = {"": config}
    if "--all-infra" in flags:
        others = [line for line in overrides if not line.lstrip("+~").startswith("infra=")]
        names = options([conf_directory(), *directories])["infra"]
        choices = {infra: load_config([*others, f"infra={infra}"], directories, name) for infra in names}

    from llmtrain.plan.records import Plan  # seconds of imports: only once the config is known to be good
    from llmtrain.plan.table import comparison, page
    from llmtrain.training import device
    from llmtrain.training.planned import planner
    from llmtrain.training.resolve import already_prepared

    data = already_prepared(config, Path(config.outputs_dir))
    plans: dict[str, Plan | str] = {}
    for infra, one in choices.items():
        outputs = Path(one.outputs_dir)
        try:
            on_cpu = one.infra.accelerator == "cpu"
            if on_cpu:
                device.apply(one.infra)
            plans[infra] = planner(one, outputs, _process_bytes(outputs) if on_cpu else 0, manifest=data).plan()
        except UserError as error:
            if not infra:
                raise
            plans[infra] = str(error)
    if "--json" in flags:
        found = {
            infra: plan if isinstance(plan, str) else plan.model_dump(mode="json") for infra, plan in plans.items()
        }
        print(json.dumps(found if "--all-infra" in flags else found[""], indent=2))
    elif "--all-infra" in flags:
        print(comparison(plans))
    else:
        (plan,) = plans.values()
        assert isinstance(plan, Plan)
        print(page(plan))
    return 0


def _process_bytes(outputs: Path) -> int:
    """Memory of a process that is about to train; measured once, by starting one, and kept in `outputs/plan`."""
    from importlib.metadata import version

    from llmtrain import __version__
    from llmtrain.plan.kernels import Kernels

    kept = Kernels(outputs, {"llmtrain": __version__, "torch": version("torch"), "figure": "process"})

    def measure() -> float:
        command = [sys.executable, "-c", WHAT_A_RUN_LOADS]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    return round(kept.once("process", measure))
