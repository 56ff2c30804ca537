"""``xsd train``, ``evaluate``, ``self-test``, ``bench`` and ``pair …``: adapters, rooms and the
embedded pair, from the command line."""

from pathlib import Path
from typing import Any, Literal

from typer import Argument, Option, Typer

from xsd.cli.data import DEVICE, OUT, QUIET, examples
from xsd.cli.exits import alone, beside
from xsd.core import ROOT, ParameterError, as_used

app = Typer(**QUIET)
pair_app = Typer(help="Train the embedded pair, judge it.", **QUIET)
LEVEL = Option([], "-l", "--level", help="may be repeated; L1 to L6, X1, B1 or module:Class")
OPTIONS = Option("", help="of the adapters, for all or by level: 'L5: {layers: 2}'")


def _read(text: str) -> dict[str, Any]:
    from xsd.runs import command_line, typed

    return command_line.read_mapping(text, lambda why: ParameterError(
        f"--options cannot be {typed.shortened(text)}: {why}"))


@app.command(epilog=examples(
    "xsd train runs/dsec/shards/train_dsec -o runs/dsec -l L4 --recipe reference",
    "xsd train old/chunked_train_1s_4bit -o runs/old -l L5 --options 'layers: 2' "
    "--validation old/chunked_val_1s_4bit --head old/vl_lm_head.pt"))
def train(
    pairs: str = Argument(help="a finished extraction, shards, another run, or .pt chunks"),
    out: str = Option(..., "-o", "--out", metavar="RUN", help="run folder to train into"),
    level: list[str] = LEVEL,
    validation: str = Option("", help="pairs that choose the best epoch; default: held back"),
    recipe: str = Option("best", help="how to train, as in notebook 02"),
    options: str = OPTIONS, head: str = Option("", help="LM head, a file or a folder of shards"),
    seed: int = 0, device: str = Option("auto", help=DEVICE),
    parameter: list[str] = Option([], "-p", "--parameter", metavar="NAME=VALUE",
                                  help="anything else that notebook 02 takes"),
) -> None:
    """Train adapters on pairs named by path, into RUN/adapters; resumes."""
    from xsd.runs import command_line, parameters
    from xsd.steps import training

    more = command_line.read_values(parameter, parameters.TrainParameters)
    if twice := more.keys() & {"run_dir", "data", "validation_data", "recipe", "head", "seed",
                               "device", "options", "levels"}:
        raise ParameterError(f"-p {min(twice)}=… has an argument or option of its own; give that")
    given = parameters.TrainParameters.checked({
        "run_dir": out, "data": pairs, "validation_data": validation, "recipe": recipe,
        "head": head, "seed": seed, "device": device, "options": _read(options),
        **({"levels": level} if level else {}), **more})
    results = training.run(given, progress=lambda name, row: print(
        f"{name} epoch {row['epoch']}: loss {row['validation_total']:.4f}, cosine "
        f"{row['cosine_similarity']:.4f}", flush=True))
    print(training.table(results["levels"]).to_string(index=False))
    print(training.trainings(out).to_string(index=False))


@app.command(epilog=examples(
    "xsd evaluate runs/a/adapters/L4 --pairs data/test --train data/train -o reports/l4",
    "xsd evaluate best_model.pt --pairs chunked_test --head vl_lm_head.pt -o reports/theirs"))
def evaluate(
    adapter: list[str] = Argument(help="files or folders of adapters"),
    pairs: str = Option(..., help="an extraction, shards, or the reference's .pt chunks"),
    head: str = Option("", help="the verifier's LM head; default: the one stored with the pairs"),
    train: str = Option("", help="training pairs, for the floors and the check of leakage"),
    out: Path = Option(..., "-o", "--out", metavar="DIR", help="write here"),
    gamma: int = Option(5, min=1, max=64, help="draft tokens a round"),
    timing: str = Option("reference", help="times of the predicted speed-ups: reference, measured "
                                           "(in DIR), or a JSON file of own ones in ms"),
    device: str = Option("auto", help=DEVICE),
) -> None:
    """Judge adapters by path on stored pairs: the printed report, tables, the token table."""
    from xsd.files import FolderLock
    from xsd.steps import judge

    with FolderLock(out.resolve(), "evaluate.lock"):
        print(judge.judge(adapter, pairs, out.resolve(), head=head, train=train, gamma=gamma,
                          timing=timing, device=device))


