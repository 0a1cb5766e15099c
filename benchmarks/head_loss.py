"""The loss behind a frozen head, forward and backward: ways to compute it.

    python -m benchmarks.head_loss [--shapes 49152x576 256000x2304] [--positions 512] [--json FILE]

For each head (vocabulary x width) and dtype, from the states of some positions to the sum of their
losses and the gradient of the states: all logits in float32 with `F.cross_entropy` (plain); ours,
in chunks; `torch.nn.functional.linear_cross_entropy` where torch has it; and two matrix products
alone, the least that any of them needs. ``--softcap`` turns Gemma 2's final softcap on.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional as F

from benchmarks.harness import Measurement, Report, Variant, argument_parser, measure, prepare
from vlm_bridge.model_architecture.loss import CHUNK_POSITIONS, caption_cross_entropy

SHAPES = ("49152x576", "256000x640", "256000x1152", "256000x2304")
TINY_SHAPES = ("512x32",)
DTYPES = ("bfloat16", "float32")
OURS = "ours"
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def losses_of(weight: torch.Tensor, softcap: float | None) -> dict[str, Loss]:
    """Return every way to compute the loss of a head that works here, by name."""

    def head(hidden: torch.Tensor) -> torch.Tensor:
        logits = hidden @ weight.T
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    def ours(hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return caption_cross_entropy(hidden[None], labels[None], head).total

    def plain(hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(head(hidden).float(), labels, reduction="sum")

    def products_alone(hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            for states in hidden.split(CHUNK_POSITIONS):
                (states @ weight.T) @ weight
        return hidden.sum()

    found: dict[str, Loss] = {OURS: ours, "plain": plain, "products alone": products_alone}
    if hasattr(F, "linear_cross_entropy") and softcap is None:
        found["torch"] = lambda hidden, labels: F.linear_cross_entropy(
            hidden, weight, labels, reduction="sum"
        )
    return found


def variants_of(
    shape: str, dtype: str, options: argparse.Namespace, device: torch.device
) -> list[Variant]:
    """The variants of one head; each call of one computes loss and gradient once."""
    vocabulary, width = map(int, shape.split("x"))
    weight = (torch.randn(vocabulary, width, device=device) * width**-0.5).to(getattr(torch, dtype))
    hidden = torch.randn(options.positions, width, device=device).to(weight.dtype)
    labels = torch.randint(vocabulary, (options.positions,), device=device)

    def step(loss: Loss) -> None:
        (loss(hidden.detach().requires_grad_(), labels) / len(labels)).backward()

    return [
        Variant(
            f"{shape} {dtype} {name}", partial(step, loss), options.positions, options.positions
        )
        for name, loss in losses_of(weight, options.softcap).items()
    ]


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
