"""Lists the benchmarks, runs the named ones, and prints or saves their tables."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from pathlib import Path

import torch

import benchmarks
from benchmarks import gpu, measure

AIDS = (
    "__main__",
    "clusterings",
    "findings",
    "gpu",
    "gpu_parts",
    "measure",
    "reference",
    "right_pairs",
    "screening",
    "simclr",
    "study",
    "study_results",
)
RESULTS = Path(__file__).parent / "results"


def names() -> list[str]:
    """The benchmarks."""
    return [module.name for module in pkgutil.iter_modules(benchmarks.__path__) if module.name not in AIDS]


def main(argv: list[str]) -> int:
    """Exit status 0, or 2 for an unknown name; ``gpu`` has its own options and statuses."""
    if argv[:1] == ["gpu"]:
        return gpu.main(argv[1:])
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="benchmarks to run, or all; without any: a list; gpu has options of its own, see gpu --help",
    )
    parser.add_argument("--repeats", type=int, default=7, help="times that each way is run (default: 7)")
    parser.add_argument("--device", default="cpu", help="cpu, or a GPU such as cuda:0 (default: cpu)")
    parser.add_argument("--save", action="store_true", help="write the tables to benchmarks/results/, too")
    given = parser.parse_args(argv)
    known = {name: importlib.import_module(f"benchmarks.{name}") for name in names()}
    if not given.names:
        for name, module in {**known, "gpu": gpu}.items():
            print(f"{name:14}{(module.__doc__ or '').splitlines()[0]}")
        return 0
    chosen = list(known) if given.names == ["all"] else given.names
    if missing := [name for name in chosen if name not in known]:
        print(f"error: no benchmark {missing[0]}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(f"error: --device {device}: PyTorch sees no GPU here; leave it out for the CPU", file=sys.stderr)
        return 2
    for name in chosen:
        module = known[name]
        found = module.run(given.repeats, device)
        body, figure = found if isinstance(found, tuple) else (found, None)
        text = (
            f"# {name}: {(module.__doc__ or '').splitlines()[0]}\n\n{body}\n\n{measure.machine(device, given.repeats)}"
        )
        print(f"{text}\n", flush=True)
        if given.save:
            RESULTS.mkdir(exist_ok=True)
            if figure is not None:
                figure.savefig(RESULTS / f"{name}-{device.type}.png", dpi=110)
                text += f"\n\n![{name}]({name}-{device.type}.png)"
            (RESULTS / f"{name}-{device.type}.md").write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
