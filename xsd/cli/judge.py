"""``xsd evaluate``: adapters by path on stored pairs by path."""

from __future__ import annotations

from pathlib import Path

from typer import Argument, Option

from xsd.cli.data import examples

EXAMPLES = examples(
    "xsd evaluate runs/a/adapters/L4 --pairs data/test --train data/train -o reports/l4",
    "xsd evaluate best_model.pt --pairs chunked_test --head vl_lm_head.pt -o reports/theirs")


def evaluate(
    adapter: list[str] = Argument(help="files or folders of adapters"),
    pairs: str = Option(..., help="an extraction, shards, or the reference's .pt chunks"),
    head: str = Option("", help="the verifier's LM head; default: the one stored with the pairs"),
    train: str = Option("", help="training pairs, for the floors and the check of leakage"),
    out: Path = Option(..., "-o", "--out", metavar="DIR", help="write here"),
    gamma: int = Option(5, min=1, help="draft tokens a round"),
    timing: str = Option("reference", help="times of the predicted speed-ups: reference, measured "
                                           "(in DIR), or a JSON file of own ones in ms"),
) -> None:
    """Judge adapters by path on stored pairs: the printed report, tables, the token table."""
    from xsd.steps import judge

    print(judge.judge(adapter, pairs, out.resolve(), head=head, train=train, gamma=gamma,
                      timing=timing))
