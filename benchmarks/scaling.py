"""How well several processes share the work: images a second, alone and together, in turn.

    python benchmarks/scaling.py --processes 2

Each process has one thread on a CPU, or one GPU. The rounds alternate: alone, together, alone, ..;
the efficiency is the speed together over the speed alone times the number of processes. The model
is CifarResNet on the samples, the batch 128 for each process. Steps are ordinary ones, alone too,
where a GPU would replay them as graphs and be faster: beside several that is not the efficiency.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import report  # noqa: E402
import settings  # noqa: E402
import utils  # noqa: E402


def measure(steps: int, width: int) -> None:
    """One process's part of a round; the first prints images per second, all processes together."""
    run = utils.settings(graphs=False, environ={**os.environ, "PROFILE": "quick"})
    run = replace(run, quiet=True)
    torch.manual_seed(0)
    model = report.notebook_definitions("imageclassification.ipynb").CifarResNet(width)
    model = model.to(run.device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    training = utils.load_cifar10(run)[0]
    batch = 128 * settings.world_size()
    training = training.subset(torch.arange(steps * batch) % len(training))
    batches = utils.Batches(training, batch, run, shuffle=True, flip=True, shift=4)
    one = utils.Batches(training.subset(torch.arange(settings.world_size())), 1, run)
    history = utils.train(model, optimizer, batches, one, 2, run)
    history.raise_if_stopped(type(model).__name__)
    if settings.rank() == 0:
        print(len(training) / history[-1].seconds)  # the second epoch: the first warms up


def round_of(processes: int, options) -> float:
    """Images per second of one round in processes of its own."""
    command = [sys.executable]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        command += [*launcher, str(processes)]
    command += [__file__, "--measure", "--steps", str(options.steps), "--width", str(options.width)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2, help="how many together (default 2)")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds (default 5)")
    parser.add_argument("--steps", type=int, default=8, help="steps of an epoch (default 8)")
    parser.add_argument("--width", type=int, default=64, help="of the model (default 64)")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the result to FILE as well"
    )
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.steps, options.width)
        return
    torch.set_num_threads(1)  # as each process has, and so the machine's name says
    facts = settings.measured_on(utils.settings())
    alone, together = [], []
    for number in range(options.rounds + 1):
        pair = round_of(1, options), round_of(options.processes, options)
        if number > 0:  # the first round warms up
            alone.append(pair[0])
            together.append(pair[1])
            print(f"round {number}: {pair[0]:.0f} alone, {pair[1]:.0f} together", flush=True)
    n = options.processes
    shares = [100 * t / (n * a) for a, t in zip(alone, together, strict=True)]
    result = dict(
        **facts,
        model=f"CifarResNet({options.width})",
        processes=n,
        alone=statistics.median(alone),
        together=statistics.median(together),
        efficiency=statistics.median(shares),
        lowest=min(shares),
        highest=max(shares),
        rounds=options.rounds,
    )
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