@app.command(epilog=examples("xsd self-test --width 4096", "xsd self-test runs/smoke/adapters/L4",
                             "xsd self-test -l L5 --options 'layers: 2'"))
def self_test(
    file: list[Path] = Argument(None, help="adapter files or folders"),
    level: list[str] = LEVEL,
    width: int = Option(192, min=1, max=65_536, help="hidden size of the levels"),
    positions: int = Option(50, min=1, max=65_536, help="of the answer that is timed"),
    options: str = OPTIONS,
) -> None:
    """Every level, or adapters by path: parameters, MB, and milliseconds on this machine."""
    import pandas as pd

    from xsd.adapters import checks, registry

    chosen = [*map(str, file or ()), *level] or list(registry.LEVELS)
    given = _read(options)
    if own := given.keys() & {"hidden_size", "levels", "positions"}:
        raise ParameterError(f"--options cannot hold {min(own)}, which is an option of its own")
    rows = checks.self_test(width, levels=chosen, positions=positions, **given)
    print(pd.DataFrame(rows).to_string(index=False, float_format="{:.3f}".format))


@app.command(epilog=examples("xsd bench train -o reports/here", "xsd bench full-size",
                             "xsd bench full-size --size tiny --device cpu"))
def bench(what: Literal["extract", "train", "metrics", "explorer", "full-size"],
          out: Path | None = OUT,
          size: Literal["full", "tiny"] = Option(None, help="of full-size: two 7B models made in "
                                                 "memory (the default), or tiny ones"),
          device: str = Option(None, help=f"of full-size: {DEVICE}")) -> None:
    """Measure one room, or everything at full size, into reports/bench_<what>."""
    out = out or ROOT / "reports" / f"bench_{what.replace('-', '_')}"
    given = {name: one for name, one in (("size", size), ("device", device)) if one is not None}
    if given and what != "full-size":
        raise ParameterError(f"--{min(given)} is of full-size; xsd bench {what} takes none")
    with alone(out, "bench.lock"):
        print(beside(f"benchmarks.{what.replace('-', '_')}").run(out, **given))


SEQUENCES = Option(40, min=1, max=100_000, help="held-out drives for the card")


@pair_app.command("train", epilog=examples("xsd pair train --profile quick --seed 1"))
def train_pair(profile: Literal["smoke", "quick", "full", "smollm2"] = Option(
              "full", help="full and smollm2 (the pair on a public decoder) take about two hours "
              "on two cores"),
          seed: int = 0, device: str = Option("auto", help=DEVICE), out: Path | None = OUT,
          workers: int = Option(2, min=1, max=256, help="processes that simulate"),
          sequences: int = SEQUENCES) -> None:
    """Train the embedded pair, or the one on SmolLM2, into runs/pair_<profile>_<seed>; resumes."""
    recipe = beside("studies.embedded_pair.recipe")
    out = Path(out or recipe.default_folder(profile, seed))
    with alone(out, "pair.lock"):
        written = recipe.train(out, profile, seed=seed, device=as_used(device)[0], workers=workers,
                               progress=recipe.bars())
    about = beside("studies.embedded_pair.card").score(
        written, n_sequences=sequences,
        command=f"`xsd pair train --profile {profile} --seed {seed}`")
    print(f"the pair: {written}; its card: {about}")


@pair_app.command(epilog=examples("xsd pair card runs/pair_full_0/pair"))
def card(folder: Path = Argument(help="a trained embedded pair"),
         sequences: int = SEQUENCES) -> None:
    """Judge a trained pair on held-out drives and write its card."""
    judge = beside("studies.embedded_pair.card")
    print(judge.score(folder, n_sequences=sequences, command=f"`xsd pair card {folder}`"))
