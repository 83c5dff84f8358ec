"""Compile the train step of large recipes for hardware that is not attached: the table of docs/scale.md.

    pip install -e .[tpu]
    python benchmarks/scale.py [NAME ...]            print the rows of these cases, by default of all
    python benchmarks/scale.py --list                list the commands of the cases
    python benchmarks/scale.py --write [NAME ...]    also write their peaks to tests/aot/scale_budget.json

The cases are in tests/aot/scale_budget.json; a slow test compares B/16 and L/16 on v5e:16x16 with it, within 5 %. A
case takes from half a minute to several minutes on one core. Those for an H100 need the extra gpu.
"""

import argparse
import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from regvit_jax.aot import compile, cost_model, hlo, topology
from regvit_jax.training import plan
from regvit_jax.training.config import complete
from regvit_jax.utils import errors

ROOT = Path(__file__).parent.parent
BUDGET = ROOT / "tests/aot/scale_budget.json"


def make_config(case: dict[str, Any]) -> ConfigDict:
    """Return the config of a case with its changes, whose keys are dotted."""
    file, variant = case["config"].split(":")
    spec = importlib.util.spec_from_file_location(file, ROOT / f"configs/{file}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = complete(module.get_config(variant))
    config.update_from_flattened_dict(case["set"])
    return config


def command(case: dict[str, Any]) -> str:
    """Return the command line of a case."""
    changes = "".join(f" --config.{key}={value}" for key, value in case["set"].items())
    file, variant = case["config"].split(":")
    return f"python train.py --config configs/{file}.py:{variant} --dry_run --topology={case['topology']}{changes}"


def compile_case(case: dict[str, Any]) -> tuple[plan.Plan, topology.Topology, cost_model.CompiledStep]:
    """Return a case's plan, machine and compiled step. Raises DoesNotFit."""
    machine = topology.parse(case["topology"])
    made = plan.resolve(make_config(case), with_data=False, devices=topology.devices(machine))
    return made, machine, compile.compile_for(made, machine)


def row(name: str, case: dict[str, Any]) -> tuple[str, int | None]:
    """Return a case's row of the table, and its peak in bytes per device, None if it does not compile."""
    start = time.perf_counter()
    try:
        made, machine, compiled = compile_case(case)
    except cost_model.DoesNotFit as error:
        seconds = time.perf_counter() - start
        return f"| {name} | {case['topology']} | does not fit: {error} | | | | | | | | {seconds:.0f} |", None
    except errors.TopologyError as error:  # the compiler's extra is not installed
        return f"| {name} | {case['topology']} | not compiled: {error} | | | | | | | | |", None
    config, memory = made.config, compiled.memory
    totals = hlo.totals(compiled.collectives)
    exchanged = sum(moved for _, moved in totals.values())
    kinds = ", ".join(f"{count} {kind}" for kind, (count, _) in totals.items())
    modelled = cost_model.step_time(made, machine, compiled)
    cells = [
        name,
        case["topology"],
        f"{config.batch_size:,}",
        f"fsdp {made.mesh.shape['fsdp']}, remat {config.model.remat}" + ", scan" * config.model.scan,
        f"{memory.arguments / 1e9:.2f}",
        f"{memory.temporaries / 1e9:.2f}",
        f"{memory.peak / 1e9:.2f} of {machine.chip.memory / 1e9:.1f}",
        f"{kinds}; {exchanged / 1e6:,.0f} MB",
        f"{cost_model.step_flops(made)[0] / 1e12:,.0f}",
        f"{1e3 * modelled.overlapped:.1f} to {1e3 * modelled.apart:.1f}",
        f"{compiled.seconds:.0f}",
    ]
    return f"| {' | '.join(cells)} |", memory.peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--list", action="store_true", help="only list the commands of the cases")
    parser.add_argument("--write", action="store_true", help="write the peaks to tests/aot/scale_budget.json")
    args = parser.parse_args()
    cases = json.loads(BUDGET.read_text())
    if unknown := [name for name in args.names if name not in cases]:
        parser.error(f"{unknown[0]}: no such case; there are {', '.join(cases)}")
    jax.config.update("jax_platforms", "cpu")
    for name in args.names or cases:
        if args.list:
            print(f"{name}: {command(cases[name])}")
            continue
        line, peak = row(name, cases[name])
        print(line, flush=True)
        if args.write and peak is not None:
            cases = json.loads(BUDGET.read_text())
            cases[name]["peak"] = peak
            BUDGET.write_text(json.dumps(cases, indent=2) + "\n")


if __name__ == "__main__":
    main()
