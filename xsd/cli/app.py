"""The verbs of ``xsd``, and what becomes of a mistake."""

import shutil
import sys
from pathlib import Path
from typing import Any, Literal

from typer import Argument, Exit, Option, Typer

from xsd import __version__
from xsd.cli import data, models
from xsd.cli.data import DEVICE, NUMBERS, OUT, QUANT, QUIET, Quant, Stored, examples, words
from xsd.cli.exits import alone, beside, say
from xsd.core import ROOT, ParameterError, XsdError, as_used


def _end(status: int | None, **_: Any) -> None:
    raise Exit(status or 0)  # what a verb returns is the exit status


HELP = ("-h", "--help")
PAIR_WORDS = ("train", "card", *HELP)
app = Typer(result_callback=_end, context_settings={"help_option_names": HELP}, **QUIET)
app.add_typer(models.app)
app.add_typer(data.app, name="data")
app.add_typer(models.pair_app, name="pair")
DATA_VERBS = [(one.name or one.callback.__name__).replace("_", "-")
              for one in data.app.registered_commands]


def run(argv: list[str] | None = None) -> int:
    """Run one verb and return its exit status (see xsd/cli/door.py)."""
    given = list(sys.argv[1:] if argv is None else argv)
    # As they were written before the verbs stood in groups.
    if given[:1] == ["pair"] and (len(given) == 1 or given[1] not in PAIR_WORDS):
        given.insert(1, "train")
    elif given and given[0] in DATA_VERBS:
        given.insert(0, "data")
    try:
        app(given, prog_name="xsd", obj=given)
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):  # typer's 1 says less than ours
            raise stop.__context__ from None
        return int(stop.code or 0)
    except XsdError as error:
        return say(str(error))
    return 0


def _version(asked: bool) -> None:
    if asked:
        print(f"xsd {__version__}")
        raise Exit()


@app.callback()
def _top(version: bool = Option(False, "--version", callback=_version, is_eager=True,
                                help="print it and stop")) -> None:
    """Cross-modal speculative decoding: an event-camera drafter for a video verifier."""


def _names() -> list[str]:
    return sorted(path.stem for path in (ROOT / "notebooks").glob("[0-9]*.ipynb"))


NOTEBOOK = Argument(help="number (05), stem (05_live) or path", autocompletion=_names)
PARAMETER = Option([], "-p", "--parameter", metavar="NAME=VALUE",
                   help="may be repeated; lists are written a,b")


PROFILE = Option("", help="parameters in YAML, by the name of a shipped file (such as 7b-bf16) or "
                 "a path; -p comes over them")


def _notebook(notebook: str) -> tuple[Path, Any]:
    """Its file and the model of its parameters."""
    from xsd.runs import notebooks, parameters

    source = notebooks.find(notebook)
    return source, parameters.model_of(source.stem)


@app.command("run", epilog=examples(
    "xsd run 05 -p n_samples=4 -p arms=ar,L1 -o reports/live", "xsd run 04 --help-parameters",
    "xsd run 01-06 --profile 7b-4bit-24gb -p pair=checkpoints/7b -p data=dsec -p test_data=dsec"))
def run_one(notebook: str = Argument(help="number (05), stem (05_live) or path; 01-06: one after "
                                     "the other, and the report", autocompletion=_names),
            parameter: list[str] = PARAMETER, out: Path | None = OUT,
            profile: str = PROFILE,
            help_parameters: bool = Option(False, "--help-parameters",
                                           help="print what the notebook takes, and stop")) -> None:
    """Execute a notebook headless, with checked parameters, into reports/<notebook>."""
    from xsd.runs import demo, notebooks, profiles

    if steps := demo.steps_of(notebook):
        out = out or ROOT / "reports" / (Path(profile).stem or notebook)
        print(f"the report: {demo.run(out, profile=profile, changes=parameter, steps=steps)}")
        return
    source, model = _notebook(notebook)
    if help_parameters:
        for name, field in model.model_fields.items():
            print(f"{name} = {field.get_default()!r}\n    {field.description}")
        return
    values = profiles.values(profile, parameter, source.stem)[source.stem]
    out = (out or ROOT / "reports" / source.stem).resolve()
    before = (out / source.name).is_file()
    target = notebooks.run_notebook(source, out, values)
    print(f"finished: {target}" + (", in place of an earlier run's" if before else ""))


