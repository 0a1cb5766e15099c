"""Tokens and scorers of pycocoevalcap, one function a metric; and tokens that need no Java.

Its Java programs are run here: its own wrappers wait forever for a Java that died.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from subprocess import PIPE, Popen
from typing import IO, SupportsFloat

TIMEOUT_S, SPICE_TIMEOUT_S = 300.0, 3600.0
# Otherwise the jars read and write text in the locale's encoding and decimal mark.
TEXT_OPTIONS = ("-Dfile.encoding=UTF-8", "-Duser.language=en", "-Duser.country=US")
INSTALL_JAVA = "sudo apt-get install default-jre-headless (on a Mac: brew install openjdk)"

Tokens = dict[str, list[str]]
"""Image id -> sentences as tokens joined by spaces, the form that pycocoevalcap takes."""
Scores = Mapping[str, tuple[SupportsFloat, Iterable[SupportsFloat]]]
"""Metric -> (score of the corpus, scores of the images in the order given)."""
Metric = Callable[[Tokens, Tokens], Scores]

# A clitic is a token of its own ("do n't", "dog 's"). Words keep their inner hyphens, numbers
# their inner marks.
_TOKEN = re.compile(
    r"can(?=not\b)|n't\b|'(?:s|re|ve|ll|d|m)\b"
    r"|\w+?(?=n't\b)|\w+(?:(?!'(?:s|re|ve|ll|d|m)\b)[-'&]\w+|(?<=\d)[.,:/]\d+)*"
)


class JavaError(Exception):
    """A Java program cannot run; the message has the reason and how to mend it."""


def find_java() -> str:
    """Return the path of `java`. Raises JavaError if there is none."""
    if executable := shutil.which("java"):
        return executable
    raise JavaError(f"no Java found; install it with: {INSTALL_JAVA}")


def java_version() -> str | None:
    """Return the first line of `java -version`; None without a working Java."""
    try:
        command = [find_java(), "-version"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (JavaError, OSError, subprocess.SubprocessError):
        return None
    return answer.stderr.partition("\n")[0]


def run_java(
    arguments: Sequence[str | Path], text: str = "", *, timeout_s: float, cwd: Path | None = None
) -> str:
    """Run a Java program on a text and return its output.

    Raises:
        JavaError: Java is missing, failed, or did not end within `timeout_s` seconds.
    """
    command = [find_java(), *TEXT_OPTIONS, *arguments]
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, encoding="utf-8", timeout=timeout_s, cwd=cwd
        )
    except subprocess.TimeoutExpired:
        raise _java_silent(timeout_s) from None
    except (OSError, ValueError) as error:
        raise JavaError(f"Java failed: {error}") from error
    if done.returncode:
        raise _java_failed(done.stderr, done.returncode)
    return done.stdout


def _java_failed(log: str, code: int) -> JavaError:
    reason = re.search(r".*(Error|Exception).*", log)
    return JavaError(f"Java failed: {reason[0] if reason else f'exit code {code}'}")


def _java_silent(timeout_s: float) -> JavaError:
    return JavaError(f"Java gave no answer within {timeout_s:g} s and was stopped")


def ptb_tokenize(sentences: Sequence[str]) -> list[str]:
    """Return lower-case Penn Treebank tokens without punctuation, joined by spaces.

    They equal those of pycocoevalcap's PTBTokenizer.

    Raises:
        JavaError: Java is missing or failed.
    """
    from pycocoevalcap.tokenizer import ptbtokenizer

    # The jar reads one sentence a line. A line break inside a caption would shift the rest.
    text = "".join(f"{' '.join(sentence.split())}\n" for sentence in sentences)
    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    program = ("-cp", jar, "edu.stanford.nlp.process.PTBTokenizer")
    output = run_java([*program, "-preserveLines", "-lowerCase"], text, timeout_s=TIMEOUT_S)
    lines = output.split("\n")[:-1]
    if len(lines) != len(sentences):
        raise JavaError(f"Java failed: PTB tokens for {len(lines)} of {len(sentences)} lines")
    punctuation = set(ptbtokenizer.PUNCTUATIONS)
    return [" ".join(word for word in line.split() if word not in punctuation) for line in lines]


def simple_tokenize(sentences: Sequence[str]) -> list[str]:
    """Return lower-case tokens without punctuation, joined by spaces, by a rule close to PTB's.

    For 99.9% of Flickr8k's 30,000 training captions they equal those of `ptb_tokenize`.
    """
    plain = (sentence.lower().replace("\u2019", "'") for sentence in sentences)
    return [" ".join(_TOKEN.findall(text)) for text in plain]


def bleu(gts: Tokens, res: Tokens) -> Scores:
    """BLEU-1 to BLEU-4 (Papineni et al. 2002)."""
    from pycocoevalcap.bleu.bleu import Bleu

    corpus, per_image = Bleu(4).compute_score(gts, res, verbose=0)
    return {f"BLEU-{n}": pair for n, pair in enumerate(zip(corpus, per_image, strict=True), 1)}


def rouge(gts: Tokens, res: Tokens) -> Scores:
    """ROUGE-L (Lin 2004)."""
    from pycocoevalcap.rouge.rouge import Rouge

    return {"ROUGE-L": Rouge().compute_score(gts, res)}


def cider(gts: Tokens, res: Tokens) -> Scores:
    """CIDEr-D (Vedantam et al. 2015)."""
    from pycocoevalcap.cider.cider import Cider

    return {"CIDEr": Cider().compute_score(gts, res)}


def meteor(gts: Tokens, res: Tokens) -> Scores:
    """METEOR 1.5 (Denkowski and Lavie 2014)."""
    with started_meteor() as score:
        return score(gts, res)


@contextmanager
def started_meteor() -> Iterator[Metric]:
    """Start METEOR's Java program, which reads its tables for seconds, and yield `meteor`.

    The program is gone after the block. A failed start raises JavaError where scores are asked for.
    """
    from pycocoevalcap.meteor import meteor as package

    jar = Path(package.__file__).with_name(package.METEOR_JAR)
    # The serial collector halves the memory.
    options = ["-Xmx2G", "-XX:+UseSerialGC", "-jar", jar, "-", "-", "-stdio", "-l", "en", "-norm"]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        try:
            command = [find_java(), *TEXT_OPTIONS, *options]
            process = Popen(command, encoding="utf-8", stdin=PIPE, stdout=PIPE, stderr=log)
        except (JavaError, OSError) as error:
            process = error if isinstance(error, JavaError) else JavaError(f"Java failed: {error}")
        try:
            yield partial(_meteor, process, log)
        finally:
            if isinstance(process, Popen):
                process.kill()
                process.communicate()


def _meteor(process: Popen[str] | JavaError, log: IO[str], gts: Tokens, res: Tokens) -> Scores:
    """Score captions by a program that was started and writes its errors to ``log``."""
    if isinstance(process, JavaError):
        raise process

    def ask(*parts: str, num_lines: int = 1) -> list[str]:
        # As in pycocoevalcap, which has this mark between sentences.
        plain = (part.replace("|||", "").replace("  ", " ") for part in parts)
        print(*plain, sep=" ||| ", file=process.stdin, flush=True)
        return list(islice(process.stdout or (), num_lines))

    started = time.monotonic()
    alarm = threading.Timer(TIMEOUT_S, process.kill)
    alarm.start()
    try:
        counts = [ask("SCORE", *refs, *res[i])[0].strip() for i, refs in gts.items()]
        *scores, final = map(float, ask("EVAL", *counts, num_lines=len(gts) + 1))
        if len(scores) == len(gts):
            return {"METEOR": (final, scores)}
    except (OSError, ValueError, IndexError):  # it has ended, or printed an error
        pass
    finally:
        alarm.cancel()
    process.kill()
    if time.monotonic() - started >= TIMEOUT_S:
        raise _java_silent(TIMEOUT_S)
    code = process.wait()
    log.seek(0)
    raise _java_failed(log.read(), code)


def spice(gts: Tokens, res: Tokens) -> Scores:
    """SPICE (Anderson et al. 2016)."""
    from pycocoevalcap.spice import get_stanford_models as models
    from pycocoevalcap.spice import spice as package

    find_java()
    folder = Path(package.__file__).parent
    if not (folder / models.SPICELIB / f"{models.JAR}-models.jar").is_file():
        raise JavaError(
            "it needs the Stanford CoreNLP models, fetched once (about 400 MB) by: "
            "python -m pycocoevalcap.spice.get_stanford_models"
        )
    with tempfile.TemporaryDirectory() as scratch:
        asked, answered = Path(scratch, "in.json"), Path(scratch, "out.json")
        entries = [{"image_id": i, "test": res[i][0], "refs": refs} for i, refs in gts.items()]
        asked.write_text(json.dumps(entries), encoding="utf-8")
        program = ["-Xmx8G", "-jar", folder / package.SPICE_JAR, asked, "-out", answered]
        run_java([*program, "-silent"], timeout_s=SPICE_TIMEOUT_S, cwd=folder)
        results = json.loads(answered.read_text(encoding="utf-8"))
    by_image = {entry["image_id"]: float(entry["scores"]["All"]["f"]) for entry in results}
    scores = [by_image[image] for image in gts]
    return {"SPICE": (sum(scores) / len(scores), scores)}
