"""The printed evaluation report: eight sections of plain text, for terminals and notebooks
(docs/metrics.md, section 9)."""

from typing import Any

import pandas as pd

from xsd.core import printable
from xsd.evaluate import speedup
from xsd.evaluate.statistics import Interval

_WIDTH = 100


class _Figures:
    """The long table of one level, by metric, threshold and position."""

    def __init__(self, metrics: pd.DataFrame) -> None:
        keys = metrics.reindex(columns=["metric", "threshold", "position"]).astype(object)
        keys = keys.where(keys.notna(), None).itertuples(index=False, name=None)
        self.rows = dict(zip(keys, metrics.to_dict("records"), strict=True))
        self.bands = metrics[metrics["metric"] == "match_given_cosine"].to_dict("records")
        self.thresholds = sorted(tau for name, tau, at in self.rows
                                 if name == "accept_at" and at is None)

    def __call__(self, metric: str, tau: float | None = None, at: int | None = None,
                 key: str = "value") -> Any:
        return self.rows[metric, tau, at][key]

    def has(self, metric: str, tau: float | None = None, at: int | None = None) -> bool:
        return (metric, tau, at) in self.rows

    def text(self, metric: str, tau: float | None = None, **form: Any) -> str:
        return _interval(self.rows[metric, tau, None]).text(**form)

    def each(self, metric: str, forms: str, tau: float | None = None) -> str:
        """``"std .2f, min .0f"`` → ``std 0.25   min 3`` of the metric's figures."""
        pairs = (form.split() for form in forms.split(", "))
        return "   ".join(f"{name} {self(f'{metric}_{name}', tau):{form}}" for name, form in pairs)


def report(title: str, metrics: pd.DataFrame, *, gamma: int, headline: pd.Series | None = None,
           floors: pd.DataFrame | None = None, positions: int = 20,
           timing: speedup.Timing | None = None, measured: float | None = None) -> str:
    """Eight sections for one level: 1 to 7 are the reference's hidden-state figures, 8 is what the
    verifier's head says, beside the floors.

    Args: metrics: the level's rows of metrics.state_figures and, where they were measured,
        token_figures and reliability.figures. gamma: as they were made with. headline: the level's
        row of judge.headline (acceptance, best floor, above floor …). floors: floor, value, low,
        high. timing: of section 6. measured: the level's speed-up in the live run.
    """
    of = _Figures(metrics)
    n_samples, n_tokens = of("length_mean", key="n"), of("cosine_mean", key="n")
    n_sequences = of("cosine_mean", key="n_clusters")
    drawn = (f"{n_sequences:.0f} sequences; intervals: 95 %, clustered by sequence"
             if n_sequences > 1 else "no interval: one sequence")
    heading = f"{n_samples:.0f} samples, {n_tokens:.0f} tokens, {drawn}"
    at = {tau: f"cos > {tau:.2f}   " for tau in of.thresholds}
    sections = {
        "[1] Cosine of aligned and verifier states": [
            f"mean {of.text('cosine_mean', percent=False, digits=4)}   "
            f"{of.each('cosine', 'std .4f, median .4f, min .4f, max .4f')}",
            "  ".join(f"{name.removeprefix('cosine_').upper()} {of(name):.4f}"
                      for name, *_ in of.rows if name.startswith("cosine_p"))],
        "[2] Accept@τ: share of tokens above the threshold (a threshold is not the verifier's "
        "verdict: see 8)": [
            f"{at[tau]}{_bar(of('accept_at', tau))} {of.text('accept_at', tau)}   relaxed, tokens "
            f"of an answer: {of.text('accepted_relaxed', tau, percent=False)}" for tau in at]
        + [f"weighted, sum of an answer's cosines: {of.text('accepted_weighted', percent=False)}"],
        "[3] Unbroken prefix: tokens above the threshold before the first one that is not": [
            f"{at[tau]}{of.text('unbroken_prefix_mean', tau, percent=False)}   "
            + of.each("unbroken_prefix", "std .2f, median .1f, min .0f, max .0f", tau)
            for tau in at],
        "[4] Answer lengths": [
            of.each("length", "mean .1f, std .1f, min .0f, max .0f") + "   (tokens)"],
        "[5] Draft acceptance by threshold: prefill (whole answer), decode (first γ)": [
            f"{at[tau]}prefill {of.text('draft_acceptance_prefill', tau)}   decode, γ = {gamma}: "
            f"{of.text('draft_acceptance_decode', tau)}" for tau in at],
        "[6] Speed-up (estimates; the live benchmark measures it)": _speedup(
            of, gamma, timing or speedup.Timing(), measured),
        "[7] By position in the answer": _positions(of, positions),
        "[8] Tokens: the verifier's verdict": _tokens(of, gamma, headline, floors),
    }
    parts = [f"{'=' * _WIDTH}\n{' '.join(title.split())}\n{heading}\n{'=' * _WIDTH}"]
    parts += ["\n".join([name, "-" * _WIDTH, *(f"  {line}" for line in lines)])
              for name, lines in sections.items()]
    return printable("\n\n".join(parts) + "\n")


def _interval(row: Any, name: str = "") -> Interval:
    """The interval of a long row, or of the columns ``name`` in a wide one."""
    keys = (name, f"{name} low", f"{name} high") if name else ("value", "low", "high")
    return Interval(*(float("nan") if row[key] is None else row[key] for key in keys), 0, 0)


_TIMES = {"quoted": "its quoted times", "own": "the times given", "measured": "this run's costs"}


