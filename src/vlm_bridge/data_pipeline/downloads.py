"""Shell commands that download the public datasets; run again, they continue where they stopped.

SHA-256 of COCO's files are those of TensorFlow Datasets (``url_checksums/coco.txt``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

_COCO = "http://images.cocodataset.org"  # its certificate is not for this name
_KARPATHY = (
    "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip",
    "0.04 GB",
    "4cfd70132527b80933105e5829dc9034eaab9573482e2e680abbab6130244817",
)
_COCO_FILES = {
    2017: (
        ("annotations/annotations_trainval2017.zip", "annotations/captions_*.json", "0.25 GB",
         "113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268"),
        ("zips/val2017.zip", "val2017/*.jpg", "0.8 GB",
         "4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05"),
        ("zips/train2017.zip", "train2017/*.jpg", "19.3 GB",
         "69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929"),
    ),
    2014: (
        ("annotations/annotations_trainval2014.zip", "annotations/captions_*.json", "0.25 GB",
         "031296bbc80c45a1d1f76bf9a90ead27e94e99ec629208449507a4917a3bf009"),
        ("zips/val2014.zip", "val2014/*.jpg", "6.6 GB",
         "fe9be816052049c34717e077d9e34aa60814a55679f804cd043e3cbee3b9fde0"),
        ("zips/train2014.zip", "train2014/*.jpg", "13.5 GB",
         "ede4087e640bddba550e090eae701092534b554b42b05ac33f0300b984b31775"),
    ),
}  # fmt: skip
_CONCEPTUAL = "https://storage.googleapis.com/gcc-data"


@dataclass(frozen=True)
class Dataset:
    """A dataset's web page, and its commands for a folder and a year."""

    page: str
    commands: Callable[[Path, int], Sequence[str]]


def _archive(url: str, members: str, size: str, sha256: str, folder: Path) -> str:
    path = folder / url.rpartition("/")[2]
    file, checksum = quote(str(path)), quote(f"{sha256}  {path}")
    return (
        f"# {size}\n"
        f"curl -fL -C - --create-dirs -o {file} {url} &&\n"
        f"  echo {checksum} | sha256sum -c - &&\n"
        f"  unzip -oq {file} {quote(members)} -d {quote(str(folder))}"
    )


def _karpathy(dataset: str, folder: Path) -> str:
    url, size, sha256 = _KARPATHY
    return _archive(url, f"dataset_{dataset}.json", size, sha256, folder)


def _flickr30k(folder: Path, year: int) -> list[str]:
    return [
        _karpathy("flickr30k", folder),
        "# images (4.4 GB): fill in https://forms.illinois.edu/sec/229675; the answer is a link",
        f"# tar -xf flickr30k-images.tar.gz -C {quote(str(folder))}",
    ]


def _coco(folder: Path, year: int) -> list[str]:
    files = _COCO_FILES[year]
    return [
        _karpathy("coco", folder),
        *(
            _archive(f"{_COCO}/{path}", members, size, sha256, folder)
            for path, members, size, sha256 in files
        ),
    ]


def _conceptual(folder: Path, year: int) -> list[str]:
    commands = ["# hours; of 3.3 million images, many are gone", "pip install img2dataset"]
    for part, name in (
        ("validation", "Validation/GCC-1.1.0-Validation"),
        ("train", "Train/GCC-training"),
    ):
        tsv = folder / f"{name.replace('/', '_')}.tsv"
        file = quote(str(tsv))
        commands += [
            f"curl -fL -C - --create-dirs -o {file} {_CONCEPTUAL}/{name}.tsv",
            shards_command(tsv, folder / "shards" / part),
        ]
    return commands


def shards_command(tsv: Path, shards: Path) -> str:
    """Return the command that fetches the images of a headerless ``caption<TAB>url`` file as shards.

    The shorter side becomes 384 pixels at most, the input size of PVT + BLIP.
    """
    listed = quote(str(tsv.with_name(f"{tsv.stem}.with-header.tsv")))
    return (
        f"(printf 'caption\\turl\\n'; cat {quote(str(tsv))}) > {listed} && "
        f"img2dataset --url_list {listed} --input_format tsv --url_col url --caption_col caption "
        f"--output_format webdataset --output_folder {quote(str(shards))} --image_size 384 "
        "--resize_mode keep_ratio --resize_only_if_bigger True "
        "--processes_count 16 --thread_count 64"
    )


DATASETS = {
    "flickr30k": Dataset("http://shannon.cs.illinois.edu/DenotationGraph/", _flickr30k),
    "coco": Dataset("https://cocodataset.org/#download", _coco),
    "conceptual": Dataset(
        "https://ai.google.com/research/ConceptualCaptions/download", _conceptual
    ),
}
