"""A captioner in several processes: each does its share of the pictures, and all of them get everything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

from vlm_bridge.captioning.pipeline import Captioner
from vlm_bridge.configuration import DecodeSettings
from vlm_bridge.data_pipeline.caption_folder import CaptionedImage
from vlm_bridge.data_pipeline.loader import in_batches
from vlm_bridge.data_pipeline.tar_picture import PictureFile
from vlm_bridge.evaluation.run import Captioned, EvaluableCaptioner, Validated
from vlm_bridge.training_strategy.distributed import World


class SharedCaptioner:
    """What its captioner gives, to the bit, from the processes of a world that share the batches of one.

    The validation of a published captioner is not shared: every process does all of it.
    """

    def __init__(self, captioner: EvaluableCaptioner, world: World):
        self.captioner = captioner
        self.world = world

    def caption(
        self,
        images: Sequence[PictureFile],
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

    def validate(self, images: Sequence[CaptionedImage], *, batch_size: int) -> Validated:
        if isinstance(self.captioner, Captioner):
            return self.captioner.validate(images, batch_size=batch_size, world=self.world)
        return self.captioner.validate(images, batch_size=batch_size)
