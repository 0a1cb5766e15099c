"""What every benchmark here shares: interleaved timing, medians, peak memory, the processor's own peak, tables, JSON.

    options = argument_parser(__doc__).parse_args()
    device = prepare(options)
    variants = [Variant("ours", run_ours, samples=40, tokens=612), Variant("plain", run_plain, samples=40, tokens=612)]
    report = Report(measure(variants, options.repeats, device), device, options.seed)
    report.add_ratio("ours", "plain")
    report.finish(options.json)

A *variant* is one way of doing a fixed piece of work. Variants take turns within a repeat, and a ratio of two speeds
is the median over the ratios within each repeat: what else a machine is busy with then meets both alike. Each variant
runs once unmeasured first. Spread is the interquartile range divided by the median.

Peak memory is that of a process of its own for every variant (`peak_in_child`): memory that one variant
leaves behind would be another's floor.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers

from vlm_bridge.cli.options import quiet_transformers
from vlm_bridge.device import peak_rss_gib, resolve_device, return_freed_memory

GIB = 2**30


@dataclass(frozen=True)
class Variant:
    """One way of doing a piece of work.

    Attributes:
        run: does all of it once; may be called any number of times.
        samples: captions trained, or images encoded, captioned or read, in one call.
        tokens: of these, tokens that are not padding; 0 where there is no text.
        flops: floating-point operations that the work needs (`training_flops`), None where nobody asks.
    """

    name: str
    run: Callable[[], object]
    samples: int
    tokens: int = 0
    flops: float | None = None


class Peak(NamedTuple):
    """Peak memory of a process, in bytes; on CUDA of the tensors torch allocated there, else resident memory.

    Attributes:
        over_models: what was above the memory held when the models were ready and no step had been made.
    """

    absolute: int
    over_models: int


@dataclass(frozen=True)
class Measurement:
    """The seconds of each repeat of a variant, in the order of repeats; none where only memory was measured.

    Attributes:
        cpu_seconds: of all threads of this process, which other work on the machine changes less than the time.
    """

    variant: str
    seconds: tuple[float, ...]
    samples: int
    tokens: int = 0
    flops: float | None = None
    peak: Peak | None = None
    cpu_seconds: tuple[float, ...] = ()

    @property
    def median_seconds(self) -> float:
        return float(np.median(self.seconds))

    @property
    def samples_per_second(self) -> float | None:
        return self.samples / self.median_seconds if self.seconds else None

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens / self.median_seconds if self.seconds and self.tokens else None

    @property
    def spread(self) -> float | None:
        """Interquartile range of the seconds over their median."""
        if not self.seconds:
            return None
        low, high = np.percentile(self.seconds, [25, 75])
        return float((high - low) / self.median_seconds)


# Options and environment.


def argument_parser(description: str | None, *, repeats: int = 7) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    parser.add_argument(
        "--tiny", action="store_true", help="small random models: does it run at all?"
    )
    parser.add_argument(
        "--repeats", type=int, default=repeats, help="measured runs of each variant"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def prepare(options: argparse.Namespace) -> torch.device:
    """Seed, silence libraries, and name the device of a benchmark's options."""
    quiet_transformers()
    torch.manual_seed(options.seed)
    return resolve_device(options.device)


def environment(device: torch.device, seed: int) -> dict[str, Any]:
    """Where and when figures were taken: versions and the class of machine, nothing that names the machine."""
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device.type,
        "seed": seed,
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = {flag for line in lines if line.startswith("flags") for flag in line.split()}
    extensions = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{names[0] if names else platform.machine()} ({' '.join(extensions)})"


# Speed.


