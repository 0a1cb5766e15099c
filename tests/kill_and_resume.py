"""Kill trainings at random moments, also while they write a checkpoint, and resume them.

    python tests/kill_and_resume.py --kills 100

Every training must end as one that was never killed: checkpoints are compared to the bit. Prints a
line per kill and exits with 1 at a difference. This process imports everything and computes
nothing; each life of a training is a fork of it.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

from pycocoevalcap.bleu import bleu  # noqa: F401  not in every life
from torch.utils.tensorboard import SummaryWriter  # noqa: F401
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer  # noqa: F401

from captioners import places_of_run, tiny_recipe
from drawn_captions import write_drawn_caption_folder
from faulty_disk import FaultyDisk
from same import assert_same_checkpoints
from tiny_models import save_tiny_llama, save_tiny_vit
from vlm_bridge.cli.options import quiet_transformers
from vlm_bridge.configuration import Recipe, override_recipe
from vlm_bridge.training_strategy import checkpoint as checkpoints
from vlm_bridge.training_strategy.resume import AUTO
from vlm_bridge.training_strategy.trainer import train

NUM_WRITES = "num_writes.txt"


def make_recipe(root: Path, name: str) -> Recipe:
    """Dropout, averaged weights, decoding inside epochs, early stopping, checkpoints by steps."""
    recipe = tiny_recipe(
        root / "vit", root / "llama", **places_of_run(root / name, "", root / "captions"),
        learning_rate=1e-2, warmup_steps=3, num_epochs=2, batch_size=4, captions_per_image=2,
        weight_averaging=0.9, monitor="cider", validate_every="5 steps", num_decoded_images=3,
        num_validation_samples=1, save_every="3 steps",
        decode={"num_beams": 1, "max_new_tokens": 4},
    )  # fmt: skip
    return override_recipe(recipe, ["bridge.dropout=0.1", "num_workers=2"])


def prepare(root: Path) -> None:
    """Tiny models and pictures for all trainings."""
    save_tiny_vit(root / "vit")
    save_tiny_llama(root / "llama")
    write_drawn_caption_folder(root / "captions")


def live(recipe: Recipe, dies_at_write: int | None = None) -> None:
    """Train; die at a write below the folder of checkpoints."""
    folder = Path(recipe.checkpoint_dir)
    with FaultyDisk(folder, dies_at_write, "kill").plugged_in() as disk:
        train(recipe, resume=AUTO)
    (folder.parent / NUM_WRITES).write_text(str(len(disk.operations)), encoding="utf-8")


def compare(root: Path, name: str) -> None:
    """Raise AssertionError where a finished training is not the one that was never killed."""
    for file in (checkpoints.LATEST, checkpoints.BEST, checkpoints.BEST_WEIGHTS):
        assert_same_checkpoints(*(root / run / "checkpoints" / file for run in ("whole", name)))


def start(work: Callable[..., None], *arguments: object) -> int:
    """Do something in a fork of this process; its id."""
    sys.stdout.flush()
    if child := os.fork():
        return child
    try:
        work(*arguments)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def end_of(child: int) -> bool:
    """Wait for a fork: True where it was killed. A failure ends this program."""
    _, status = os.waitpid(child, 0)
    if status not in (0, signal.SIGKILL):
        sys.exit(f"a training failed (status {status})")
    return status != 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, help="an empty folder (default: a temporary one)")
    options = parser.parse_args()
    root = options.folder or Path(tempfile.mkdtemp(prefix="kill-and-resume-"))
    moments = random.Random(options.seed)

    quiet_transformers()
    end_of(start(prepare, root))
    (root / "whole").mkdir()
    started = time.perf_counter()
    end_of(start(live, make_recipe(root, "whole")))
    seconds = time.perf_counter() - started
    num_writes = int((root / "whole" / NUM_WRITES).read_text(encoding="utf-8"))
    print(f"a training takes {seconds:.1f} s and {num_writes} writes, syncs and renames")

    kills = number = 0
    while kills < options.kills:
        number += 1
        recipe = make_recipe(root, name := f"killed-{number}")
        (root / name).mkdir()
        was_killed = True
        while was_killed:
            in_write = kills < options.kills and moments.random() < 0.5
            child = start(live, recipe, moments.randrange(num_writes) if in_write else None)
            if kills < options.kills and not in_write:
                time.sleep(moments.uniform(0, seconds))
                os.kill(child, signal.SIGKILL)
            if was_killed := end_of(child):
                kills += 1
                print(f"kill {kills}: {name}, {'in a write' if in_write else 'at some moment'}")
        end_of(start(compare, root, name))
        print(f"{name} is the training that was never killed, to the bit")
    print(f"{kills} kills in {number} trainings: none left a trace")


if __name__ == "__main__":
    main()
