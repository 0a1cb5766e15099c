"""The health of a training: steps that are no numbers are skipped, and what is frozen is proved unchanged."""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vlm_bridge.errors import TrainingError


@dataclass(frozen=True)
class WatchedStep:
    """What became of one optimiser step, once the device has told.

    Attributes:
        step: as `Progress` counts, the first is 1.
        epoch, step_in_epoch: of the batches that it read, from 0.
        gradient_norm: of all that is trained, before clipping.
        loss_scale: by which float16 gradients were scaled in this step; 1 without.
    """

    step: int
    epoch: int
    step_in_epoch: int
    loss: float
    gradient_norm: float
    loss_scale: float

    @property
    def was_skipped(self) -> bool:
        return not math.isfinite(self.gradient_norm)

    @property
    def overflowed(self) -> bool:
        """Skipped because float16 gradients were scaled too high, which the scaler now mends by halving the scale.

        A loss that is no number itself is nothing the scale could mend, nor are gradients that overflow unscaled.
        """
        return self.was_skipped and math.isfinite(self.loss) and self.loss_scale > 1

    @property
    def cause(self) -> str:
        if self.overflowed:
            return f"float16 overflowed at loss scale {self.loss_scale:g}, which is lowered now"
        return f"loss {self.loss:g}, gradient norm {self.gradient_norm:g}"


class StepGuard:
    """Leaves weights and moments as they are in a step whose loss or gradient is not finite, and counts such steps.

    The decision is made on the device: the fused optimisers of torch take a flag there (``found_inf``) and then update
    nothing, not even their count of steps. A program that asked for the flag would have to wait for the device in
    every step; here it goes on queueing work, and reads the numbers of a step when they have arrived, usually one step
    late. Steps in between are guarded all the same.

    Attributes:
        skipped_in_a_row: the latest steps, as far as they are known; a float16 overflow neither counts nor ends a row.
        gives_up: ``max_skipped`` steps in a row were skipped.
    """

    def __init__(self, max_skipped: int, device: torch.device):
        self.max_skipped = max_skipped
        self.device = device
        self.skipped_in_a_row = 0
        self.gives_up = False
        self._pending: deque[tuple[tuple[int, int, int], torch.Tensor, Any]] = deque()

    @staticmethod
    def seed(loss: torch.Tensor) -> torch.Tensor:
        """What back-propagation of a loss starts from: 1, or NaN where the loss is not finite.

        Not every such loss has such a gradient. With this one it has, on all processes that gradients are shared
        among, and the norm of the gradient alone decides.
        """
        return torch.where(loss.detach().isfinite(), 1.0, torch.nan).to(loss.dtype)

    @staticmethod
    def step(optimizer: torch.optim.Optimizer, gradient_norm: torch.Tensor) -> torch.Tensor:
        """Let a fused optimiser step, unless the norm of its unscaled gradients is not finite.

        `GradScaler.step` does the same with a flag of its own, which does not know of norms that overflow.

        Returns:
            The flag, on the device: 1.0 where the step was skipped, else 0.0.
        """
        found_inf = (~gradient_norm.isfinite()).float()
        optimizer.found_inf = found_inf  # type: ignore[attr-defined]
        try:
            optimizer.step()
        finally:
            del optimizer.found_inf  # type: ignore[attr-defined]
        return found_inf

    def watch(
        self,
        place: tuple[int, int, int],
        loss: torch.Tensor,
        gradient_norm: torch.Tensor,
        loss_scale: torch.Tensor,
    ) -> None:
        """Begin to copy the numbers of a step to the host, for `read`. Its place is step, epoch and step in epoch."""
        numbers = torch.stack([loss.float(), gradient_norm.float(), loss_scale.float()])
        done = None
        if self.device.type == "cuda":
            numbers = numbers.to("cpu", non_blocking=True)
            done = torch.cuda.current_stream(self.device).record_event()
        self._pending.append((place, numbers, done))

    def read(self, *, wait: bool) -> list[WatchedStep]:
        """The steps since the last call whose numbers have arrived; with ``wait``, all of them."""
        arrived = []
        while self._pending and (wait or self._has_arrived(self._pending[0][2])):
            place, numbers, done = self._pending.popleft()
            if done is not None:
                done.synchronize()
            arrived.append(WatchedStep(*place, *numbers.tolist()))
        for watched in arrived:
            if not watched.was_skipped:
                self.skipped_in_a_row = 0
            elif not watched.overflowed:
                self.skipped_in_a_row += 1
                self.gives_up |= self.skipped_in_a_row >= self.max_skipped
        return arrived

    def _has_arrived(self, done: Any) -> bool:
        if done is not None:
            return done.query()
        return self.device.type == "cpu"  # of other devices nobody can ask without waiting


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether every number of some tensors is finite. Waits for the device once."""
    flags = [tensor.detach().isfinite().all() for tensor in tensors]
    return not flags or bool(torch.stack(flags).all())


class FrozenParts:
    """Fingerprints of all that a training must not change: frozen parameters, and buffers that no checkpoint holds.

    They guard against mistakes, not against forgery.
    """

    def __init__(self, model: torch.nn.Module, trained: Mapping[str, Any]):
        self._trained = frozenset(trained)
        self._fingerprints = self._of(model)

    @property
    def names(self) -> list[str]:
        return list(self._fingerprints)

    def check(self, model: torch.nn.Module) -> None:
        """Raises TrainingError for a tensor that is not what it was, by name."""
        now = self._of(model)
        changed = [
            name for name, fingerprint in self._fingerprints.items() if now.get(name) != fingerprint
        ]
        if changed:
            others = f" and {len(changed) - 1} others" if len(changed) > 1 else ""
            raise TrainingError(
                f"{changed[0]}{others} changed while training, though the recipe's trainable leaves it frozen: the "
                "checkpoints hold only what is trained and do not describe this model; please report the recipe"
            )

    def _of(self, model: torch.nn.Module) -> dict[str, bytes]:
        tensors = [*model.named_parameters(), *model.named_buffers()]
        return {name: fingerprint(tensor) for name, tensor in tensors if name not in self._trained}


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def fingerprint(tensor: torch.Tensor) -> bytes:
    """A hash of the type, the shape and every bit of a tensor; of one that is sharded, of its part in this process.

    Off the CPU, bits are not copied: as integers they are summed along rows and along columns, exactly, and the sums
    are hashed. A change would have to keep every one of them to escape.
    """
    tensor = tensor.detach()
    if hasattr(tensor, "to_local"):
        tensor = tensor.to_local()  # type: ignore[operator]
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    bits = tensor.contiguous().view(_INTEGERS[tensor.element_size()])
    rows = bits.reshape(1, -1) if bits.ndim < 2 else bits.flatten(1)
    if bits.device.type == "cpu":
        digest.update(rows.flatten().numpy().data)
    else:
        for dim in (0, 1):
            digest.update(rows.sum(dim, dtype=torch.int64).cpu().numpy().data)
    return digest.digest()