def measure(
    variants: Sequence[Variant],
    repeats: int,
    device: torch.device | None = None,
    *,
    say: Callable[[str], object] = lambda line: print(line, file=sys.stderr, flush=True),
) -> list[Measurement]:
    """Time variants in turns: one unmeasured round, then ``repeats`` rounds, every other one in reverse order."""
    seconds: dict[str, list[float]] = {variant.name: [] for variant in variants}
    cpu_seconds: dict[str, list[float]] = {variant.name: [] for variant in variants}
    for repeat in range(-1, repeats):
        for variant in variants if repeat % 2 else reversed(variants):
            started, cpu_started = _now(device), time.process_time()
            variant.run()
            elapsed, cpu = _now(device) - started, time.process_time() - cpu_started
            if repeat >= 0:
                seconds[variant.name].append(elapsed)
                cpu_seconds[variant.name].append(cpu)
            turn = "warm-up" if repeat < 0 else f"repeat {repeat + 1}/{repeats}"
            say(f"{turn}: {variant.name} {elapsed:.3f} s, {cpu:.3f} s of CPU")
    return [
        Measurement(
            v.name, tuple(seconds[v.name]), v.samples, v.tokens, v.flops,
            cpu_seconds=tuple(cpu_seconds[v.name]),
        )
        for v in variants
    ]  # fmt: skip


def _now(device: torch.device | None) -> float:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def matmul_flops_per_second(
    device: torch.device, dtype: torch.dtype, *, tiny: bool = False
) -> float:
    """The fastest matrix product that torch does here, in floating-point operations a second (2 n^3 each).

    Square matrices of several sizes, the best of some repeats each: what a perfect step of large products would reach.
    """
    sizes = (128,) if tiny else (4096, 8192, 16384) if device.type == "cuda" else (1024, 2048)
    best = 0.0
    for size in sizes:
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        for _ in range(6):
            started = _now(device)
            torch.mm(left, right)
            best = max(best, 2 * size**3 / (_now(device) - started))
    return best


def training_flops(
    parameters: int, tokens: int, *, is_trained: bool = False, passes_gradient: bool = True
) -> float:
    """Operations of a training step through matrices of a language model.

    Two per parameter and token for the forward pass, two for the gradient of the activations, and two for that of the
    weights where they are trained (Kaplan et al. 2020, table 1). Attention scores, the bridge and the encoder are left
    out.

    Args:
        parameters: those that multiply: the head's included, the table of input embeddings not.
        tokens: that are not padding.
        passes_gradient: False below the layer where the image enters; nothing passes back through these.
    """
    return 2.0 * parameters * tokens * (1 + passes_gradient + is_trained)


# Memory.


def watch_peak(run: Callable[[], object], device: torch.device, *, times: int = 2) -> Peak:
    """Peak memory of ``times`` calls, in a process that has done nothing else since its models were built."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    else:
        return_freed_memory()  # or a step could use unseen what building the models left free
        before = _status("VmRSS")
        _forget_resident_peak()
    for _ in range(times):
        run()
    after = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")
    return Peak(after, max(after - before, 0))


def peak_in_child(module: str, arguments: Sequence[str]) -> Peak:
    """Run ``python -m module arguments`` and read the peak that it prints as its last line (`print_peak`).

    Raises:
        RuntimeError: it failed; its last lines say why.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(
            f"{module} {' '.join(arguments)}: exit {done.returncode}\n{done.stderr[-2000:]}"
        )
    return Peak(**json.loads(done.stdout.splitlines()[-1]))


def print_peak(peak: Peak) -> None:
    print(json.dumps(peak._asdict()))


def _forget_resident_peak() -> None:
    """Let the kernel count the resident peak anew, so that loading the models is not part of it (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _status(key: str) -> int:
    """Bytes of a line of /proc/self/status. Without Linux, the peak so far.

    Not `ru_maxrss`: across fork and exec a child inherits its parent's.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return int(peak_rss_gib() * GIB)
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


# Results.