@app.command(epilog=examples("xsd sweep 04 gamma=3,5 'levels=L1|L4|L5F,B1' -j 2",
                             "xsd sweep 02 level=L1,L4 seed=0,1,2 -p epochs=20",
                             "xsd sweep 04 gamma=3,5 -p run_dir=runs/mine"))
def sweep(notebook: str = NOTEBOOK,
          axis: list[str] = Argument(None, metavar="NAME=V1,V2 …",
                                     help="what is varied; lists stand between |"),
          grid: list[str] = Option([], "-g", "--grid", metavar="NAME=V1,V2", help="the same"),
          parameter: list[str] = PARAMETER, profile: str = PROFILE, out: Path | None = OUT,
          jobs: int = Option(1, "-j", "--jobs", min=1, max=256, help="points at a time")) -> int:
    """Execute a notebook over a grid, into reports/sweep_<notebook>; resumes.

    Points share one extraction and one training per level, or those of run_dir.
    """
    from xsd.files import atomic_write
    from xsd.runs import command_line, folder, listing, profiles
    from xsd.steps import sweep as points

    source, model = _notebook(notebook)
    axes = command_line.read_grid([*(axis or []), *grid], model)
    fixed = profiles.values(profile, [], source.stem)[source.stem]
    fixed = {name: value for name, value in fixed.items() if name not in axes}
    target = (out or ROOT / "reports" / f"sweep_{source.stem}").resolve()
    fixed |= command_line.read_values(parameter, model)
    rows = points.run(source, axes, target, fixed=fixed, jobs=jobs)
    kept, place = points.metrics(listing.sweep_of(target)["runs"]), folder.shown(target)
    atomic_write(target / "sweep.csv", kept.to_csv(index=False))
    print(listing.shown(points.metrics(rows)).to_string(index=False))
    print(f"the table: {place}/sweep.csv; side by side: xsd run 06 -p runs={place} "
          f"-p run_dir={place}/compared")
    failed = [row for row in rows if row["status"] == "failed"]
    if failed:
        print(f"{len(failed)} of {len(rows)} runs failed; run the same command again to try only "
              "those", file=sys.stderr)
    return 1 if failed else 0


@app.command(epilog=examples("xsd runs", "xsd runs reports/sweep_04_tokens --csv > points.csv"))
def runs(folder: list[Path] = Argument(None, help="default: runs and reports"),
         as_csv: bool = Option(False, "--csv"), as_json: bool = Option(False, "--json")) -> None:
    """List runs: date, notebooks, the parameters that differ, and what came of them."""
    from xsd.runs import listing

    if missing := [place for place in folder or () if not place.is_dir()]:
        raise ParameterError(f"there is no folder {missing[0]}; give one that holds runs")
    found = listing.listing(folder or [ROOT / "runs", ROOT / "reports"])
    if as_json:
        print(found.to_json(orient="records", indent=1, force_ascii=False))
    elif as_csv:
        print(found.to_csv(index=False), end="")
    else:
        print("there is no run yet; xsd run NB makes one" if found.empty else
              listing.shown(found).to_string(index=False))


@app.command(epilog=examples("xsd report", "xsd report reports/05_live"))
def report(folder: Path | None = Argument(None, help="with executed notebooks"),
           out: Path | None = OUT) -> None:
    """Build the site of all runs into reports/site, or make a folder's notebooks offline pages."""
    from xsd.runs import demo as chain
    from xsd.runs import report as pages

    if folder is None:
        site = out or ROOT / "reports" / "site"
        with alone(site):
            print(f"the site: {chain.site([ROOT / 'runs', ROOT / 'reports'], site)}")
        return
    executed = sorted(path for path in folder.glob("*.ipynb") if path.is_file())
    if not executed:
        raise ParameterError(f"there is no executed notebook in {folder}; run one with xsd run NB "
                             f"-o {folder}")
    with alone(folder):
        for path in executed:
            print(pages.notebook_page(path, (out or folder) / "notebooks"))


@app.command(epilog=examples("xsd export reports/demo/run", "xsd export runs/mine --as pdf -o fig"))
def export(run: Path = Argument(help="run folder"), out: Path | None = OUT,
           kinds: str = Option("png,svg,pdf", "--as", help="kinds of pictures")) -> None:
    """Write every figure and table of a run's page as PNG, SVG, PDF; CSV, Markdown, LaTeX."""
    from xsd.runs import exports

    place = out or run / "figures"
    print(f"{exports.export(run, place, kinds=words(kinds))}: {place}")