def _speedup(of: _Figures, gamma: int, timing: speedup.Timing, measured: float | None) -> list[str]:
    lines = []
    if of.has("unbroken_prefix_mean", 0.9):
        estimate = speedup.reference_estimates(of("unbroken_prefix_mean", 0.9),
                                               of("draft_acceptance_decode", 0.9), gamma, timing)
        figures = "   ".join(f"{name.replace('_', ' ')} {value:.2f}×"
                             for name, value in estimate.items())
        lines += [f"the reference's formulas at cos > 0.90, {_TIMES[timing.kind]}: {figures}",
                  _verdict(estimate["end_to_end"], measured)]
    else:
        lines.append("the reference's formulas read the threshold 0.90, which was not measured")
    if of.has("token_acceptance"):
        alpha = of("token_acceptance")
        lines += [f"{alpha:.1%} of the tokens, γ = {one['gamma']}: {one['tokens']:.2f} tokens a "
                  f"round, {one['speedup']:.2f}× unbroken, {one['relaxed']:.2f}× relaxed"
                  for one in speedup.expected_table(alpha, timing)]
    shares = (f"{one['accepted']:.0%} {one['speedup']:.2f}×"
              for one in speedup.wall_clock_table(timing))
    lines.append(f"end to end when so many of the hidden drafts are accepted: {'   '.join(shares)}")
    for gamma in timing.gammas:
        needed = speedup.break_even_table([gamma], overhead=timing.overhead)
        lines.append(f"break-even, γ = {gamma}: " + "   ".join(
            f"{row['target']:g}× above {row['alpha_percent']} %" if row["alpha_percent"] <= 100 else
            f"{row['target']:g}× never" for row in needed))
    return lines


def _verdict(estimate: float, measured: float | None) -> str:
    """What the end-to-end estimate is worth, beside the clock where the run has one."""
    if measured is None:
        slower = "slower than plain decoding" if estimate < 1 else "faster than plain decoding"
        return f"(ESTIMATE from a cosine: {slower}, if it held; no clock of this run says so)"
    word = "too high" if estimate > measured else "too low"
    return (f"(ESTIMATE; the live run of this level took {measured:.2f}×, so it is "
            f"{abs(estimate - measured):.2f} {word})")


def _positions(of: _Figures, positions: int) -> list[str]:
    heads = [f"@{tau:.2f}" for tau in of.thresholds]
    with_tokens = of.has("token_acceptance")
    heads += ["token", "survival"] if with_tokens else []
    lines = ["pos      n    cos     std  " + "".join(f"{head:>9}" for head in heads) +
             f"  {heads[-1]}"]
    for t in range(positions):
        if not of.has("cosine_mean", None, t):
            break
        cells = [of("accept_at", tau, t) for tau in of.thresholds]
        if with_tokens:
            cells += [of("token_acceptance", None, t), of("token_survival", None, t)]
        n, mean = (of("cosine_mean", None, t, key) for key in ("n", "value"))
        lines.append(f"{t:>3} {n:>6.0f} {mean:>6.3f} {of('cosine_std', None, t):>7.3f}  " +
                     "".join(f"{100 * value:>8.1f}%" for value in cells) + f"  {_bar(cells[-1])}")
    return lines


def _bar(share: float, width: int = 20) -> str:
    """A share as a bar of signs that every terminal has."""
    return ("#" * round(width * share)).ljust(width, ".")


def _tokens(of: _Figures, gamma: int, headline: pd.Series | None,
            floors: pd.DataFrame | None) -> list[str]:
    if not of.has("token_acceptance"):
        return ["not measured: give the verifier's head to table.measure"]
    with_bonus = of("token_accepted_per_round_with_bonus")
    lines = [f"token acceptance {of.text('token_acceptance')}"]
    lines += [f"right token among the first {name.removeprefix('token_top')}: {of.text(name)}"
              for name, *_ in of.rows if name.startswith("token_top")]
    lines += [
        f"unbroken prefix {of.text('token_unbroken_prefix_mean', percent=False)}",
        f"accepted drafts per round, γ = {gamma}: "
        f"{of.text('token_accepted_per_round', percent=False)} without, {with_bonus:.2f} with the "
        "bonus token",
    ]
    if floors is not None:
        lines += [f"floor {row['floor']}: {_interval(row).text()}"
                  for row in floors.to_dict("records")]
    if headline is not None:
        lines.append(_sentence(headline))
    lines += [f"P(match | {row['band_low']:.2f} < cos ≤ {row['band_high']:.2f}) = "
              f"{_interval(row).text()}   n = {row['n']:.0f}" for row in of.bands]
    for tau in of.thresholds:
        if of.has("overstatement", tau):
            points = 100 * of("overstatement", tau)
            lines.append(f"Accept@{tau:.2f} {'overstates' if points > 0 else 'understates'} token "
                         f"acceptance by {abs(points):.1f} points")
    return lines


def _sentence(headline: pd.Series) -> str:
    """One honest sentence."""
    arm, floor, above = (_interval(headline, name)
                         for name in ("acceptance", "floor", "above floor"))
    verdict = "is above" if above.value > 0 else "is below"
    over = f"{headline['clusters']} sequences"
    if headline["clusters"] < 2:
        over = "one sequence, which says nothing about others"
    elif not above.excludes(0.0):
        verdict = "cannot be told from"
    return (f"The adapter's {arm.text()} of the tokens {verdict} the best floor "
            f"({headline['best floor']}, {floor.text()}): difference {above.text()} over {over}.")