@dataclass
class Report:
    """Measurements of one run, ratios between them, and the table and file that show them.

    Attributes:
        matmul_peak: operations a second that matrix products reach here (`matmul_flops_per_second`), in the dtype
            and the run of the measurements; None leaves the column out.
    """

    measurements: list[Measurement]
    device: torch.device
    seed: int = 0
    matmul_peak: float | None = None
    ratios: dict[str, float] = field(default_factory=dict)

    def __getitem__(self, variant: str) -> Measurement:
        return next(m for m in self.measurements if m.variant == variant)

    def add_peak(self, variant: str, peak: Peak) -> None:
        self.measurements = [
            replace(m, peak=peak) if m.variant == variant else m for m in self.measurements
        ]

    def add_ratio(self, fast: str, slow: str, name: str | None = None) -> float:
        """How many times as many samples a second ``fast`` does as ``slow``: the median over repeats."""
        a, b = self[fast], self[slow]
        name, per_sample = name or f"{fast} / {slow}", a.samples / b.samples
        if all(a.cpu_seconds):
            of_cpu = np.array(b.cpu_seconds) / np.array(a.cpu_seconds) * per_sample
            self._add(f"{name}: samples per CPU second", float(np.median(of_cpu)))
        of_repeats = np.array(b.seconds) / np.array(a.seconds) * per_sample
        return self._add(f"{name}: samples/s", float(np.median(of_repeats)))

    def add_memory_ratio(self, small: str, large: str, name: str | None = None) -> None:
        """Peak memory of ``small`` over that of ``large``, absolute and over the models; nothing where not measured."""
        a, b = self[small].peak, self[large].peak
        if a and b:
            name = name or f"{small} / {large}"
            self._add(f"{name}: peak memory", a.absolute / b.absolute)
            self._add(f"{name}: peak memory over models", a.over_models / max(b.over_models, 1))

    def add_peak_share(self, variant: str) -> None:
        if (share := self._share(self[variant])) is not None:
            self._add(f"{variant}: share of matmul peak", share)

    def _add(self, name: str, value: float) -> float:
        self.ratios[name] = value
        return value

    def _share(self, m: Measurement) -> float | None:
        """Operations a second as a share of what matrix products reach."""
        if m.flops is None or not self.matmul_peak or not m.seconds:
            return None
        return m.flops / m.median_seconds / self.matmul_peak

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [
            {
                "variant": m.variant,
                "samples_per_second": m.samples_per_second,
                "tokens_per_second": m.tokens_per_second,
                "peak_bytes": m.peak.absolute if m.peak else None,
                "spread": m.spread,
                "cpu_seconds": list(m.cpu_seconds),
            }
            for m in self.measurements
        ]

    def table(self) -> str:
        """The rows as a Markdown table; columns that no row fills are left out."""
        columns = {
            "variant": [m.variant for m in self.measurements],
            "seconds": [
                _cell((m.seconds and m.median_seconds) or None, ".2f") for m in self.measurements
            ],
            "samples/s": [_cell(m.samples_per_second, ".2f") for m in self.measurements],
            "tokens/s": [_cell(m.tokens_per_second, ".0f") for m in self.measurements],
            "spread": [_cell(m.spread, ".1%") for m in self.measurements],
            "CPU s": [
                _cell(float(np.median(m.cpu_seconds)) if m.cpu_seconds else None, ".2f")
                for m in self.measurements
            ],
            "of matmul peak": [_cell(self._share(m), ".1%") for m in self.measurements],
            "peak GiB": [_cell(m.peak and m.peak.absolute / GIB, ".2f") for m in self.measurements],
            "over models GiB": [
                _cell(m.peak and m.peak.over_models / GIB, ".2f") for m in self.measurements
            ],
        }
        return markdown({name: cells for name, cells in columns.items() if any(cells)})

    def finish(self, json_file: Path | None) -> None:
        """Print environment, table and ratios; write them as JSON where a file is named."""
        facts = environment(self.device, self.seed)
        print(", ".join(f"{key} {value}" for key, value in facts.items()))
        if self.matmul_peak:
            print(f"matrix products: {self.matmul_peak / 1e9:,.0f} GFLOP/s")
        print(f"\n{self.table()}\n")
        for name, value in self.ratios.items():
            print(f"{name:60} {value:.3f}")
        if json_file is not None:
            json_file.parent.mkdir(parents=True, exist_ok=True)
            content = {"rows": self.rows, "ratios": self.ratios, "environment": facts}
            json_file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _cell(value: float | None, format: str) -> str:
    return "" if value is None else f"{value:{format}}"


def markdown(columns: dict[str, list[str]]) -> str:
    """A table of Markdown from columns of cells; the first is left-aligned, figures are right-aligned."""
    widths = [max(len(text) for text in (name, *cells)) for name, cells in columns.items()]

    def line(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        aligned = [first[0].ljust(first[1]), *(text.rjust(width) for text, width in rest)]
        return f"| {' | '.join(aligned)} |"

    rules = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(
        line(cells) for cells in (list(columns), rules, *zip(*columns.values(), strict=True))
    )
