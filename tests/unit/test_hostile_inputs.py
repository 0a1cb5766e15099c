"""Mutated files, and every case that was found once: no crash, no hang, no gigabyte, no way out.

A reader takes an input, skips parts, or refuses it in one line. The input of a failure is left in
its temporary folder. `pytest --fuzz 10000 tests/unit/test_hostile_inputs.py` tries more of them.
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
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from image_files import FILES
from vlm_bridge.configuration import load_recipe
from vlm_bridge.data_pipeline import captions
from vlm_bridge.data_pipeline.caption_folder import CaptionFolder
from vlm_bridge.data_pipeline.images import MAX_PIXELS, check_image, image_size, open_image
from vlm_bridge.data_pipeline.samples import Skipped
from vlm_bridge.data_pipeline.shards import ShardFolder
from vlm_bridge.data_pipeline.sources import iter_images
from vlm_bridge.data_pipeline.sources.groundcap import GroundCap
from vlm_bridge.data_pipeline.sources.local import LocalFolder
from vlm_bridge.data_pipeline.transform import preview
from vlm_bridge.errors import VLMBridgeError

MAX_SECONDS = 5  # of the processor, not of the clock: other programs run beside a test
MAX_BYTES = 2**30
REPOSITORY = Path(__file__).resolve().parents[2]
CORPUS = REPOSITORY / "tests" / "corpus"
NAMES = ("images/a.jpg", "images/b.png")
ANYTHING = [
    b"\0" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x80\0\0\0", b"\0\0\0\x01",
    b"\xff\xfe", b"\xed\xa0\x80", b"\\ud800", b"\r", b"\n", b"\t", b'"', b"'", b"\\", b"<b>", b"&amp;", b" " * 50,
    "\u202e\u0645\u0631\u062d".encode(), b"../secret.jpg", b"/etc/passwd", b"images/link.jpg", b"C:\\x.jpg",
    b"9" * 5000, b"-1", b"1e999", b"NaN", b"null", b"[]", b"{}", b"[" * 2000, b'{"a":' * 2000, b"word " * 3000,
]  # fmt: skip


def mutated(rng: random.Random, seeds: list[bytes], words: list[bytes]) -> bytes:
    """A valid input with one to eight flips, cuts, copies, splices or insertions."""
    content = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at = rng.randrange(len(content) + 1)
        length = min(rng.choice((1, 2, 4, 16, 100, 1000)), len(content) - at)
        word = rng.choice(words)
        other = rng.choice(seeds)
        start = rng.randrange(len(other) + 1)
        match rng.randrange(7):
            case 0 if content:
                content[at % len(content)] ^= 1 << rng.randrange(8)
            case 1:
                content[at : at + length] = rng.randbytes(length)
            case 2:
                del content[at : at + length]
            case 3:
                content[at:at] = content[at : at + length] * rng.choice((1, 2, 50))
            case 4:
                content[at : at + length] = other[start : start + 2 * length]
            case 5:
                content[at : at + len(word)] = word
            case _:
                content[at:at] = word
    return bytes(content)


# Each reader gets its input in a folder with images/{a.jpg,b.png,link.jpg}; the link leads out.
def decode_all(images: Iterable[Any]) -> None:
    for image in filter(None, images):
        with contextlib.suppress(VLMBridgeError):
            open_image(image)


def read_image(content: bytes, folder: Path) -> None:
    (folder / "x.jpg").write_bytes(content)
    for look in (image_size, check_image):
        with contextlib.suppress(VLMBridgeError):
            look(folder / "x.jpg")
    decoded = open_image(content)
    assert decoded.mode == "RGB" and decoded.width * decoded.height <= MAX_PIXELS


def read_caption_folder(content: bytes, folder: Path) -> None:
    manifest = {"format": "vlm-bridge caption folder", "format_version": 1, "fingerprint": "x"}
    manifest["counts"] = {"train": {"images": 2}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    if not (folder / "train").is_dir():
        shutil.copytree(folder / "images", folder / "train" / "images", symlinks=True)
    (folder / "train" / "captions.jsonl").write_bytes(content)
    skipped = Skipped("lines")
    images = CaptionFolder.open(folder).split("train", skipped)
    assert len(skipped) + sum(len(image.captions) for image in images) == skipped.total
    assert all(image.path.is_file() and image.captions for image in images[:50])
    skipped.check(0.01)


def read_local(suffix: str) -> Callable[[bytes, Path], None]:
    def read(content: bytes, folder: Path) -> None:
        path = folder / f"captions.{suffix}"
        path.write_bytes(content)
        source = LocalFolder(folder, path)
        for item in source.items():
            if isinstance(item.image, Path):
                assert item.image.resolve().is_relative_to(folder.resolve()), item.image
        preview(source)

    return read


def read_tags(content: bytes, folder: Path) -> None:
    caption = content.decode(errors="replace")[: captions.MAX_CAPTION_CHARACTERS]
    plain = captions.strip_tags(caption)
    assert captions.strip_tags(plain) == plain
    for style in ("raw", "sentence"):
        cleaned = captions.clean_caption(plain, style)
        assert captions.clean_caption(cleaned, style) == cleaned and "\n" not in cleaned


def read_recipe(content: bytes, folder: Path) -> None:
    (folder / "recipe.yaml").write_bytes(content)
    load_recipe(folder / "recipe.yaml")


def read_parquet(content: bytes, folder: Path) -> None:
    (folder / "train-0.parquet").write_bytes(content)
    with contextlib.suppress(VLMBridgeError):
        decode_all(iter_images(LocalFolder(folder).items()))
    decode_all(iter_images(GroundCap(folder).items()))


def read_shards(content: bytes, folder: Path) -> None:
    (folder / "shards" / "train").mkdir(parents=True, exist_ok=True)
    (folder / "shards" / "train" / "00000.tar").write_bytes(content)
    skipped = Skipped("samples")
    images = ShardFolder.open(folder / "shards").split("train", skipped)
    skipped.check(0.5)  # one of three is a link from the start
    decode_all(image.path for image in images)
    assert all(image.captions for image in images)


def json_lines(*records: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def table(separator: str, *columns: str) -> bytes:
    rows = [columns, *((name, f"Caption {n}", "train") for n in range(20) for name in NAMES)]
    return "".join(separator.join(row[: len(columns) or 2]) + "\n" for row in rows if row).encode()


def parquet_seeds() -> list[bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    image = {"bytes": FILES["jpeg"](), "path": "a.jpg"}
    common = {"image": image, "detections": [], "caption": "A dog.", "human_annotated": True}
    rows = pa.Table.from_pylist([{"id": f"tt{n:07}_{n}", **common} for n in range(6)])
    pq.write_table(rows, one := io.BytesIO(), row_group_size=2)
    pq.write_table(rows, other := io.BytesIO(), compression="none", use_dictionary=False)
    return [one.getvalue(), other.getvalue()]


def tar_seeds() -> list[bytes]:
    members = {"jpg": FILES["jpeg"](), "txt": b"A dog.", "json": b'{"status": "success"}'}
    saved = []
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=format) as tar:
            for key in ("000000000", "k" * 120):
                for extension, content in members.items():
                    member = tarfile.TarInfo(f"{key}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
            link = tarfile.TarInfo("1.jpg")
            link.type, link.linkname = tarfile.SYMTYPE, "../secret.jpg"
            tar.addfile(link)
        saved.append(file.getvalue().rstrip(b"\0") + bytes(1024 + 512))
    return saved


HEADER = ("image", "caption", "split")
JSON_LINES = [
    json_lines(*({"file_name": name, "text": "A dog.", "split": "val"} for name in NAMES * 10)),
    json_lines(*({"image": name, "captions": ["A.", "B."]} for name in NAMES)),
]
ANSWERS = [{"from": "human", "value": "Describe"}, {"from": "gpt", "value": "A dog."}]
JSON = [
    json.dumps([{"image": name, "conversations": ANSWERS} for name in NAMES]).encode(),
    b'{"images": [{"id": 0, "file_name": "a.jpg"}], "annotations": [{"image_id": 0, "caption": "A dog."}]}',
]
TAGS = [
    b'<gdo class="person" person-0>The man</gdo> <gda class="run" person-0>runs</gda> here.',
    b"&lt;gdo class='dog' dog-0&gt;A dog&lt;/gdo&gt; &amp;amp; a cat's \"``toy''\" ... !",
]
TAG_WORDS = b"<gdo|</gdo>|<gd|&amp;|&lt;|&#38;|&#x3c;|>|class=| \"|person-0|n't".split(b"|")
LAUGHS = [b"%c: &%c [%s]\n" % (c, c, b",".join([b"*%c" % (c - 1)] * 9)) for c in range(98, 107)]
YAML_WORDS = [
    b"\na: &a [1, 2]\nb: *a\n", b"\n<<: *a\n", b"!!python/object/apply:os.system [ls]", b"!!binary x",
    b"!!timestamp 2001-99-99", b"? ", b"0x", b"1:99:99", b".inf", b"~", b"- ", b": ", b"|\n  ", b"bridge: ",
    b"\n" + b"".join(LAUGHS),
]  # fmt: skip
TAR_WORDS = [b"77777777777", b"\x80" + bytes(10) + b"\x7f", b"30 path=../../secret.jpg\n"]


class Reader(NamedTuple):
    """A reader under test, valid inputs, and what mutations insert."""

    read: Callable[[bytes, Path], object]
    seeds: Callable[[], list[bytes]]
    words: Iterable[bytes] = ()


READERS = {
    "picture": Reader(read_image, lambda: [make() for make in FILES.values()]),
    "caption-folder": Reader(
        read_caption_folder,
        lambda: [json_lines(*({"image_path": n, "caption": "A dog."} for n in NAMES * 20))],
    ),
    "jsonl": Reader(read_local("jsonl"), lambda: JSON_LINES),
    "csv": Reader(read_local("csv"), lambda: [table(",", *HEADER), table(";", *HEADER)]),
    "tsv": Reader(read_local("tsv"), lambda: [table("\t", *HEADER), table("\t")]),
    "json": Reader(read_local("json"), lambda: JSON),
    "tags": Reader(read_tags, lambda: TAGS, TAG_WORDS),
    "recipe": Reader(
        read_recipe, lambda: [path.read_bytes() for path in sorted((REPOSITORY / "config").glob("*.yaml"))], YAML_WORDS
    ),
    "parquet": Reader(read_parquet, parquet_seeds),
    "shards": Reader(read_shards, tar_seeds, TAR_WORDS),
}  # fmt: skip


class Hang(BaseException):
    """Raised by the alarm inside a reader that computes for too long."""


class Watch:
    """Notes every file that is opened outside ``folder``, and every program, while it is on."""

    ALLOWED = (sys.prefix, sys.base_prefix, str(REPOSITORY), "/proc/self", "/usr", "/dev/null")
    FORBIDDEN = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "socket.connect")

    def __init__(self, folder: Path):
        self.folder, self.is_on, self.seen = folder.resolve(), False, list[str]()
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.is_on and event in self.FORBIDDEN:
            self.seen.append(f"{event} {arguments}")
        elif self.is_on and event == "open" and isinstance(arguments[0], str | bytes):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if not Path(path).is_relative_to(self.folder) and not path.startswith(self.ALLOWED):
                self.seen.append(f"open {path}")


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Limit memory, and the processor's time between two settings of its timer."""

    def alarm(*_: object) -> None:
        raise Hang

    now = int(re.findall(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[0]) * 1024
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGPROF, alarm)
    resource.setrlimit(resource.RLIMIT_AS, (now + MAX_BYTES, hard))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGPROF, handler)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a reader: images, a link that leads out, and beside it what it must not read."""
    inner = tmp_path / "inner"
    (inner / "images").mkdir(parents=True)
    for path in (tmp_path / "secret.jpg", inner / "images" / "a.jpg", inner / "images" / "b.png"):
        path.write_bytes(FILES[{".jpg": "jpeg", ".png": "png"}[path.suffix]]())
    (inner / "images" / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    return inner


@pytest.mark.timeout(7200)  # of `--fuzz 10000`
@pytest.mark.parametrize("name", READERS)
def test_a_reader_takes_or_refuses(name: str, folder: Path, request: pytest.FixtureRequest) -> None:
    reader, watch, rng = READERS[name], Watch(folder), random.Random(name)
    seeds, words = reader.seeds(), [*reader.words, *ANYTHING]
    known = [path.read_bytes() for path in sorted((CORPUS / name).glob("*"))]
    count = request.config.getoption("--fuzz")
    taken = refused = 0
    with contextlib.suppress(VLMBridgeError):
        reader.read(seeds[0], folder)  # imports whatever it needs
    with limited():
        for content in chain(known, (mutated(rng, seeds, words) for _ in range(count))):
            (folder.parent / "current").write_bytes(content)
            signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
            watch.is_on = True
            try:
                reader.read(content, folder)
                taken += 1
            except VLMBridgeError as error:
                refused += 1
                assert "memory" not in repr(error.__cause__).lower()
                assert "\n" not in str(error) and len(str(error)) < 5000
            finally:
                watch.is_on = False
            assert not watch.seen
    assert taken
    assert refused or name == "tags"  # every caption has a plain form
    beside = {path.name for path in folder.parent.iterdir()}
    assert beside == {"current", "inner", "secret.jpg"}, "written outside the reader's folder"


def test_the_corpus_is_small_and_of_known_readers() -> None:
    assert {path.name for path in CORPUS.iterdir()} <= READERS.keys()
    assert sum(path.stat().st_size for path in CORPUS.rglob("*")) < 1_000_000
