"""Peak memory of training steps, every figure from a process of its own.

    python -m benchmarks.memory --data-dir data/flickr8k      `lite` and a Gemma-2-like model, by variant and batch size
    python -m benchmarks.memory --systems dinov2-gemma --device cuda --batch-sizes 8 16 32

For each system a table of all variants of `benchmarks.train_step` at the recipe's batch size, and of ours and the
published recipe's step at several. On a CPU it is resident memory, on CUDA what torch allocated. "Over models" leaves
out what was held when the models were ready: what a larger batch multiplies.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks import harness, train_step
from benchmarks.harness import Measurement, Report
from benchmarks.systems import SYSTEMS, recipe_of
from benchmarks.train_step import OURS, PUBLISHED


def main(arguments: Sequence[str] | None = None) -> int:
    parser = harness.argument_parser(__doc__)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=["lite", "gemma-like"])
    parser.add_argument("--data-dir", type=Path, help="caption folder of lite (its recipe's)")
    parser.add_argument(
        "--batch-sizes", type=int, nargs="*", help="besides the recipe's (half and twice as many)"
    )
    parser.add_argument("--variants", nargs="+", choices=list(train_step.VARIANTS), help="only these")
    options = parser.parse_args(arguments)
    device = harness.prepare(options)

    report = Report([], device, options.seed)
    for system in options.systems:
        recipe = recipe_of(system, tiny=options.tiny)
        usual = recipe.batch_size
        others = options.batch_sizes if options.batch_sizes is not None else [usual // 2, usual * 2]
        for batch_size in sorted({usual, *others}):
            by_variant = options.variants or train_step.applicable(system, recipe)
            chosen = by_variant if batch_size == usual else [v for v in by_variant if v in (OURS, PUBLISHED)]
            for variant in chosen:
                child = ["--system", system, "--batch-size", str(batch_size), "--captions", str(batch_size)]
                child += ["--device", options.device, "--seed", str(options.seed), "--peak-of", variant]
                child += ["--data-dir", str(options.data_dir)] if options.data_dir else []
                child += ["--tiny"] if options.tiny else []
                name = f"{system}, batch {batch_size}: {variant}"
                peak = harness.peak_in_child("benchmarks.train_step", child)
                report.measurements.append(Measurement(name, (), batch_size, peak=peak))
            if {OURS, PUBLISHED} <= set(chosen):
                report.add_memory_ratio(
                    *(f"{system}, batch {batch_size}: {variant}" for variant in (OURS, PUBLISHED))
                )
    report.finish(options.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