@app.command("notebooks", epilog=examples("xsd notebooks check", "xsd notebooks refresh 04 05"))
def keep_notebooks(
    action: Literal["check", "refresh", "normalise"] = Argument(
        help="refresh executes them; check only looks"),
    notebook: list[str] = Argument(None, help="default: all", autocompletion=_names),
) -> None:
    """Keep the committed notebooks in the form that git and nbval need."""
    hygiene = beside("tools.hygiene")
    paths = [_notebook(one)[0] for one in notebook or []] or hygiene.committed()
    for path in paths if action != "check" else []:
        print(f"{action} {path.name}", flush=True)
        with alone(path.parent, f".{path.stem}.lock"):
            getattr(hygiene, action)(path)
    hygiene.check(paths)
    print(f"{len(paths)} notebooks are in their committed form")


@app.command(epilog=examples("xsd demo", "xsd demo --profile smoke -o reports/small"))
def demo(out: Path | None = OUT,
         profile: str = Option("demo", help="smoke is the small one")) -> None:
    """Extraction, training, acceptance, live decoding, one report, into reports/demo."""
    from xsd.runs import demo as main_job

    print(f"the report: {main_job.run(out or ROOT / 'reports' / 'demo', profile=profile)}")


@app.command(epilog=examples("xsd doctor --pair embedded",
                             "xsd doctor --pair checkpoints/7b --dtype bfloat16 --device cuda"))
def doctor(pair: str = Option("", help="also load this pair: embedded, or a folder"),
           dtype: str = Option("auto", help=NUMBERS), quant: Quant = QUANT,
           device: str = Option("auto", help=f"where to load it: {DEVICE}")) -> int:
    """Look at Python, packages, disk, GPU, browser, and optionally a pair."""
    from xsd.runs import doctor as examiner

    findings = examiner.examine(pair=pair)
    print(*findings, sep="\n", flush=True)
    if pair:
        from xsd.steps import plan as planned

        found = planned.examine(pair, dtype=dtype, quant=quant, device=device)
        print(*found, sep="\n")
        findings += found
    return 1 if any(finding.state == "bad" for finding in findings) else 0


SOME: dict[str, Any] = {"min": 1, "max": 10**9}


@app.command(epilog=examples("xsd plan --machine rtx4090 --quant 4bit --batch 2 --clips 2000",
                             "xsd plan --pair embedded --measure"))
def plan(
    pair: str = Option("full", help="full (EventGPT-7B, Video-LLaVA-7B), embedded, or a folder"),
    dtype: str = Option("bfloat16", help=NUMBERS),
    quant: Quant = QUANT,
    clips: int = Option(5000, **SOME),
    questions: int = Option(10, help="asked of every clip", **SOME),
    max_new_tokens: int = Option(50, **SOME),
    batch: int = Option(10, help="answers at a time", **SOME),
    stored: Stored = Option("fp16", help="how states are stored"),
    modes: str = Option("teacher_forced,free_running", help="kinds of pairs"),
    levels: str = Option("L1,L4,L5F,B1", help="adapters to train"),
    epochs: int = Option(50, **SOME),
    machine: str = Option("a100-80", help="with its data-sheet speeds: t4, l4, rtx3090, rtx4090, "
                          "a100-40, a100-80, h100, h200"),
    measure: bool = Option(False, "--measure", help="time this machine instead"),
    device: str = Option("auto", help=f"what --measure times: {DEVICE}"),
    tflops: float | None = Option(None, help="what the device reaches in half precision"),
    gb_s: float | None = Option(None, help="memory bandwidth it reaches"),
    memory_gb: float | None = Option(None, help="memory it has"),
) -> None:
    """Predict memory, disk and hours of extraction and training, before anything starts."""
    from xsd.models import planning
    from xsd.steps import plan as planned

    if not measure and machine not in planning.MACHINES:
        raise ParameterError(f"there is no machine {machine!r}; choose one of "
                             f"{', '.join(planning.MACHINES)}, or --measure")
    found = planning.measure_machine(as_used(device)[0]) if measure else planning.MACHINES[machine]
    found = found.reaching(tflops=tflops, gb_s=gb_s, memory_gb=memory_gb)
    print(planned.text(planned.make(found, pair=pair, dtype=dtype, quant=quant, clips=clips,
                                    questions=questions, new_tokens=max_new_tokens, batch=batch,
                                    stored=stored, modes=words(modes), levels=words(levels),
                                    epochs=epochs, disk_free=shutil.disk_usage(ROOT).free)))
