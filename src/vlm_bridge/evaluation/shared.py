"""A captioner in several processes, each of which captions its share of the batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

from vlm_bridge.configuration import DecodeSettings
from vlm_bridge.data_pipeline.loader import in_batches
from vlm_bridge.data_pipeline.samples import ImageFile
from vlm_bridge.evaluation.run import Captioned, EvaluableCaptioner
from vlm_bridge.training_strategy.distributed import World


class SharedCaptioner:
    """Return the captions of one process, to the bit, in every process."""

    def __init__(self, captioner: EvaluableCaptioner, world: World):
        self.captioner = captioner
        self.world = world

    def caption(
        self,
        images: Sequence[ImageFile],
        *,
        decode: DecodeSettings,
        batch_size: int,
        progress: Callable[[int], None],
    ) -> list[Captioned]:
        batches = self.world.share(in_batches(images, batch_size))
        results = self.captioner.caption(
            list(chain.from_iterable(batches)),
            decode=decode,
            batch_size=batch_size,
            progress=lambda done: progress(min(done * self.world.size, len(images))),
        )
        return list(chain.from_iterable(self.world.interleave(in_batches(results, batch_size))))
