"""Caption metrics by pycocoevalcap, the field's reference implementation, so that they compare with papers.

Its scorers and jars are used as they are; the Java programs (PTB tokenizer, METEOR, SPICE) are driven from
here, because its own wrappers write into the installed package, chat on the terminal, and wait for ever on a
Java that died.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, SupportsFloat

from vlm_bridge.errors import DataError

PTB_TIMEOUT = 300.0
"""Seconds for the PTB tokenizer: it reads 100,000 captions in a few."""
SPICE_TIMEOUT = 3600.0
"""Seconds for SPICE, which parses every sentence: minutes per thousand images."""

# The jars read and write text in the locale's encoding and decimal mark unless told otherwise.
_JAVA_TEXT = ("-Dfile.encoding=UTF-8", "-Duser.language=en", "-Duser.country=US")

Tokens = dict[str, list[str]]
"""Image id -> sentences, each a string of tokens joined by single blanks (pycocoevalcap's own form)."""


@dataclass(frozen=True)
class CaptionScores:
    """Scores as fractions, the way pycocoevalcap returns them (CIDEr 1.0 is what papers print as 100).

    ``skipped`` maps each metric that was asked for and not computed to the reason and the way to get it.
    ``tokenizer`` is ``"ptb"`` for numbers comparable with papers, ``"regex"`` for the fallback without Java.
    """

    corpus: dict[str, float]
    per_image: dict[str, dict[str, float]]
    skipped: dict[str, str]
    tokenizer: Literal["ptb", "regex"]

    def notes(self) -> list[str]:
        """What a reader of the numbers must know, one line each; empty when there is nothing to say."""
        return score_notes(self.skipped, self.tokenizer)


def score_notes(skipped: Mapping[str, str], tokenizer: str | None) -> list[str]:
    """`CaptionScores.notes` for scores that were read from a file."""
    reasons: dict[str, list[str]] = {}
    for metric, reason in skipped.items():
        reasons.setdefault(reason, []).append(metric)
    lines = [f"{' and '.join(metrics)} skipped: {reason}" for reason, metrics in reasons.items()]
    if tokenizer == "regex":
        lines.append(
            "tokenized by a simple rule, not by PTB: do not compare these scores with published ones"
        )
    return lines


def score_captions(
    references: Mapping[str, Sequence[str]],
    hypotheses: Mapping[str, str],
    *,
    spice: bool = False,
    meteor_timeout: float = 300.0,
) -> CaptionScores:
    """Score one caption per image against all its references.

    BLEU-1..4, METEOR, ROUGE-L, CIDEr and, if asked for, SPICE. BLEU and METEOR of the corpus come from summed
    counts, the others are means over images. An empty caption scores 0. CIDEr weighs words by how few images
    of this very collection use them, so it is 0 for a single image and not comparable between collections.

    Args:
        references: image id -> its human captions, at least one with a word in it.
        hypotheses: image id -> the generated caption; the same ids.
        spice: also compute SPICE (slow; needs the CoreNLP models, see ``skipped`` when they are missing).
        meteor_timeout: seconds after which METEOR is stopped and reported as skipped.

    Raises:
        DataError: no images, the ids of the two mappings differ, or an image has no usable reference.
    """
    _check_ids(references, hypotheses)
    skipped: dict[str, str] = {}
    java_metrics = ["METEOR", *(["SPICE"] if spice else [])]
    try:
        tokenizer, (gts, res) = "ptb", _tokenize(references, hypotheses, ptb_tokenize)
    except JavaError as error:
        tokenizer, (gts, res) = "regex", _tokenize(references, hypotheses, regex_tokenize)
        skipped = dict.fromkeys(java_metrics, str(error))

    scorers: dict[str, Callable[[], _Scores]] = {
        "BLEU": lambda: _bleu(gts, res),
        "METEOR": lambda: _meteor(gts, res, meteor_timeout),
        "ROUGE-L": lambda: _rouge(gts, res),
        "CIDEr": lambda: _cider(gts, res),
        "SPICE": lambda: _spice(gts, res),
    }
    corpus: dict[str, float] = {}
    per_image: dict[str, dict[str, float]] = {image_id: {} for image_id in gts}
    for name, scorer in scorers.items():
        if name in skipped or (name == "SPICE" and not spice):
            continue
        try:
            scores = scorer()
        except JavaError as error:
            skipped[name] = str(error)
            continue
        for metric, (score, by_image) in scores.items():
            corpus[metric] = float(score)
            for image_id, value in zip(gts, by_image, strict=True):
                per_image[image_id][metric] = float(value)
    return CaptionScores(corpus, per_image, skipped, tokenizer)


def score_without_java(
    references: Sequence[Sequence[str]], hypotheses: Sequence[str]
) -> dict[str, float]:
    """BLEU-4 and CIDEr of one caption per image, on tokens of a simple rule: quick, and not comparable with papers."""
    gts = {str(index): regex_tokenize(captions) for index, captions in enumerate(references)}
    res = {str(index): regex_tokenize([caption]) for index, caption in enumerate(hypotheses)}
    return {
        name: float(scorer(gts, res)[name][0])
        for name, scorer in (("BLEU-4", _bleu), ("CIDEr", _cider))
    }


def _check_ids(references: Mapping[str, Sequence[str]], hypotheses: Mapping[str, str]) -> None:
    if not references:
        raise DataError("no captions to score: the references are empty")
    for what, missing in (
        ("no generated caption", references.keys() - hypotheses.keys()),
        ("no reference captions", hypotheses.keys() - references.keys()),
    ):
        if missing:
            named = ", ".join(sorted(missing)[:5]) + (", ..." if len(missing) > 5 else "")
            raise DataError(f"cannot score captions: {what} for {len(missing)} image(s): {named}")


# --- Tokens ----------------------------------------------------------------------------------------------


def ptb_tokenize(sentences: Sequence[str]) -> list[str]:
    """Penn Treebank tokens in lower case without punctuation, equal to those of pycocoevalcap's PTBTokenizer.

    Raises:
        JavaError: there is no Java, or it failed.
    """
    from pycocoevalcap.tokenizer import ptbtokenizer

    # One sentence is one line to the jar: any line break inside a caption would shift all that follow.
    lines = [" ".join(sentence.split()) for sentence in sentences]
    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    arguments = [
        "-cp",
        str(jar),
        "edu.stanford.nlp.process.PTBTokenizer",
        "-preserveLines",
        "-lowerCase",
    ]
    with _java(arguments, timeout=PTB_TIMEOUT) as process:
        output, _ = process.communicate("".join(f"{line}\n" for line in lines))
        tokenized = output.split("\n")[:-1]
        if process.returncode or len(tokenized) != len(lines):
            raise EOFError(f"the PTB tokenizer answered {len(tokenized)} of {len(lines)} lines")
    punctuation = set(ptbtokenizer.PUNCTUATIONS)
    return [
        " ".join(word for word in line.split() if word not in punctuation) for line in tokenized
    ]


def regex_tokenize(sentences: Sequence[str]) -> list[str]:
    """Runs of letters and digits in lower case, with inner hyphens and apostrophes: near PTB, not equal."""
    return [
        " ".join(re.findall(r"\w+(?:[-'\u2019]\w+)*", sentence.lower())) for sentence in sentences
    ]


def _tokenize(
    references: Mapping[str, Sequence[str]],
    hypotheses: Mapping[str, str],
    tokenize: Callable[[Sequence[str]], list[str]],
) -> tuple[Tokens, Tokens]:
    """Tokenize everything in one call.

    References left without a token are dropped: ROUGE-L would give an empty caption full marks for them.
    """
    sentences = [
        text for image_id, refs in references.items() for text in (hypotheses[image_id], *refs)
    ]
    tokenized = iter(tokenize(sentences))
    gts, res = {}, {}
    for image_id, refs in references.items():
        res[image_id] = [next(tokenized)]
        gts[image_id] = [tokens for tokens in (next(tokenized) for _ in refs) if tokens]
        if not gts[image_id]:
            raise DataError(
                f"cannot score captions: no words in any reference caption for image {image_id}"
            )
    return gts, res


# --- Scorers ---------------------------------------------------------------------------------------------

_Scores = Mapping[str, tuple[SupportsFloat, Iterable[SupportsFloat]]]
"""Metric -> (score of the corpus, scores of its images in the order given)."""


def _bleu(gts: Tokens, res: Tokens) -> _Scores:
    from pycocoevalcap.bleu.bleu import Bleu

    corpus, per_image = Bleu(4).compute_score(gts, res, verbose=0)
    return {
        f"BLEU-{n}": scores for n, scores in enumerate(zip(corpus, per_image, strict=True), start=1)
    }


def _rouge(gts: Tokens, res: Tokens) -> _Scores:
    from pycocoevalcap.rouge.rouge import Rouge

    return {"ROUGE-L": Rouge().compute_score(gts, res)}


def _cider(gts: Tokens, res: Tokens) -> _Scores:
    from pycocoevalcap.cider.cider import Cider

    return {"CIDEr": Cider().compute_score(gts, res)}


def _meteor(gts: Tokens, res: Tokens, timeout: float) -> _Scores:
    """METEOR 1.5 by its line protocol: a SCORE line per image gives statistics, one EVAL line all scores."""
    from pycocoevalcap.meteor import meteor

    jar = Path(meteor.__file__).with_name(meteor.METEOR_JAR)
    arguments = ["-Xmx2G", "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"]
    with _java(arguments, timeout=timeout) as process:
        statistics = [
            _ask(process, "SCORE", *refs, *res[image_id]) for image_id, refs in gts.items()
        ]
        answers = [float(_ask(process, "EVAL", *statistics)), *(float(_read(process)) for _ in gts)]
    return {"METEOR": (answers[-1], answers[:-1])}


def _spice(gts: Tokens, res: Tokens) -> _Scores:
    from pycocoevalcap.spice import get_stanford_models as models
    from pycocoevalcap.spice import spice

    package = Path(spice.__file__).parent
    if not (package / models.SPICELIB / f"{models.JAR}-models.jar").is_file():
        command = "python -m pycocoevalcap.spice.get_stanford_models"
        raise JavaError(
            f"it needs the Stanford CoreNLP models, fetched once (about 400 MB) by: {command}"
        )
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder, "in.json"), Path(folder, "out.json")
        entries = [{"image_id": i, "test": res[i][0], "refs": refs} for i, refs in gts.items()]
        asked.write_text(json.dumps(entries), encoding="utf-8")
        jar = package / spice.SPICE_JAR
        arguments = ["-Xmx8G", "-jar", str(jar), str(asked), "-out", str(answered), "-silent"]
        with _java(arguments, timeout=SPICE_TIMEOUT, cwd=package) as process:
            process.communicate()
            if process.returncode or not answered.is_file():
                raise EOFError(f"SPICE ended with code {process.returncode}")
        results = json.loads(answered.read_text(encoding="utf-8"))
    by_image = {entry["image_id"]: float(entry["scores"]["All"]["f"]) for entry in results}
    scores = [by_image[image_id] for image_id in gts]
    return {"SPICE": (sum(scores) / len(scores), scores)}


