"""``xsd data``: dataset folders, extractions, and what ran elsewhere."""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from typer import Argument, Context, Option, Typer

from xsd.core import ROOT, ParameterError, XsdError, as_used

QUIET: dict[str, Any] = {"rich_markup_mode": None, "pretty_exceptions_enable": False,
                         "no_args_is_help": True}
"""Plain help, plain tracebacks."""
NUMBERS = "float32, bfloat16 or float16; auto: bfloat16 on a GPU, float32 on a CPU"
DEVICE = "cpu, cuda, cuda:1, …; auto: a GPU if there is one"
OUT = Option(None, "-o", "--out", metavar="DIR", help="write here instead")
QUANT = Option(None, help="quantise the decoders' linear layers; int4 wants torchao")
SPLIT = Option("train")
SAME = Option(None, help="default as extracted")
RUN = Argument(metavar="RUN", help="run folder")
Quant = Literal["4bit", "8bit", "int4"] | None
Split = Literal["train", "test"]
Stored = Literal["fp32", "bf16", "fp16", "int8"]


def examples(*lines: str) -> str:
    """The end of a verb's help; the sign in front keeps the lines apart."""
    return "\n  ".join(["\b\nExamples:", *lines])


def words(text: str) -> tuple[str, ...]:
    """``"L1, L4"`` as ``("L1", "L4")``."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


app = Typer(help="Dataset folders, paired hidden states, answers made elsewhere.", **QUIET)


@app.command(epilog=examples("xsd data simulate data/drives -n 50",
                             "xsd data simulate data/drives --split test -n 20"))
def simulate(folder: Path, split: Split = SPLIT, seed: int = Option(0, min=0),
             n: int = Option(4, "-n", "--sequences", min=1, help="drives"),
             workers: int = Option(1, min=1, help="processes")) -> None:
    """Write a dataset folder of simulated drives."""
    from xsd.embedded import drive

    found = drive.write_dataset(folder, split=split, n_sequences=n, seed=seed, workers=workers)
    plain = [f"{name} {value}" for name, value in found.items()
             if not isinstance(value, (dict, list))]
    print(f"{folder}: {', '.join(plain)}")


@app.command(epilog=examples("xsd data prepare-dsec raw data/dsec --clip-ms 1000 --hop-ms 500"))
def prepare_dsec(
    source: Path = Argument(help="folder of raw sequences, or one of them"),
    root: Path = Argument(help="dataset folder to write or to continue"),
    split: Split = SPLIT,
    clip_ms: int = 1000,
    hop_ms: int = Option(500, help="from one clip's start to the next one's"),
    video_size: str = Option("", metavar="WxH", help="resize the pictures; else as they are"),
    canvas: Literal["slice", "sensor"] = Option("slice", help="of event frames; slice is official"),
    rectify: bool = Option(False, "--rectify", help="move events by the sequence's rectify map"),
) -> None:
    """Cut raw DSEC sequences into a dataset folder; resumes after the last finished sequence."""
    from xsd.sensors import frames
    from xsd.steps import data

    summary = data.prepare_dsec(source, root, split=split, clip_ms=clip_ms, hop_ms=hop_ms,
                                video_size=frames.size_of(video_size), canvas=canvas,
                                rectify=rectify)
    print(data.dsec_sentence(summary, root))


@app.command(epilog=examples(
    "xsd data extract data/drives -o runs/x --modes teacher_forced,free_running",
    "torchrun --nproc-per-node 4 -m xsd.cli data extract data/dsec -o runs/y --device cuda"))
def extract(
    context: Context,
    data: str = Argument(help="dataset folder (xsd data simulate makes one), or davis_road"),
    out: Path | None = Option(None, "-o", "--out", metavar="RUN", help="run folder to write or "
                              "continue; else runs/chunked_<split>_<duration>_<quant>[_1f]"),
    pair: str = Option("embedded", help="embedded, smollm2 or a folder with both models"),
    split: Split = SPLIT,
    modes: str = Option("teacher_forced", help="teacher_forced, free_running, or both, by comma"),
    layers: str = Option("-1", help="--layers=-1,-8: the last (after the norm) and one before"),
    max_samples: int = Option(-1, help="that many, whole clips drawn by the seed; -1 is all"),
    max_scenes: int = Option(-1, help="that many clips, drawn by the seed; -1 is all"),
    sampling: Literal["all", "spread"] = Option("all", help="every clip is asked everything, or "
                                                "a sequence each question once"),
    questions_per_sequence: int = Option(10, help="of --sampling spread"),
    max_questions: int = Option(10, help="the first so many of the folder's or the file's"),
    questions_file: Path | None = Option(None, help="text, a question a line, or JSON"),
    max_new_tokens: int = Option(50, help="longest answer"),
    duration: str = Option("", help="only clips of this length: 1s, 500ms"),
    event_frames: Literal["5f", "1f"] | None = Option(None, help="default as the pair says"),
    reuse_verifier: Path | None = Option(None, metavar="RUN", help="finished run that brings the "
                                         "verifier's answers"),
    stored: Stored = Option("fp16", help="how states are stored"),
    dtype: str = Option("auto", help=f"of the models: {NUMBERS}"),
    quant: Quant = QUANT,
    device: str = Option("auto", help=f"{DEVICE}; under torchrun every process has its own GPU"),
    batch: str = Option("16", help="answers at a time; auto: as many as memory and speed allow"),
    samples_per_shard: int = Option(256, help="also what several processes share out"),
    save_every: int = Option(0, help="samples between two writes to disk; 0: after each batch"),
    save_every_s: float = Option(0.0, "--save-seconds", help="the same in seconds"),
    seed: int = 0,
    supervise: int = Option(0, metavar="N", help="start again after a crash, at most N times"),
) -> int:
    """Extract paired hidden states of a dataset folder.

    Resumes, and shares the work under torchrun or accelerate.
    """
    if supervise < 0:
        raise ParameterError(f"--supervise {supervise}: give the largest number of restarts, 0 or "
                             "more")
    from xsd.extract import ranks
    from xsd.extract import supervise as supervision

    rank = ranks.Rank.of_this_process()
    part = f"part {rank.part_name}" if rank.part_name else ""
    request = _request(data=data, pair=pair, reuse_verifier=reuse_verifier, split=split,
                       max_questions=max_questions, questions_file=questions_file or "",
                       questions_per_sequence=questions_per_sequence * (sampling == "spread"),
                       duration=duration, dtype=dtype, quant=quant, device=device,
                       event_frames=int(event_frames[0]) if event_frames else 0)
    request.root()
    out = out or ROOT / "runs" / request.name()
    if supervise:  # the same command; the last word on --supervise counts
        command = [sys.executable, "-P", "-m", "xsd.cli", *context.obj, "--supervise", "0"]
        return supervision.supervise(command, out, supervise, part=rank.part_name)
    from xsd.extract import plan, run
    from xsd.runs import progress
    from xsd.steps import extract_request

    own = request.device == "cuda" and os.environ.get("LOCAL_RANK")
    device = f"cuda:{own}" if own else request.device
    models = replace(request, device=device).load_pair()
    samples = request.samples(models)
    sizes = {"modes": words(modes), "max_new_tokens": max_new_tokens, "dtype": stored,
             "batch_size": batch if batch == "auto" else _integers(batch, "--batch")[0]}
    drawn = {"max_samples": max_samples, "seed": seed,
             "max_scenes": None if max_scenes == -1 else max_scenes}
    if not rank.rank:
        print(f"{out}: {extract_request.announced(models, plan.order(samples, **drawn), **sizes)}",
              flush=True)
    request.save(out, first=True)
    report = run.extract(models, samples, out, layers=_integers(layers), **sizes, **drawn,
                         samples_per_shard=samples_per_shard, config=request.config(),
                         about=request.about(), verifier_from=reuse_verifier, rank=rank,
                         save_every=save_every, save_every_s=save_every_s,
                         progress=progress.lines(part and f"{part}: "))
    request.save(out)
    extract_request.save_pair(out, models, request.pair, {one.question for one in samples},
                              loads={"dtype": request.dtype, "device": device, "quant": quant})
    print(f"{out}: {part and f'{part}, '}{report}")
    return 0 if report.finished else supervision.INTERRUPTED


@app.command(epilog=examples("xsd data contexts runs/x --of verifier,drafter"))
def contexts(run: Path = RUN, of: str = Option("verifier", help="or drafter, or both")) -> None:
    """Add what block drafters read to a finished extraction."""
    from xsd.steps import extract_request

    print(extract_request.add_contexts(run, words(of)))


@app.command(epilog=examples("xsd data status runs/x"))
def status(run: Path = RUN) -> int:
    """Progress, rate, time left and errors of a running or dead extraction."""
    from xsd.extract import monitor

    print(monitor.report(run))
    return 1 if any(one.state == "stopped" for one in monitor.status(run)) else 0


@app.command(epilog=examples("xsd data verify runs/x"))
def verify(run: Path = RUN) -> int:
    """Hold everything in a run against what was written: shards, results, records, notebooks."""
    from xsd.steps import verify as everything

    found = everything.verify(run)
    for place, problems in found.items():
        print(f"{place}: {everything.in_words(place, problems)}")
        for problem in problems:
            print(f"  {problem}")
    return 1 if any(found.values()) else 0


@app.command(epilog=examples("xsd data repair runs/x", "xsd data repair runs/x --data moved/dsec"))
def repair(run: Path = RUN,
           pair: str | None = Option(None, help="where it is now; default as extracted"),
           data: str | None = Option(None, help="where the folder is now; default as extracted"),
           split: Split | None = SAME, device: str | None = SAME,
           reuse_verifier: Path | None = Option(None, metavar="RUN", help="where it is now"),
           ) -> int:
    """Extract again just what verify finds damaged."""
    from xsd.extract import checks
    from xsd.extract import repair as mending
    from xsd.runs import folder as run_folder

    mended, opened, models, samples = 0, None, None, None
    for place, problems in checks.verify(run).items():
        if not problems:
            continue
        try:
            request = _request(place, data=data, pair=pair, reuse_verifier=reuse_verifier,
                               split=split, device=device)
            if request != opened:
                models = samples = None  # one pair in memory at a time
                models = request.load_pair()
                samples, opened = request.samples(models), request
            other = request.reuse_verifier
            for problem in mending.repair(models, samples, place, problems=problems, verifier_from=
                                          run_folder.resolve(other) if other else None):
                print(f"mended: {problem.file} (it {problem.what})")
                mended += 1
        except XsdError as error:
            print(f"not mended: {error}")
    left = [problem for problems in checks.verify(run).values() for problem in problems]
    for problem in left:
        print(f"left: {problem}")
    print(f"{run}: {mended} file(s) mended, {len(left)} problem(s) left")
    return 1 if left else 0


@app.command(epilog=examples("xsd data import-chunks old/chunked_train runs/old --data data/dsec"))
def import_chunks(
    source: Path = Argument(help="one .pt file, or a folder with index.json and chunks/"),
    out: Path = Argument(metavar="OUT", help="run folder to write or to continue"),
    stored: Stored = Option("fp32", help="fp32 keeps every bit"),
    data: Path | None = Option(None, help="dataset folder that names their sequences"),
    split: Split | None = Option(None, help="of that folder"),
    head: Path | None = Option(None, help="file (or folder of shards) of the verifier's LM head"),
) -> None:
    """Padded .pt files of the first scripts as a run, bit for bit; resumes."""
    from xsd.adapters import heads
    from xsd.sensors import folder
    from xsd.shards import chunks

    clips = [(record.sequence, record.clip)
             for record in folder.open_folder(data, split)] if data else None
    n = chunks.import_chunks(source, out, dtype=stored, clips=clips,
                             head=heads.read(head) if head else None)
    lacks = "token ids" if clips else "token ids and names of sequences (give --data for those)"
    print(f"{out}: {n} free-running samples in {stored}; the source has no {lacks}, which is "
          "marked")


@app.command(epilog=examples(
    "xsd data import-traces answers.json -o runs/elsewhere --gamma 5",
    "xsd data import-traces runs/smoke/shards/test_simulated --adapters runs/smoke/adapters/L4 "
    "--prices runs/smoke"))
def import_traces(
    file: Path = Argument(help="JSON {question, rows: [{clip, drafter_ids, verifier_ids}]}, or a "
                          "folder of stored pairs"),
    out: Path | None = OUT,
    gamma: int = Option(5, help="draft tokens a round"),
    gamma_prefill: int = Option(0, help="draft tokens made behind the verifier's prefill"),
    blocks: int = Option(10, help="of clips; floors never see the block they are tried on"),
    prices: Path | None = Option(None, help="to price the replay: JSON of seconds, or a run folder "
                                 "where notebook 05 measured them"),
    adapters: str = Option("", help="files or folders with commas, to draft on stored states"),
) -> None:
    """Token ids of models that ran elsewhere, or stored pairs, as a run: agreement, floors, replay.

    Into runs/<file>.
    """
    from xsd import files
    from xsd.adapters import registry
    from xsd.steps import traces

    drafting = {files.name_of(one): registry.load_any_adapter(one) for one in words(adapters)}
    found = traces.run(file, out or ROOT / "runs" / file.stem, adapters=drafting, gamma=gamma,
                       gamma_prefill=gamma_prefill, blocks=blocks, prices=prices)
    print(traces.text(found))


def _request(run: Path | None = None, **given: Any) -> Any:
    """What is asked for, folders as a request keeps them: new, or a run's own with changes."""
    from xsd.steps import extract_request

    for name in ("data", "pair", "reuse_verifier", "questions_file"):
        if given.get(name):
            given[name] = extract_request.here(given[name])
    if run:
        return extract_request.load_request(run, **given)
    given["device"], given["dtype"] = as_used(given["device"], given["dtype"])
    return extract_request.Request(**given)


def _integers(text: str, option: str = "--layers") -> tuple[int, ...]:
    try:
        return tuple(map(int, words(text)))
    except ValueError:
        raise ParameterError(
            f"{option} {text}: expected whole numbers with commas, such as -1,-8") from None
