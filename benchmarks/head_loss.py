"""The loss behind a frozen head, forward and backward: ways to compute it, and sizes of its chunks.

    python -m benchmarks.head_loss [--shapes 49152x576 256000x2304] [--positions 512] [--chunk-mib 32 128] [--json FILE]

For each head (vocabulary x width) and dtype, from the states of some positions to the sum of their losses and the
gradient of the states: all logits in float32 with `F.cross_entropy` (plain); chunk by chunk with autograd in each
(autograd); ours, which writes the gradient over the logits; `torch.nn.functional.linear_cross_entropy` and Liger
Kernel where they work; and two matrix products alone, which none of them can be quicker than. Sizes of chunks and
blocks other than ours are variants of ours. Gemma 2's final softcap is on where ``--softcap`` is given.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch.nn import functional as F

from benchmarks.harness import Measurement, Report, Variant, argument_parser, measure, prepare
from vlm_bridge.errors import ConfigurationError
from vlm_bridge.model_architecture import loss
from vlm_bridge.model_architecture.loss import Kernel, LinearHead, frozen_head_cross_entropy
from vlm_bridge.model_architecture.loss_kernels import choose_kernel

SHAPES = ("49152x576", "256000x640", "256000x1152", "256000x2304")
TINY_SHAPES = ("512x32",)
DTYPES = ("bfloat16", "float32")
OURS = "ours"
MIB = 2**20


def plain(
    hidden: torch.Tensor, labels: torch.Tensor, head: LinearHead
) -> tuple[torch.Tensor, None]:
    """As users write it."""
    return F.cross_entropy(head(hidden).float(), labels, reduction="sum"), None


def by_autograd(
    hidden: torch.Tensor, labels: torch.Tensor, head: LinearHead
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ours for heads of any kind: a lambda hides that this one is a matrix."""
    return frozen_head_cross_entropy(hidden, labels, lambda states: head(states))


def products_alone(
    hidden: torch.Tensor, labels: torch.Tensor, head: LinearHead
) -> tuple[torch.Tensor, None]:
    """No loss at all, in chunks of ours."""
    with torch.no_grad():
        size = loss.linear_head_chunk(len(hidden), len(head.weight), hidden)
        for states in hidden.split(size):
            (states @ head.weight.T) @ head.weight
    return hidden.sum(), None


@contextmanager
def sizes(chunk_mib: int | None = None, block_mib: int | None = None) -> Iterator[None]:
    """Other sizes of chunks or blocks than ours, for every device."""
    usual = loss.CHUNK_BYTES, loss.BLOCK_BYTES, loss.CHUNK_ROWS_ON_CPU
    if chunk_mib is not None:
        loss.CHUNK_ROWS_ON_CPU = chunk_mib * MIB
        loss.CHUNK_BYTES = dict.fromkeys(("cpu", "cuda"), chunk_mib * MIB)
    if block_mib is not None:
        loss.BLOCK_BYTES = dict.fromkeys(("cpu", "cuda"), block_mib * MIB)
    try:
        yield
    finally:
        loss.CHUNK_BYTES, loss.BLOCK_BYTES, loss.CHUNK_ROWS_ON_CPU = usual


def kernels_that_work(head: LinearHead, hidden: torch.Tensor) -> dict[str, Kernel]:
    """Every way to compute the loss of a head, by name; what does not work here is said and left out."""
    found: dict[str, Kernel] = {
        OURS: frozen_head_cross_entropy,
        "plain": plain,
        "autograd": by_autograd,
        "products alone": products_alone,
    }
    for name in ("torch", "liger"):
        try:
            if kernel := choose_kernel(name, head, hidden.device, hidden.dtype):
                found[name] = kernel
        except ConfigurationError as reason:
            print(f"left out: {reason}")
    return found


def variants_of(
    shape: str, dtype: str, options: argparse.Namespace, device: torch.device
) -> list[Variant]:
    """The variants of one head; each call of one computes loss and gradient once."""
    vocabulary, width = map(int, shape.split("x"))
    weight = (torch.randn(vocabulary, width, device=device) * width**-0.5).to(getattr(torch, dtype))
    head = LinearHead(weight, softcap=options.softcap)
    hidden = torch.randn(options.positions, width, device=device).to(weight.dtype)
    labels = torch.randint(vocabulary, (options.positions,), device=device)

    def step(kernel: Kernel, **other_sizes: int) -> None:
        states = hidden.detach().requires_grad_()
        with sizes(**other_sizes):
            total, _ = kernel(states, labels, head)
            (total / len(labels)).backward()

    def variant(name: str, run: Callable[[], None]) -> Variant:
        return Variant(f"{shape} {dtype} {name}", run, options.positions, options.positions)

    found = [
        variant(name, partial(step, kernel))
        for name, kernel in kernels_that_work(head, hidden).items()
    ]
    for name, values in (("chunk", options.chunk_mib), ("block", options.block_mib)):
        found += [
            variant(
                f"{OURS}, {name}s of {mib} MiB",
                partial(step, frozen_head_cross_entropy, **{f"{name}_mib": mib}),
            )
            for mib in values
        ]
    return found


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--shapes", nargs="+", metavar="VxH", help=f"vocabulary x width: {', '.join(SHAPES)}"
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument(
        "--positions", type=int, default=512, help="supervised positions of a batch"
    )
    parser.add_argument("--softcap", type=float)
    parser.add_argument("--chunk-mib", type=int, nargs="*", default=[], help="other chunks to try")
    parser.add_argument("--block-mib", type=int, nargs="*", default=[], help="other blocks to try")
    options = parser.parse_args()
    device = prepare(options)
    shapes = options.shapes or (TINY_SHAPES if options.tiny else SHAPES)
    measurements: list[Measurement] = []
    for dtype in options.dtypes:
        for shape in shapes:  # one head in memory at a time
            measurements += measure(
                variants_of(shape, dtype, options, device), options.repeats, device
            )
    report = Report(measurements, device, options.seed)
    for m in measurements:
        shape, dtype, name = m.variant.split(" ", 2)
        if name != OURS:
            report.add_ratio(f"{shape} {dtype} {OURS}", m.variant)
    report.finish(options.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