# --- Java ------------------------------------------------------------------------------------------------


class JavaError(Exception):
    """A metric's Java program cannot run; the message is the reason and the way to mend it."""


def install_java_command() -> str:
    """The command that installs a Java runtime on this system."""
    if sys.platform == "darwin":
        return "brew install openjdk"
    if sys.platform == "win32":
        return "winget install EclipseAdoptium.Temurin.21.JRE"
    return "sudo apt-get install default-jre-headless"


@contextmanager
def _java(
    arguments: Sequence[str], *, timeout: float, cwd: Path | None = None
) -> Iterator[subprocess.Popen[str]]:
    """A Java process with piped text input and output; on leaving the block it and its children are gone.

    A watchdog kills it after ``timeout`` seconds: blocked reads and writes then fail, and that failure comes
    out as :class:`JavaError`, like every other way for Java to break.
    """
    executable = shutil.which("java")
    if executable is None:
        raise JavaError(f"no Java found; install it with: {install_java_command()}")
    timed_out = threading.Event()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as stderr:
        try:
            process = subprocess.Popen(
                [executable, *_JAVA_TEXT, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,  # A file: nobody would empty a pipe meanwhile, and a full one blocks Java.
                cwd=cwd,
                encoding="utf-8",
                start_new_session=True,
            )
        except OSError as error:
            raise JavaError(f"cannot start {executable}: {error.strerror}") from error

        def expire() -> None:
            timed_out.set()
            _kill(process)

        watchdog = threading.Timer(timeout, expire)
        watchdog.daemon = True
        watchdog.start()
        try:
            yield process
        except (EOFError, OSError, ValueError) as error:
            if timed_out.is_set():
                raise JavaError(
                    f"Java gave no answer within {timeout:g} s and was stopped"
                ) from error
            raise JavaError(f"Java failed: {_complaint(stderr) or error}") from error
        finally:
            watchdog.cancel()
            _kill(process)
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):  # What Java did not read before it died cannot be flushed.
                    if pipe:
                        pipe.close()


def _kill(process: subprocess.Popen[str]) -> None:
    """Kill the process and, where systems have process groups, everything it started."""
    if process.returncode is not None:
        return
    with suppress(ProcessLookupError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()


def _complaint(stderr: IO[str]) -> str:
    """The line in which Java says what went wrong: the exception if there is one, else its last word."""
    stderr.seek(0)
    lines = [line.strip() for line in stderr if line.strip()]
    last = lines[-1] if lines else ""
    return next((line for line in lines if "Exception" in line or "Error" in line), last)


def _ask(process: subprocess.Popen[str], *fields: str) -> str:
    """Send one line of METEOR's protocol; a field that held the separator would be taken for two."""
    assert process.stdin is not None
    line = " ||| ".join(field.replace("|||", "").replace("  ", " ") for field in fields)
    process.stdin.write(f"{line}\n")
    process.stdin.flush()
    return _read(process)


def _read(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise EOFError("Java ended before it answered")
    return line.strip()
