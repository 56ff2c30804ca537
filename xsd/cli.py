"""The ``xsd`` command: a few verbs; everything heavy is imported inside the verb that needs it.

A mistake of the user's (XsdError) prints one sentence on stderr and exits with 2; a finished verb
exits with 0, one that found problems with 1, an extraction that was interrupted and can be
continued with 130.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from xsd import __version__
from xsd.core import ROOT, ParameterError, XsdError


def _run(arguments: argparse.Namespace) -> int:
    from xsd.runs import notebooks, parameters

    source = notebooks.find(arguments.notebook)
    model = parameters.model_of(source.stem)
    if arguments.help_parameters:
        for name, field in model.model_fields.items():
            print(f"{name} = {field.get_default()!r}\n    {field.description}")
        return 0
    values = parameters.read_values(arguments.parameter, model)
    target = notebooks.run_notebook(source, arguments.out or ROOT / "reports" / source.stem, values)
    print(f"finished: {target}")
    return 0


def _sweep(arguments: argparse.Namespace) -> int:
    from xsd.runs import notebooks, parameters

    source = notebooks.find(arguments.notebook)
    model = parameters.model_of(source.stem)
    grid = {}
    for pair in arguments.grid:
        name, sign, text = pair.partition("=")
        if not sign:
            raise ParameterError(f"a grid axis is written name=value,value, not {pair!r}")
        # level=L1,L2 is an axis over single levels: each point gets levels=[that one]
        field = "levels" if name == "level" and "levels" in model.model_fields else name
        grid[field] = [
            parameters.read_values([f"{field}={one}"], model)[field] for one in text.split(",")
            if one
        ]
    fixed = parameters.read_values(arguments.parameter, model)
    rows = notebooks.sweep(source, grid, arguments.out or ROOT / "reports" / f"sweep_{source.stem}",
                           fixed=fixed)
    print(notebooks.table(rows))
    failed = [row for row in rows if row["status"] == "failed"]
    if failed:
        print(
            f"{len(failed)} of {len(rows)} runs failed; run the same command again to try only "
            "those",
            file=sys.stderr)
    return 1 if failed else 0


def _report(arguments: argparse.Namespace) -> int:
    from xsd.runs import report

    executed = sorted(path for path in arguments.folder.glob("*.ipynb"))
    if not executed:
        raise ParameterError(
            f"there is no executed notebook in {arguments.folder}; run one with xsd run NB -o "
            f"{arguments.folder}"
        )
    for path in executed:
        print(report.notebook_page(path, arguments.folder / "notebooks"))
    return 0


def _notebooks(arguments: argparse.Namespace) -> int:
    from xsd.runs import hygiene, notebooks

    paths = [notebooks.find(one) for one in arguments.paths] or hygiene.committed()
    for path in paths:
        if arguments.action == "refresh":
            print(f"refreshing {path.name}", flush=True)
            hygiene.refresh(path)
        elif arguments.action == "normalise":
            hygiene.normalise(path)
    hygiene.check(paths)
    print(f"{len(paths)} notebooks are in their committed form")
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from xsd.runs import demo

    page = demo.run(arguments.out or ROOT / "reports" / "demo", profile=arguments.profile)
    print(f"the report: {page}")
    return 0


def _simulate(arguments: argparse.Namespace) -> int:
    from xsd.embedded import drive

    summary = drive.write_dataset(arguments.folder, split=arguments.split,
                                  n_sequences=arguments.sequences, seed=arguments.seed,
                                  workers=arguments.workers)
    print(f"{arguments.folder}: " +
          ", ".join(f"{name} {value}"
                    for name, value in summary.items() if not isinstance(value, (dict, list))))
    return 0


def _pair(arguments: argparse.Namespace) -> int:
    from studies.embedded_pair import recipe as pair
    from xsd.runs.progress import tqdm

    bars: dict[str, Any] = {}

    def show(stage: str, done: int, total: int, loss: float) -> None:
        if stage not in bars:
            bars[stage] = tqdm(total=total, desc=stage, mininterval=5)
        bars[stage].set_postfix(loss=f"{loss:.3f}", refresh=False)
        bars[stage].update(done - bars[stage].n)

    out = arguments.out or pair.default_folder(arguments.profile, arguments.seed)
    written = pair.train(out, arguments.profile, seed=arguments.seed, device=arguments.device,
                         workers=arguments.workers, progress=show)
    card = pair.score(written, n_sequences=arguments.sequences,
                      command=f"`xsd pair --profile {arguments.profile} --seed {arguments.seed}`")
    print(f"the pair: {written}; its card: {card}")
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from xsd.runs import doctor

    findings = doctor.examine(pair=arguments.pair)
    for finding in findings:
        print(finding, flush=True)
    if arguments.pair:
        from xsd.steps import checkup

        found = checkup.examine(arguments.pair, dtype=arguments.dtype, quant=arguments.quant,
                                device=arguments.device)
        for finding in found:
            print(finding)
        findings += found
    return 1 if any(finding.state == "bad" for finding in findings) else 0


def _plan(arguments: argparse.Namespace) -> int:
    import shutil

    from xsd.steps import plan, plan_table

    if arguments.measure:
        machine = plan.measure_machine(arguments.measure)
    elif arguments.machine in plan.MACHINES:
        machine = plan.MACHINES[arguments.machine]
    else:
        raise ParameterError(
            f"there is no machine {arguments.machine!r}; choose one of {', '.join(plan.MACHINES)}, "
            "or --measure"
        )
    machine = plan.with_speed(machine, tflops=arguments.tflops, gb_s=arguments.gb_s,
                              memory_gb=arguments.memory_gb)
    request = plan_table.Request(pair=arguments.pair, dtype=arguments.dtype, quant=arguments.quant,
                                 clips=arguments.clips, questions=arguments.questions,
                                 new_tokens=arguments.max_new_tokens, batch=arguments.batch,
                                 stored=arguments.stored, modes=tuple(arguments.modes.split(",")),
                                 levels=tuple(arguments.levels.split(",")), epochs=arguments.epochs,
                                 )  # fmt: skip
    print(plan_table.make(request, machine, disk_free=shutil.disk_usage(ROOT).free))
    return 0


def _prepare_dsec(arguments: argparse.Namespace) -> int:
    from xsd.steps import raw_dsec

    summary = raw_dsec.prepare(arguments.source, arguments.root, split=arguments.split,
                               clip_ms=arguments.clip_ms, hop_ms=arguments.hop_ms,
                               video_size=raw_dsec.size_of(arguments.video_size),
                               canvas=arguments.canvas, rectify=arguments.rectify,
                               )  # fmt: skip
    print(raw_dsec.sentence(summary, arguments.root))
    return 0


def _import_traces(arguments: argparse.Namespace) -> int:
    from xsd.steps import traces

    found = traces.run(arguments.file, arguments.out or ROOT / "runs" / arguments.file.stem,
                       gamma=arguments.gamma, gamma_prefill=arguments.gamma_prefill,
                       blocks=arguments.blocks, prices=arguments.prices,
                       )  # fmt: skip
    print(traces.text(found))
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    from importlib import import_module

    measured = import_module(f"benchmarks.{arguments.what}").run(
        arguments.out or ROOT / "reports" / f"bench_{arguments.what}")
    print(measured)
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line of xsd."""
    from xsd.steps import extract_command

    top = argparse.ArgumentParser(
        prog="xsd",
        description="Cross-modal speculative decoding: an event-camera drafter for a video verifier."
    )
    top.add_argument("--version", action="version", version=f"xsd {__version__}")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, action: Callable[[argparse.Namespace], int],
             text: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=text, description=text)
        added.set_defaults(action_of=action)
        return added

    run = verb("run", _run, "execute a notebook headless with checked parameters")
    run.add_argument("notebook", help="number (05), stem (05_live) or path")
    run.add_argument("-p", "--parameter", action="append", default=[], metavar="NAME=VALUE",
                     help="may be repeated; lists are written a,b")
    run.add_argument("-o", "--out", type=Path, metavar="DIR", help="default reports/<notebook>")
    run.add_argument("--help-parameters", action="store_true",
                     help="print what the notebook takes, with defaults, and stop")

    sweep = verb("sweep", _sweep,
                 "execute a notebook over a grid; resumes, and survives a failing run")
    sweep.add_argument("notebook")
    sweep.add_argument("-g", "--grid", action="append", required=True, metavar="NAME=V1,V2",
                       help="e.g. level=L1,L4; may be repeated")
    sweep.add_argument("-p", "--parameter", action="append", default=[], metavar="NAME=VALUE",
                       help="the same for every run")
    sweep.add_argument("-o", "--out", type=Path, metavar="DIR",
                       help="default reports/sweep_<notebook>")

    report = verb("report", _report, "turn the executed notebooks of a folder into offline pages")
    report.add_argument("folder", type=Path)

    books = verb("notebooks", _notebooks,
                 "keep the committed notebooks in the form git and nbval need")
    books.add_argument("action", choices=("check", "refresh", "normalise"),
                       help="refresh executes them; check only looks")
    books.add_argument("paths", nargs="*", metavar="NOTEBOOK", help="default: all")

    demo = verb(
        "demo", _demo,
        "the main job end to end: extraction, training, acceptance, live decoding, one report")
    demo.add_argument("-o", "--out", type=Path, metavar="DIR", help="default reports/demo")
    demo.add_argument("--profile", choices=("smoke", "demo"), default="demo",
                      help="smoke is the small one, for tests")

    simulate = verb("simulate", _simulate, "write a dataset folder of simulated drives")
    simulate.add_argument("folder", type=Path)
    simulate.add_argument("--split", choices=("train", "test"), default="train")
    simulate.add_argument("-n", "--sequences", type=int, default=4)
    simulate.add_argument("--seed", type=int, default=0)
    simulate.add_argument("--workers", type=int, default=1)

    pair = verb("pair", _pair, "train the embedded pair from scratch; resumes where it stopped")
    pair.add_argument("-o", "--out", type=Path, metavar="DIR",
                      help="default runs/pair_<profile>_<seed>")
    pair.add_argument("--profile", choices=("smoke", "quick", "full"), default="full",
                      help="full takes about two hours on two cores")
    pair.add_argument("--seed", type=int, default=0)
    pair.add_argument("--device", default="cpu")
    pair.add_argument("--workers", type=int, default=2, help="processes that simulate")
    pair.add_argument("--sequences", type=int, default=40, help="held-out drives for the card")

    bench = verb("bench", _bench, "measure one room against its alternatives, as ratios of one run")
    bench.add_argument("what", choices=("extract", "train", "metrics"))
    bench.add_argument("-o", "--out", type=Path, metavar="DIR", help="default reports/bench_<what>")

    doctor = verb("doctor", _doctor,
                  "look at Python, packages, disk, GPU, browser, and optionally a pair")
    doctor.add_argument("--pair", default="", help="also load this pair: embedded, or a folder")
    _number_format(doctor, "float32")
    doctor.add_argument("--device", default="cpu", help="where to load it: cpu, cuda, cuda:1, …")

    plan = verb(
        "plan", _plan,
        "predict memory, disk and hours of extraction and training, before anything starts")
    plan.add_argument("--pair", default="full",
                      help="full (EventGPT-7B and Video-LLaVA-7B), embedded, or a pair folder")
    _number_format(plan, "bfloat16")
    plan.add_argument("--clips", type=int, default=5000)
    plan.add_argument("--questions", type=int, default=10, help="asked of every clip")
    plan.add_argument("--max-new-tokens", type=int, default=50)
    plan.add_argument("--batch", type=int, default=10, help="answers at a time")
    plan.add_argument("--stored", default="fp16", choices=("fp32", "bf16", "fp16", "int8"),
                      help="how states are stored")
    plan.add_argument("--modes", default="teacher_forced,free_running", help="kinds of pairs")
    plan.add_argument("--levels", default="L1,L4,L5F,B1", help="adapters to train")
    plan.add_argument("--epochs", type=int, default=50)
    plan.add_argument(
        "--machine", default="a100-80",
        help="data-sheet speeds: t4, l4, rtx3090, rtx4090, a100-40, a100-80, h100, h200")
    plan.add_argument("--measure", metavar="DEVICE", nargs="?", const="cpu",
                      help="time this machine instead (cpu or cuda), seconds")
    plan.add_argument("--tflops", type=float, help="what the device reaches in half precision")
    plan.add_argument("--gb-s", type=float, help="memory bandwidth it reaches")
    plan.add_argument("--memory-gb", type=float, help="memory it has")

    dsec = verb(
        "prepare-dsec", _prepare_dsec,
        "cut raw DSEC sequences into a dataset folder; resumes after the last finished sequence")
    dsec.add_argument("source", type=Path, help="folder of raw sequences, or one of them")
    dsec.add_argument("root", type=Path, help="dataset folder to write or to continue")
    dsec.add_argument("--split", choices=("train", "test"), default="train")
    dsec.add_argument("--clip-ms", type=int, default=1000)
    dsec.add_argument("--hop-ms", type=int, default=500,
                      help="from one clip's start to the next one's")
    dsec.add_argument("--video-size", default="", metavar="WxH",
                      help="resize the pictures; as they are by default")
    dsec.add_argument("--canvas", choices=("slice", "sensor"), default="slice",
                      help="of the event frames; slice is the official one")
    dsec.add_argument("--rectify", action="store_true",
                      help="move events by the sequence's rectify map")

    imported = verb("import-traces", _import_traces,
                    "token ids of models that ran elsewhere as a run: agreement, floors, replay")
    imported.add_argument("file", type=Path,
                          help="JSON {question, rows: [{clip, drafter_ids, verifier_ids}]}")
    imported.add_argument("-o", "--out", type=Path, metavar="DIR",
                          help="run folder, default runs/<file>")
    imported.add_argument("--gamma", type=int, default=5, help="draft tokens a round")
    imported.add_argument("--gamma-prefill", type=int, default=0,
                          help="draft tokens made behind the verifier's prefill")
    imported.add_argument("--blocks", type=int, default=10,
                          help="blocks of clips; floors never see the block they are tried on")
    imported.add_argument("--prices", type=Path, metavar="JSON",
                          help="measured seconds, to price the replayed schedules")
    extract_command.add_verbs(verb)
    return top


def _number_format(verb: argparse.ArgumentParser, dtype: str) -> None:
    verb.add_argument("--dtype", default=dtype,
                      help=f"float32, bfloat16 or float16 (default {dtype})")
    verb.add_argument("--quant", choices=("4bit", "8bit"),
                      help="quantise the decoders' linear layers with bitsandbytes")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. argv: without the program's name; default the command line. Returns the exit
    status."""
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = parser().parse_args(given)
    arguments.argv = given
    try:
        return arguments.action_of(arguments)
    except XsdError as error:
        print(f"xsd: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
