"""Peak memory of training steps, every figure from a process of its own.

    python -m benchmarks.memory --data-dir data/flickr8k      `lite` and a Gemma-2-like model, by variant and batch size
    python -m benchmarks.memory --systems dinov2-gemma --device cuda --batch-sizes 8 16 32

For each system a table of all variants of `benchmarks.train_step` at the recipe's batch size, and of ours and the
published recipe's step at several. On a CPU it is resident memory, on CUDA what torch allocated. "Over models" leaves
out what was held when the models were ready: what a larger batch multiplies.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks import harness
from benchmarks.harness import Measurement, Peak, Report
from benchmarks.systems import SYSTEMS, SystemName, recipe_of
from benchmarks.train_step import OURS, PUBLISHED, VARIANTS, applicable


def main(arguments: Sequence[str] | None = None) -> int:
    parser = harness.argument_parser(__doc__, repeats=1)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=["lite", "gemma-like"])
    parser.add_argument("--data-dir", type=Path, help="caption folder of lite (its recipe's)")
    parser.add_argument(
        "--batch-sizes", type=int, nargs="*", help="besides the recipe's (half and twice as many)"
    )
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), help="only these")
    options = parser.parse_args(arguments)
    device = harness.prepare(options)

    report = Report([], device, options.seed)
    for system in options.systems:
        recipe = recipe_of(system, tiny=options.tiny)
        usual = recipe.batch_size
        others = options.batch_sizes if options.batch_sizes is not None else [usual // 2, usual * 2]
        for batch_size in sorted({usual, *others}):
            variants = options.variants or applicable(system, recipe)
            if batch_size != usual:
                variants = [variant for variant in variants if variant in (OURS, PUBLISHED)]
            row = f"{system}, batch {batch_size}: "
            for variant in variants:
                peak = peak_of(options, system, batch_size, variant)
                report.measurements.append(Measurement(row + variant, (), batch_size, peak=peak))
            if {OURS, PUBLISHED} <= set(variants):
                report.add_memory_ratio(row + OURS, row + PUBLISHED, f"{row}{OURS} / {PUBLISHED}")
    report.finish(options.json)
    return 0


def peak_of(options: argparse.Namespace, system: SystemName, batch_size: int, variant: str) -> Peak:
    """Of one step; the largest of as many processes as there are repeats."""
    arguments = ["--system", system, "--batch-size", str(batch_size), "--captions", str(batch_size)]
    arguments += ["--device", options.device, "--seed", str(options.seed), "--peak-of", variant]
    arguments += ["--data-dir", str(options.data_dir)] if options.data_dir else []
    arguments += ["--tiny"] if options.tiny else []
    return max(
        harness.peak_in_child("benchmarks.train_step", arguments) for _ in range(options.repeats)
    )


if __name__ == "__main__":
    raise SystemExit(main())
