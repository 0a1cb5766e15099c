"""Hostile input by the thousand: valid files, mutated by a seeded generator, given to every reader.

``python fuzzing.py READER COUNT SEED FOLDER [CORPUS]`` is a process of its own. A reader may take an
input, skip parts of it, or refuse it by a VLMBridgeError. It must not raise anything else, compute for
more than `MAX_SECONDS`, take more than `MAX_BYTES` beside what it started with, nor open anything
outside its own folder. The inputs that did are kept in ``FOLDER/found``.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tarfile
import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from image_files import FILES
from vlm_bridge.configuration import Recipe, load_recipe
from vlm_bridge.data_pipeline.caption_folder import CaptionFolder
from vlm_bridge.data_pipeline.captions import MAX_CAPTION_CHARACTERS, clean_caption, strip_tags
from vlm_bridge.data_pipeline.explore import count_tags
from vlm_bridge.data_pipeline.images import MAX_PIXELS, check_image, decode_image, image_size
from vlm_bridge.data_pipeline.samples import Skipped
from vlm_bridge.data_pipeline.shards import ShardFolder
from vlm_bridge.data_pipeline.sources import iter_images
from vlm_bridge.data_pipeline.sources.groundcap import GroundCap
from vlm_bridge.data_pipeline.sources.local import LocalFolder
from vlm_bridge.data_pipeline.transform import preview
from vlm_bridge.errors import VLMBridgeError

MAX_SECONDS = 5  # of the processor, not of the clock: other programs run beside a test
MAX_BYTES = 2**30
REPOSITORY = Path(__file__).resolve().parent.parent


class Hang(BaseException):
    """Raised by the alarm inside a reader that computes for too long."""


@dataclass
class Reader:
    """A reader under test, valid inputs, what mutations insert, and what restores checksums."""

    read: Callable[[bytes, Path], object]
    seeds: Callable[[], list[bytes]]
    words: Iterable[bytes] = ()
    mend: Callable[[bytes], bytes] | None = None  # half of the inputs get past checksums


NUMBERS = [
    b"\0" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x80\0\0\0", b"\0\0\0\x01", b"\xff\xff",
]  # fmt: skip
TEXTS = [
    b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\\ud800", b"\r", b"\n", b"\t", b'"', b"'", b"\\",
    b"<b>", b"&amp;", b" " * 50, "\u202e\u0645\u0631\u062d".encode(), "\U0001f469\u200d\U0001f680".encode(),
    b"../secret.jpg", b"/etc/passwd", b"images/link.jpg", b"images/../../secret.jpg", b"C:\\x.jpg", b"9" * 5000,
    b"-1", b"1e999", b"NaN", b"null", b"[]", b"{}", b"[" * 2000, b'{"a":' * 2000, b"x" * 300, b"word " * 3000,
]  # fmt: skip


def mutated(rng: random.Random, seeds: list[bytes], words: list[bytes]) -> bytes:
    """A valid input with one to eight flips, cuts, copies, splices, insertions, extreme numbers."""
    content = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at = rng.randrange(len(content) + 1)
        length = min(rng.choice((1, 2, 4, 16, 100, 1000)), len(content) - at)
        match rng.randrange(8):
            case 0 if content:
                content[at % len(content)] ^= 1 << rng.randrange(8)
            case 1:
                content[at : at + length] = rng.randbytes(length)
            case 2:
                del content[at : at + length]
            case 3:
                del content[at:]
            case 4:
                content[at:at] = content[at : at + length] * rng.choice((1, 2, 50))
            case 5:
                other = rng.choice(seeds)
                start = rng.randrange(len(other) + 1)
                content[at : at + length] = other[start : start + 2 * length]
            case 6:
                number = rng.choice(NUMBERS)
                content[at : at + len(number)] = number
            case _:
                content[at:at] = rng.choice(words + TEXTS)
    return bytes(content)


# Each reader gets its input in a folder with images/{a.jpg,b.png,link.jpg}; the link leads out.


def decode_all(images: Iterable[Any]) -> None:
    for image in images:
        if image is not None:
            with contextlib.suppress(VLMBridgeError):
                decode_image(image)


def read_image(content: bytes, folder: Path) -> None:
    (folder / "x.jpg").write_bytes(content)
    for look in (image_size, check_image):
        with contextlib.suppress(VLMBridgeError):
            look(folder / "x.jpg")
    decoded = decode_image(content).image
    assert decoded.mode == "RGB" and decoded.width * decoded.height <= MAX_PIXELS


def read_caption_folder(content: bytes, folder: Path) -> None:
    manifest = {"format": "vlm-bridge caption folder", "format_version": 1, "fingerprint": "x"}
    manifest["counts"] = {"train": {"images": 2}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    if not (folder / "train").is_dir():
        shutil.copytree(folder / "images", folder / "train" / "images", symlinks=True)
    (folder / "train" / "captions.jsonl").write_bytes(content)
    bad = Skipped("lines")
    images = CaptionFolder.open(folder).split("train", bad)
    assert len(bad) + sum(len(image.captions) for image in images) == bad.total
    assert all(image.path.is_file() and image.captions for image in images[:50])
    bad.check(0.01)


def read_local(suffix: str) -> Callable[[bytes, Path], None]:
    def read(content: bytes, folder: Path) -> None:
        captions = folder / f"captions.{suffix}"
        captions.write_bytes(content)
        source = LocalFolder(folder, captions)
        for item in source.items():
            if isinstance(item.image, Path):
                assert item.image.resolve().is_relative_to(folder.resolve()), item.image
        preview(source)

    return read


def read_tags(content: bytes, folder: Path) -> None:
    caption = content.decode(errors="replace")[:MAX_CAPTION_CHARACTERS]
    plain = strip_tags(caption)
    assert strip_tags(plain) == plain
    for style in ("raw", "sentence"):
        cleaned = clean_caption(plain, style)
        assert clean_caption(cleaned, style) == cleaned and "\n" not in cleaned
    count_tags([caption])


def read_recipe(content: bytes, folder: Path) -> None:
    (folder / "recipe.yaml").write_bytes(content)
    load_recipe(folder / "recipe.yaml")


def read_checkpoint(content: bytes, folder: Path) -> None:
    from vlm_bridge.training_strategy.checkpoint import load_checkpoint, recipe_of

    (folder / "best_model.pth").write_bytes(content)
    # Not to build: that reads frozen parts from where a recipe names them.
    recipe_of(load_checkpoint(folder / "best_model.pth"), folder, to_build=False)


def read_parquet(content: bytes, folder: Path) -> None:
    (folder / "train-0.parquet").write_bytes(content)
    with contextlib.suppress(VLMBridgeError):
        decode_all(iter_images(LocalFolder(folder).items()))
    source = GroundCap(folder)
    source.facts()
    decode_all(iter_images(source.items()))


def read_shards(content: bytes, folder: Path) -> None:
    tar = folder / "shards" / "train" / "00000.tar"
    tar.parent.mkdir(parents=True, exist_ok=True)
    tar.write_bytes(content)
    bad = Skipped("samples")
    images = ShardFolder.open(folder / "shards").split("train", bad)
    bad.check(0.5)  # one of three is a link from the start
    decode_all(image.path for image in images)
    assert all(image.captions for image in images)


# Valid inputs.

NAMES = ("images/a.jpg", "images/b.png")


def image_seeds() -> list[bytes]:
    return [make() for make in FILES.values()]


def mend_png(content: bytes) -> bytes:
    """The right checksum behind every chunk of a PNG."""
    if content[:8] != b"\x89PNG\r\n\x1a\n":
        return content
    parts, at = [content[:8]], 8
    while at + 12 <= len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        body = content[at + 4 : at + 8 + length]
        parts.append(content[at : at + 4] + body + struct.pack(">I", zlib.crc32(body)))
        at += 12 + length
    return b"".join(parts) + content[at:]


def json_lines(records: Iterable[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def caption_folder_seeds() -> list[bytes]:
    orders = [NAMES * 20, [name for name in NAMES for _ in "x" * 10]]
    return [
        json_lines(
            {"image_path": name, "caption": f"A caption, number {n}.", "original_id": name}
            for n, name in enumerate(order)
        )
        for order in orders
    ]


def table(separator: str, *columns: str) -> bytes:
    rows = [columns, *((name, f"Caption {n}", "train") for n in range(20) for name in NAMES)]
    return "".join(separator.join(row[: len(columns) or 2]) + "\n" for row in rows if row).encode()


HEADER = ("image", "caption", "split")


def jsonl_seeds() -> list[bytes]:
    flat = [{"file_name": name, "text": "A dog.", "split": "val"} for name in NAMES * 10]
    return [json_lines(flat), json_lines({"image": n, "captions": ["A.", "B."]} for n in NAMES)]


def json_seeds() -> list[bytes]:
    answers = [{"from": "human", "value": "Describe"}, {"from": "gpt", "value": "A dog."}]
    images = [{"id": n, "file_name": name} for n, name in enumerate(NAMES)]
    annotations = [{"id": n, "image_id": n, "caption": "A dog."} for n in range(3)]
    of_karpathy = [{"filename": n, "split": "val", "sentences": [{"raw": "A dog."}]} for n in NAMES]
    documents = [
        [{"image": name, "caption": ["A.", "B."], "split": "val"} for name in NAMES],
        [{"image": name, "conversations": answers} for name in NAMES],
        {"images": images, "annotations": annotations},
        {"dataset": "mine", "images": of_karpathy},
    ]
    return [json.dumps(document).encode() for document in documents]


def tag_seeds() -> list[bytes]:
    return [
        b'<gdo class="person" person-0>The man</gdo> <gda class="run" person-0>runs</gda> here.',
        b"&lt;gdo class='dog' dog-0&gt;A dog&lt;/gdo&gt; &amp;amp; a cat's \"``toy''\" ... !",
        "Ein Hund \u2013 \u201eBello\u201c \u2013 l\u00e4uft ( schnell ) .".encode(),
    ]


def recipe_seeds() -> list[bytes]:
    return [path.read_bytes() for path in sorted((REPOSITORY / "config").glob("*.yaml"))]


def checkpoint_seeds() -> list[bytes]:
    import torch

    from vlm_bridge.formats.dinov2_gemma import ORIGINAL_NAMES

    weights = {"bridge.queries": torch.zeros(3, 4), "bridge.norm.weight": torch.ones(4).bfloat16()}
    optimizer = {"state": {0: {"step": torch.zeros(())}}}
    of_ours = {
        "format": "vlm-bridge checkpoint",
        "format_version": 1,
        "versions": {"torch": "2"},
        "recipe": Recipe().to_dict(),
        "sizes": {"vision_encoder.embed_dim": 4},
        "weights": weights,
        "training": {"progress": {"step": 3}, "optimizer": optimizer},
    }
    original = {name: torch.zeros(4, 4) for name in ORIGINAL_NAMES.values()}
    saved = []
    for content in (of_ours, {"model_state_dict": original, "config": {"seed": 0}}):
        file = io.BytesIO()
        torch.save(content, file)
        saved.append(file.getvalue())
    return saved


def parquet_seeds() -> list[bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    image = {"bytes": FILES["jpeg"](), "path": "a.jpg"}
    common = {"image": image, "detections": [], "caption": "A dog.", "human_annotated": True}
    rows = pa.Table.from_pylist([{"id": f"tt{n:07}_{n}", **common} for n in range(6)])
    saved = []
    for options in ({}, {"compression": "none", "use_dictionary": False}, {"row_group_size": 2}):
        file = io.BytesIO()
        pq.write_table(rows, file, **options)
        saved.append(file.getvalue())
    return saved


def tar_seeds() -> list[bytes]:
    metadata = b'{"status": "success", "url": "x", "caption": "A dog."}'
    members = {"jpg": FILES["jpeg"](), "txt": b"A dog.", "json": metadata}
    saved = []
    for format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=format) as tar:
            for key in ("000000000", "k" * 120 if format != tarfile.USTAR_FORMAT else "1"):
                for extension, content in members.items():
                    member = tarfile.TarInfo(f"{key}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
            link = tarfile.TarInfo("1.jpg")
            link.type, link.linkname = tarfile.SYMTYPE, "../secret.jpg"
            tar.addfile(link)
        saved.append(file.getvalue().rstrip(b"\0") + bytes(1024 + 512))
    return saved


def mend_tar(content: bytes) -> bytes:
    """The right checksum in every block that looks like a header."""
    blocks = [bytearray(content[at : at + 512]) for at in range(0, len(content), 512)]
    for block in blocks:
        if len(block) == 512 and block[257:262] == b"ustar":
            block[148:156] = b" " * 8
            block[148:156] = b"%06o\0 " % sum(block)
    return b"".join(blocks)


TAG_WORDS = b"<gdo|</gdo>|<gd|&amp;|&lt;|&#38;|&#x3c;|>|class=| \"|person-0|n't".split(b"|")
LAUGHS = [b"%c: &%c [%s]\n" % (c, c, b",".join([b"*%c" % (c - 1)] * 9)) for c in range(98, 107)]
YAML_WORDS = [
    b"\na: &a [1, 2]\nb: *a\n", b"\n<<: *a\n", b"&a", b"*a", b"!!python/object/apply:os.system [ls]",
    b"!!binary x", b"!!timestamp 2001-99-99", b"? ", b"0x", b"1:99:99", b".inf", b"~", b"- ", b": ", b"{",
    b"[", b"|\n  ", b"'", b"bridge: ", b"\n" + b"".join(LAUGHS),
]  # fmt: skip
PICKLE_WORDS = [
    b"cposix\nsystem\n(Vtouch ../touched\ntR.", b"cbuiltins\neval\n(V1\ntR", b"\x8a\xff", b"\x8d" + b"\xff" * 8,
    b"(", b"t", b"R", b"ctorch._utils\n_rebuild_tensor_v2\n", b"cbuiltins\nbytearray\n(L99999999999L\ntR",
    b"ccollections\nOrderedDict\n", b"2" * 40,
]  # fmt: skip
TAR_WORDS = [
    b"../secret.jpg", b"00000000000", b"77777777777", b"\x80" + bytes(10) + b"\x7f", b"\xff" * 12, b"ustar",
    b"30 path=../../secret.jpg\n",
]  # fmt: skip
READERS = {
    "picture": Reader(read_image, image_seeds, mend=mend_png),
    "caption-folder": Reader(read_caption_folder, caption_folder_seeds),
    "jsonl": Reader(read_local("jsonl"), jsonl_seeds),
    "csv": Reader(read_local("csv"), lambda: [table(",", *HEADER), table(";", *HEADER)]),
    "tsv": Reader(read_local("tsv"), lambda: [table("\t", *HEADER), table("\t")]),
    "json": Reader(read_local("json"), json_seeds),
    "tags": Reader(read_tags, tag_seeds, TAG_WORDS),
    "recipe": Reader(read_recipe, recipe_seeds, YAML_WORDS),
    "checkpoint": Reader(read_checkpoint, checkpoint_seeds, PICKLE_WORDS),
    "parquet": Reader(read_parquet, parquet_seeds),
    "shards": Reader(read_shards, tar_seeds, TAR_WORDS, mend=mend_tar),
}


# The process.


class Watch:
    """Notes every file that is opened, changed or removed outside ``folder`` while it is on."""

    ALLOWED = (  # modules that are imported late
        *(sys.prefix, sys.base_prefix, str(REPOSITORY)),
        *("/proc/self", "/usr/lib", "/usr/share", "/dev/null"),
    )
    EVENTS = frozenset({
        "open", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.listdir",
        "os.scandir", "os.truncate", "os.chmod", "shutil.rmtree",
    })  # fmt: skip
    FORBIDDEN = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "socket.connect")

    def __init__(self, folder: Path):
        self.folder = folder.resolve()
        self.is_on = False
        self.seen: list[str] = []
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.is_on and event in self.FORBIDDEN:
            self.seen.append(f"{event} {arguments}")
        elif self.is_on and event in self.EVENTS and not isinstance(arguments[0], int):
            path = os.path.realpath(os.fsdecode(arguments[0] or "."))
            if not Path(path).is_relative_to(self.folder) and not path.startswith(self.ALLOWED):
                self.seen.append(f"{event} {path}")


def outcome(reader: Reader, content: bytes, folder: Path, watch: Watch) -> tuple[str, str]:
    """("taken" or "refused", "") or ("found", what a reader did that it must not)."""
    watch.seen.clear()
    started = time.process_time()
    signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
    watch.is_on = True
    kind, problem = "taken", ""
    try:
        reader.read(content, folder)
    except VLMBridgeError as error:
        kind = "refused"
        if isinstance(error.__cause__, MemoryError) or "memory" in repr(error.__cause__):
            problem = "memory"
        elif "\n" in str(error) or len(str(error)) > 5000:
            problem = f"a message of {len(str(error))} characters or several lines"
    except MemoryError:
        problem = "memory"
    except Hang:
        problem = "hang"
    except Exception as error:
        problem = f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        watch.is_on = False
        signal.setitimer(signal.ITIMER_PROF, 0)
    if not problem and time.process_time() - started > MAX_SECONDS:
        problem = "hang"
    if watch.seen:
        problem = f"outside its folder: {watch.seen[0]}"
    return ("found", problem) if problem else (kind, "")


def prepared(folder: Path) -> Path:
    """The folder of a reader: images, a link that leads out, and beside it what it must not read."""
    inner = folder / "inner"
    (inner / "images").mkdir(parents=True, exist_ok=True)
    (folder / "secret.jpg").write_bytes(FILES["jpeg"]())
    (inner / "images" / "a.jpg").write_bytes(FILES["jpeg"]())
    (inner / "images" / "b.png").write_bytes(FILES["png"]())
    (inner / "images" / "link.jpg").symlink_to(folder / "secret.jpg")
    return inner


def main(name: str, count: int, seed: int, folder: Path, corpus: Path) -> dict[str, Any]:
    """Give a reader the corpus and ``count`` mutations, and report."""
    reader, inner, watch = READERS[name], prepared(folder), Watch(folder / "inner")
    seeds, rng = reader.seeds(), random.Random(f"{name} {seed}")

    def alarm(*_: object) -> None:
        raise Hang

    def inputs() -> Iterable[bytes]:
        for path in sorted(corpus.iterdir()) if corpus.is_dir() else ():
            yield path.read_bytes()
        for _ in range(count):
            content = mutated(rng, seeds, [*reader.words])
            yield reader.mend(content) if reader.mend and rng.random() < 0.5 else content

    signal.signal(signal.SIGPROF, alarm)
    with contextlib.suppress(VLMBridgeError):
        reader.read(seeds[0], inner)  # imports whatever it needs
    now = int(re.findall(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[0]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (now + MAX_BYTES, now + MAX_BYTES))
    report: dict[str, Any] = {"taken": 0, "refused": 0, "found": []}
    for content in inputs():
        (folder / "current").write_bytes(content)  # what is left of it when the process dies
        kind, problem = outcome(reader, content, inner, watch)
        if kind != "found":
            report[kind] += 1
            continue
        (folder / "found").mkdir(exist_ok=True)
        path = folder / "found" / f"{name}-{zlib.crc32(content):08x}"
        path.write_bytes(content)
        report["found"].append([str(path), problem])
    names = {path.name for path in folder.iterdir()} - {"found"}
    report["nothing_beside"] = names == {"current", "inner", "secret.jpg"}
    return report


if __name__ == "__main__":
    name, count, seed, folder, corpus = sys.argv[1:]
    print(json.dumps(main(name, int(count), int(seed), Path(folder), Path(corpus))))
