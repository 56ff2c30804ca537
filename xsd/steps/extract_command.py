"""The verbs around an extraction: extract, status, verify, repair, import-chunks. Heavy imports
stay inside the verbs."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from xsd.core import ParameterError, XsdError


def add_verbs(
    verb: Callable[[str, Callable[[argparse.Namespace], int], str],
                   argparse.ArgumentParser]) -> None:
    """Add them to the command line. verb(name, action, help): adds one and returns its parser."""
    extract = verb(
        "extract", _extract,
        "paired hidden states of a dataset folder; resumes, and shares the work under torchrun or "
        "accelerate"
    )
    extract.add_argument("data", help="dataset folder (xsd simulate makes one), or davis_road")
    extract.add_argument("-o", "--out", type=Path, required=True, metavar="RUN",
                         help="run folder to write or to continue")
    extract.add_argument("--pair", default="embedded",
                         help="embedded, or a folder with drafter/ and verifier/")
    extract.add_argument("--split", choices=("train", "test"), default="train")
    extract.add_argument("--modes", default="teacher_forced",
                         help="kinds of pairs: teacher_forced, free_running, or both with a comma")
    extract.add_argument(
        "--layers", default="-1",
        help="hidden states; --layers=-1,-8 is the last (after the norm) and one before")
    extract.add_argument("--max-samples", type=int, default=-1,
                         help="that many, whole clips drawn by the seed; -1 is all")
    extract.add_argument("--max-questions", type=int, default=10,
                         help="asked of every clip: the folder's first so many")
    extract.add_argument("--max-new-tokens", type=int, default=50, help="longest answer")
    extract.add_argument("--duration", default="", help="only clips of this length: 1s, 500ms")
    extract.add_argument("--event-frames", choices=("5f", "1f"),
                         help="what the drafter sees; default as the pair says")
    extract.add_argument("--reuse-verifier", type=Path, metavar="RUN",
                         help="take the verifier's answers from this finished run")
    extract.add_argument("--stored", default="fp16", choices=("fp32", "bf16", "fp16", "int8"),
                         help="how states are stored")
    extract.add_argument("--dtype", default="float32",
                         help="of the models: float32, bfloat16 or float16")
    extract.add_argument("--quant", choices=("4bit", "8bit"),
                         help="quantise the decoders' linear layers with bitsandbytes")
    extract.add_argument("--device", default="cpu",
                         help="cpu or cuda; under torchrun every process takes its own GPU")
    extract.add_argument("--batch", type=int, default=16, help="answers at a time")
    extract.add_argument("--samples-per-shard", type=int, default=256,
                         help="also what several processes share out")
    extract.add_argument("--seed", type=int, default=0)
    extract.add_argument("--supervise", type=int, default=0, metavar="N",
                         help="start again after a crash, at most N times")

    status = verb("status", _status,
                  "progress, rate, time left and errors of a running or dead extraction")
    status.add_argument("run", type=Path, metavar="RUN")

    verify = verb("verify", _verify,
                  "look for damaged, missing or mixed files, and for states that are no numbers")
    verify.add_argument("run", type=Path, metavar="RUN")

    repair = verb("repair", _repair, "extract again just what verify finds damaged")
    repair.add_argument("run", type=Path, metavar="RUN")
    repair.add_argument("--pair", help="where the pair is now; default as extracted")
    repair.add_argument("--data", help="where the dataset folder is now; default as extracted")
    repair.add_argument("--split", choices=("train", "test"), help="default as extracted")
    repair.add_argument("--reuse-verifier", metavar="RUN",
                        help="where the run that brought the verifier's answers is now")
    repair.add_argument("--device", help="default as extracted")

    chunks = verb("import-chunks", _import_chunks,
                  "padded .pt files of the first scripts as a run, bit for bit; resumes")
    chunks.add_argument("source", type=Path,
                        help="one .pt file, or a folder with index.json and chunks/")
    chunks.add_argument("out", type=Path, metavar="OUT", help="run folder to write or to continue")
    chunks.add_argument("--stored", default="fp32", choices=("fp32", "bf16", "fp16", "int8"),
                        help="fp32 keeps every bit")
    chunks.add_argument("--data", type=Path, metavar="DIR",
                        help="dataset folder they were extracted from, which names their sequences")
    chunks.add_argument("--split", choices=("train", "test"), help="of that folder")
    chunks.add_argument("--head", type=Path, metavar="FILE",
                        help=".pt file with the verifier's LM head")


def _extract(arguments: argparse.Namespace) -> int:
    if arguments.supervise < 0:
        raise ParameterError(
            f"--supervise {arguments.supervise}: give the largest number of restarts, 0 or more")
    from xsd.extract import ranks, supervise

    rank = ranks.Rank.of_this_process()
    part = f"{rank.rank} of {rank.world_size}" if rank.world_size > 1 else ""
    if arguments.supervise:
        command = [sys.executable, "-m", "xsd.cli", *_without(arguments.argv, "--supervise")]
        return supervise.supervise(command, arguments.out, arguments.supervise, part=part)
    from xsd.extract import run
    from xsd.steps import extract_request

    device = arguments.device
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    request = extract_request.Request(**_places(arguments), split=arguments.split,
                                      max_questions=arguments.max_questions,
                                      duration=arguments.duration,
                                      event_frames=int(arguments.event_frames[0])
                                      if arguments.event_frames else 0, dtype=arguments.dtype,
                                      quant=arguments.quant, device=arguments.device,
                                      )  # fmt: skip
    request.root()
    pair = replace(request, device=device).load_pair()
    samples = request.samples(pair)
    request.save(arguments.out, first=True)
    report = run.extract(pair, samples, arguments.out, modes=_list(arguments.modes),
                         layers=_integers(arguments.layers), dtype=arguments.stored,
                         max_new_tokens=arguments.max_new_tokens, batch_size=arguments.batch,
                         samples_per_shard=arguments.samples_per_shard,
                         max_samples=arguments.max_samples, seed=arguments.seed,
                         config=request.config(), verifier_from=arguments.reuse_verifier, rank=rank,
                         progress=Told(prefix=f"part {part}: " if part else ""),
                         )  # fmt: skip
    request.save(arguments.out)
    what = f"{arguments.out}: " + (f"part {part}, " if part else "")
    counted = (
        f"{report.n} samples, {report.tokens} tokens, {report.gb:.3f} GB in {report.seconds:.0f} s "
        f"({report.resumed} were done before)"
    )
    if not report.finished:
        print(f"{what}interrupted after {counted}; the same command continues")
        return supervise.INTERRUPTED
    print(f"{what}finished: {counted}" +
          ("" if report.joined else "; the other parts are still missing, the last one joins them"))
    return 0


@dataclass
class Told:
    """Progress as lines on stderr, at most one every ``every_s`` seconds."""

    prefix: str = ""
    every_s: float = 10.0
    _last: float = field(default=float("-inf"), repr=False)

    def __call__(self, progress: Any) -> None:
        """progress: an extract.run.Progress."""
        if time.monotonic() - self._last >= self.every_s or progress.done == progress.total:
            self._last = time.monotonic()
            print(f"{self.prefix}{progress}", file=sys.stderr, flush=True)


def _status(arguments: argparse.Namespace) -> int:
    from xsd.extract import monitor

    print(monitor.report(arguments.run))
    return 1 if any(one.state == "stopped" for one in monitor.status(arguments.run)) else 0


def _verify(arguments: argparse.Namespace) -> int:
    from xsd.extract import checks

    found = checks.verify(arguments.run)
    for place, problems in found.items():
        print(f"{place}: " + (f"{len(problems)} problem(s)" if problems else "all well"))
        for problem in problems:
            print(f"  {problem}")
    return 1 if any(found.values()) else 0


def _repair(arguments: argparse.Namespace) -> int:
    from xsd.extract import checks, repair
    from xsd.runs import folder as run_folder
    from xsd.steps import extract_request

    changes = {**_places(arguments), "split": arguments.split, "device": arguments.device}
    found, mended = checks.verify(arguments.run), 0
    loaded: dict[Any, Any] = {}
    for place, problems in found.items():
        if not problems:
            continue
        try:
            request = extract_request.load(place, **changes)
            if request not in loaded:
                loaded.clear()  # one pair in memory at a time
                pair = request.load_pair()
                loaded[request] = (pair, request.samples(pair))
            reused = run_folder.resolve(request.reuse_verifier) if request.reuse_verifier else None
            for problem in repair.repair(*loaded[request], place, verifier_from=reused,
                                         problems=problems):
                print(f"mended: {problem.file} (it {problem.what.removeprefix('it ')})")
                mended += 1
        except XsdError as error:
            print(f"not mended: {error}")
    left = {place: problems for place, problems in checks.verify(arguments.run).items() if problems}
    for problem in (problem for problems in left.values() for problem in problems):
        print(f"left: {problem}")
    print(
        f"{arguments.run}: {mended} file(s) mended, {sum(map(len, left.values()))} problem(s) left")
    return 1 if left else 0


def _import_chunks(arguments: argparse.Namespace) -> int:
    from xsd.sensors import folder
    from xsd.shards import chunks

    clips = None
    if arguments.data:
        clips = [(record.sequence, record.clip)
                 for record in folder.open_folder(arguments.data, arguments.split)]
    n = chunks.import_chunks(arguments.source, arguments.out, dtype=arguments.stored, clips=clips,
                             head=arguments.head)
    lacks = "token ids" if clips else "token ids and names of sequences (give --data for those)"
    print(
        f"{arguments.out}: {n} free-running samples in {arguments.stored}; the source has no "
        f"{lacks}, which is marked"
    )
    return 0


def _places(arguments: argparse.Namespace) -> dict[str, str | None]:
    """The folders that were given, as a request keeps them; names stay names."""
    from xsd.steps import extract_request

    given = {name: getattr(arguments, name) for name in ("data", "pair", "reuse_verifier")}
    named = ("embedded", "davis_road", "simulated")
    return {
        name: place if place is None or place in named else extract_request.here(place)
        for name, place in given.items()
    }


def _list(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in _list(text))
    except ValueError:
        raise ParameterError(
            f"--layers {text}: expected whole numbers with commas, such as -1,-8") from None


def _without(argv: list[str], option: str) -> list[str]:
    """The arguments without an option and its value."""
    kept, skip = [], False
    for word in argv:
        if skip or word == option or word.startswith(f"{option}="):
            skip = word == option
            continue
        kept.append(word)
    return kept
