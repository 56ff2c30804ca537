"""Step 13: where acceptance is lost, what the events are worth, and what a reader may believe of it
(docs/metrics.md, sections 6 to 8).

Every arm is asked about the same tokens: positions 1 … n-1 of each held-out answer, the first one
being the verifier's own. What the reader can check is checked here: that no held-out sequence was
trained on, that the same arm measured twice agrees, which difference this many sequences could have
shown at all, and how many answers are copies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from xsd.adapters.base import Adapter
from xsd.core import ParameterError
from xsd.evaluate import counterfactual as comparison
from xsd.evaluate import decomposition, evaluate, floors, statistics, two_phase
from xsd.evaluate.acceptance import rounds_from_lists
from xsd.evaluate.counterfactual import Counts, FloorComparison
from xsd.evaluate.evaluate import Evaluation
from xsd.files import provenance
from xsd.runs import folder, parameters
from xsd.steps import acceptance, counterfactual, drafts, evaluation, extraction, words
from xsd.steps.evaluation import HeldOut, interval
from xsd.train import rollout

Matches = list[np.ndarray]
"""bool [n - 1] a sample: is the draft at position 1 … n-1 the verifier's token?"""
METRICS = ("token_acceptance", "accepted_per_round")
B1 = "B1"
ONE_STEP = "teacher-forced drafter"
SHOWN = ("free-running", ONE_STEP, "self-rollout", "drift", "rollout")
"""What docs/teacher_forcing.md sets side by side."""


@dataclass(frozen=True)
class Measured:
    """One held-out set. tables: gap, acceptances, kinds, arms, headline, reliability, misstatement,
    needed, two_phase, checks, as said where they are made.

    evaluations and above: level → one-step metrics and its comparison with the floors (token
    acceptance). tokens: the token table.
    """

    name: str
    tables: Mapping[str, pd.DataFrame]
    evaluations: Mapping[str, Evaluation]
    above: Mapping[str, FloorComparison]
    tokens: pd.DataFrame


@dataclass(frozen=True)
class Truth:
    """What step 13 found. results: as written to ``results/truth.json``. sets: name → what was
    measured on it."""

    given: parameters.TruthParameters
    results: dict[str, Any]
    sets: Mapping[str, Measured]


def truth(given: parameters.TruthParameters) -> Truth:
    """Measure every held-out set and write ``results/truth.json``.

    Raises: ParameterError for a level, set or pair that the run does not hold; MetricError when a
    held-out sequence was trained on.
    """
    sets, adapters = evaluation.pairs_and_adapters(given, "teacher_forced")
    if given.waterfall not in adapters or given.waterfall == B1:
        raise ParameterError(
            f"the waterfall is drawn for {given.waterfall}, which is not among the levels "
            f"{', '.join(adapters)} but B1"
        )
    counted = evaluation.check_leakage(given.run_dir, sets)
    training = extraction.answers(
        extraction.open_pairs(given.run_dir, "train", given.data, "teacher_forced"))
    measured = {}
    for data, one in zip(given.test_data, sets, strict=True):
        measured[one.name] = _Set(given, data, one, adapters, training).measure(counted)
    results: dict[str, Any] = {
        "gamma": given.gamma, "waterfall": given.waterfall, "sequences": counted, "test": {}
    }
    for name, found in measured.items():
        plain = {
            key: frame.astype(object).where(frame.notna(), None).to_dict("records")
            for key, frame in found.tables.items()
        }
        results["test"][name] = plain | {
            "best_floor": next(iter(found.above.values())).best, "above_floor":
                {level: interval(value.above_best) for level, value in found.above.items()},
        }
    results["provenance"] = provenance(seed=given.seed, data_hash=evaluation.pairs_hash(sets),
                                       parameters=given.model_dump())
    folder.save_results(given.run_dir, "truth", results)
    return Truth(given, results, measured)


def one_step(found: Evaluation, n_samples: int) -> Matches:
    """Matches of an evaluation at positions 1 … n-1, in the order of the data set."""
    match, mask = found.tokens.matches()
    out: Matches = [np.zeros(0, dtype=bool)] * n_samples
    for row, place in enumerate(found.index):
        hits = match[row][mask[row]].numpy()
        out[place] = hits if found.shift else hits[1:]
    return out


def counts_of(matches: Matches, gamma: int, metric: str) -> Counts:
    """(matched, positions) or (accepted, rounds) a sample."""
    if metric == "token_acceptance":
        return np.array([hit.sum() for hit in matches]), np.array([len(hit) for hit in matches])
    each = rounds_from_lists(matches, gamma).per_request()
    return each["accepted"], each["rounds"]


def side_by_side(gap: pd.DataFrame, unit: str, names: Sequence[str]) -> pd.DataFrame:
    """Levels and losses of the gap table in columns, for reading: level, and of each name its
    value, low and high (NaN: not measured)."""
    own = gap[gap["unit"] == unit].drop_duplicates(["level", "name"]).set_index(["level", "name"])
    rows = []
    for level in dict.fromkeys(own.index.get_level_values("level")):
        line: dict[str, Any] = {"level": level}
        for name in names:
            at = (level, "verifier-self" if level == B1 and name == ONE_STEP else name
                  )  # B1's own one step has another name
            sides = (("value", name), ("low", f"{name} low"), ("high", f"{name} high"))
            line |= {
                column: own.loc[at, side] if at in own.index else np.nan for side, column in sides
            }
        rows.append(line)
    return pd.DataFrame(rows)


class _Set:
    """The measurements of one held-out set; ``used`` are the samples with a position to draft."""
    def __init__(self, given: parameters.TruthParameters, data: str, own: HeldOut,
                 adapters: Mapping[str, Adapter], training: list[list[int]]) -> None:
        self.given, self.data, self.own, self.adapters, self.training = given, data, own, adapters, training
        about = extraction.pair_file(given.run_dir)
        self.texts = about["token_texts"]
        self.answers = extraction.answers(own.dataset)
        self.used = acceptance.drafted_samples(own.name, self.answers)
        self.prompts = [
            about["prompt_ids"][question] for question in own.dataset.table()["question"]
        ]
        self.clusters = [own.clusters[i] for i in self.used]
        self.options = {"n_resamples": given.resamples, "seed": given.seed}

    def measure(self, sequences: Mapping[str, int]) -> Measured:
        evaluations = {
            level: self._evaluate(adapter, self.own) for level, adapter in self.adapters.items()
        }
        steps = {
            level: self._used(one_step(found, len(self.answers)))
            for level, found in evaluations.items()
        }
        arms = counterfactual.shown(
            self.given, self.data,
            self.own) if self.given.drafter_sees else {counterfactual.REAL: self.own}
        drafted = {arm: self._drafts(shown) for arm, shown in arms.items()}
        own = drafted[counterfactual.REAL]
        rolled = {level: self._used(one.match) for level, one in own.items()}
        free = self._free_running()
        above = {
            level: self._above(rolled[level], own, "token_acceptance") for level in self.adapters
        }
        gap = self._gap(steps, rolled, free)
        tables = {
            "gap": gap, "acceptances": pd.concat([
                evaluation.with_intervals(side_by_side(gap, unit, SHOWN), SHOWN if at == 0 else
                                          ()).assign(unit=unit) for at, unit in enumerate(METRICS)
            ]), "kinds": self._kinds(steps, rolled, free, drafted), "arms": self._arms(drafted),
            "headline": self._headline(rolled, own, above),
            **self._reliability(evaluations), "two_phase": self._two_phase(evaluations),
            "checks": self._checks(drafted, sequences),
        }  # fmt: skip
        tokens = acceptance.token_table(self.own, own, self.texts).assign(data=self.own.name)
        return Measured(self.own.name, tables, evaluations, above, tokens)

    def _evaluate(self, adapter: Adapter, own: HeldOut) -> Evaluation:
        given = self.given
        options = {
            "thresholds": tuple(sorted({*given.thresholds, given.threshold})),
            "top_k": (1, given.top_k), "gamma": given.gamma
        }
        return evaluate.evaluate(adapter, own.batches(given.batch_size), own.head, **options)

    def _used(self, matches: Matches) -> Matches:
        return [matches[i] for i in self.used]

    def _drafts(self, shown: HeldOut) -> dict[str, drafts.Drafts]:
        """Level → what a greedy loop drafts, and the drafter's own tokens. B1 reads no drafter and
        is drafted on the real arm only."""
        out = {}
        for level, adapter in self.adapters.items():
            if shown is self.own or adapter.reads != "verifier":
                out[level] = drafts.drafts_of(adapter, shown, gamma=self.given.gamma,
                                              batch_size=self.given.batch_size)
        return out | {acceptance.DRAFTER: drafts.drafter_drafts(shown, self.given.batch_size)}

    def _free_running(self) -> dict[str, Matches]:
        """Matches on the free-running pairs, levels that read the drafter alone; empty where the
        run has none.

        Position t of the drafter's own text stands beside position t of the verifier's; beyond its
        end nothing is drafted: no match.
        Raises: ParameterError when they are pairs of other samples.
        """
        if not extraction.shard_folder(self.given.run_dir, "test", self.data,
                                       "free_running").is_dir():
            return {}
        free = evaluation.held_out(self.given.run_dir, self.data, "free_running")
        place = {key: i for i, key in enumerate(self.own.keys)}
        if set(free.keys) != set(place):
            raise ParameterError(
                f"the free-running pairs of {self.own.name} are of other samples than the "
                "teacher-forced; extract both"
            )
        out = {}
        for level, adapter in self.adapters.items():
            if adapter.reads == "drafter":
                matches = [np.zeros(len(ids) - 1 if ids else 0, dtype=bool) for ids in self.answers]
                for key, hits in zip(free.keys,
                                     one_step(self._evaluate(adapter, free), len(free.keys)),
                                     strict=True):
                    own = matches[place[
                        # shorter where a token that the drafter lacks ended the teacher-forced
                        # answer
                        key]]
                    own[:len(hits)] = hits[:len(own)]
                out[level] = self._used(matches)
        return out

    def _counts(self, matches: Matches, metric: str) -> Counts:
        return counts_of(matches, self.given.gamma, metric)

    def _gap(self, steps: Mapping[str, Matches], rolled: Mapping[str, Matches],
             free: Mapping[str, Matches]) -> pd.DataFrame:
        """level, unit (one of METRICS), and the rows of decomposition.rows: levels and losses with
        start and end."""
        rows = []
        for unit in METRICS:
            for level in steps:
                arms = {
                    name: self._counts(matches, unit)
                    for name, matches in _chain(level, steps, rolled, free).items()
                }
                rows += [{"level": level, "unit": unit, **row}
                         for row in decomposition.gap(arms, self.clusters, **self.options)]
        return pd.DataFrame(rows)

    def _kinds(self, steps: Mapping[str, Matches], rolled: Mapping[str, Matches],
               free: Mapping[str, Matches], drafted: Mapping[str, Mapping[str, drafts.Drafts]],
               ) -> pd.DataFrame:  # fmt: skip
        """What the waterfall's level loses within each kind of word: loss, group, value, low, high,
        n."""
        level = self.given.waterfall
        arms = _chain(level, steps, rolled, free)
        losses = decomposition.losses_between(arms)
        for arm in self.given.drafter_sees:
            arms[arm] = self._used(drafted[arm][level].match)
            losses.append((arm, decomposition.ROLLOUT, arm))
        groups = [
            kind for i in self.used
            for kind in words.token_kinds([self.texts[token] for token in self.answers[i]])[1:]
        ]
        clusters = np.repeat(self.clusters, [len(hit) for hit in rolled[level]])
        rows = decomposition.loss_by_group(
            {name: np.concatenate(matches) for name, matches in arms.items()}, losses, groups,
            clusters, **self.options)
        return pd.DataFrame(rows).sort_values("n", ascending=False, kind="stable")

    def _arms(self, drafted: Mapping[str, Mapping[str, drafts.Drafts]]) -> pd.DataFrame:
        """level, unit, arm, value, low, high, n, and for all but the real events the paired
        difference and what was detectable."""
        rows = []
        for unit in METRICS:
            for level in drafted[counterfactual.REAL]:
                found = {
                    arm: self._counts(self._used(one[level].match), unit)
                    for arm, one in drafted.items() if level in one
                }
                compared = comparison.compare_arms(found, counterfactual.REAL, self.clusters,
                                                   **self.options)
                rows += [{"level": level, "unit": unit, **row} for row in compared]
        return pd.DataFrame(rows).drop(columns=["metric"])

    def _floors(self, own: Mapping[str, drafts.Drafts], unit: str) -> dict[str, Counts]:
        answers, prompts = [self.answers[i]
                            for i in self.used], [self.prompts[i] for i in self.used]
        at = METRICS.index(unit)
        counted = {
            name: both[at] for name, both in acceptance.floor_counts(self.training, answers, prompts,
                                                                    self.given.gamma).items()
        }
        counted[acceptance.DRAFTER] = self._counts(self._used(own[acceptance.DRAFTER].match), unit)
        return {name: counted[key] for name, key in acceptance.FLOORS.items()}

    def _above(self, matches: Matches, own: Mapping[str, drafts.Drafts],
               unit: str) -> FloorComparison:
        return comparison.compare_with_floors(self._counts(matches, unit), self._floors(own, unit),
                                              self.clusters, **self.options)

    def _headline(self, rolled: Mapping[str, Matches], own: Mapping[str, drafts.Drafts],
                  above: Mapping[str, FloorComparison]) -> pd.DataFrame:
        """level, unit, its acceptance and the distance above the best floor with intervals, the
        floor's name and what was detectable."""
        rows = []
        for unit in METRICS:
            counted = self._floors(own, unit)
            for level in self.adapters:
                found = above[level] if unit == "token_acceptance" else self._above(
                    rolled[level], own, unit)
                line: dict[str, Any] = {
                    "level": level, "unit": unit, "best floor": found.best, "n": found.arm.n
                }
                line["clusters"] = found.arm.n_clusters
                for name, value in (("acceptance", found.arm), ("floor", found.floors[found.best]),
                                    ("above floor", found.above_best)):
                    line |= {
                        name: value.value, f"{name} low": value.low, f"{name} high": value.high
                    }
                apart = _rates(self._counts(rolled[level], unit)) - _rates(counted[found.best])
                line["detectable"] = statistics.minimum_detectable_effect(
                    apart, self.clusters) if line["clusters"] > 1 else None
                rows.append(line)
        return pd.DataFrame(rows)

    def _reliability(self, evaluations: Mapping[str, Evaluation]) -> dict[str, pd.DataFrame]:
        """reliability: rows of ReliabilityResult by level. misstatement: Accept@τ against token
        acceptance. needed: τ for a share."""
        bands, wrong, needed = [], [], []
        for level, found in evaluations.items():
            result = found.reliability.result(**self.options)
            bands += [{"level": level, **row} for row in result.rows()]
            for tau, at in result.thresholds.items():
                difference = {
                    "overstates": at.difference.value, "overstates low": at.difference.low,
                    "overstates high": at.difference.high
                }
                shares = {
                    name: None if one is None else one.value
                    for name, one in (("above", at.match_above), ("below", at.match_below))
                }
                line = {
                    "level": level, "threshold": tau, "accept": at.accepted.value,
                    "token acceptance": at.matched.value, **difference
                }
                wrong.append({
                    **line, "match above τ": shares["above"], "match below τ": shares["below"],
                    "n": at.matched.n
                })
            for one in result.needed:
                share = one.n_above / one.n
                needed.append({
                    "level": level, "match wanted": one.share, "threshold": one.threshold,
                    "tokens above": share, "n": one.n
                })
        return {
            "reliability": pd.DataFrame(bands), "misstatement": pd.DataFrame(wrong),
            "needed": pd.DataFrame(needed)
        }

    def _two_phase(self, evaluations: Mapping[str, Evaluation]) -> pd.DataFrame:
        """Tokens a verification for each phase 1 (behind the prefill, from the answer's first
        token) and phase 2, in self-rollout."""
        given, answers = self.given, [self.answers[i] for i in self.used]
        prompts = [self.prompts[i] for i in self.used]
        table, lookup = floors.NGram(self.training, 4), floors.PromptLookup(prompts)
        drafter = floors.DrafterTokens([self.own.dataset[i].ids_by_drafter for i in self.used])
        plain = {
            "drafter tokens": drafter.match(answers), "4-gram": table.match(answers),
            "prompt lookup": lookup.match(answers)
        }
        whole = {}
        for level, found in evaluations.items():
            if found.shift == 0:
                match, mask = found.tokens.matches()
                of = {place: match[row][mask[row]].numpy() for row, place in enumerate(found.index)}
                whole[level] = [of[i] for i in self.used]
        first = {
            name: _runs(matches, given.gamma_prefill)[:, 0]
            for name, matches in (whole | plain).items()
        }
        second = {}
        for level, adapter in self.adapters.items():
            rolled = rollout.self_rollout(adapter, self.own.batches(given.batch_size),
                                          self.own.head, gamma=given.gamma)
            after = np.zeros(rolled.accepted.shape,
                             dtype=np.int64)  # a round after position s begins at s + 1
            after[rolled.index, 1:] = rolled.accepted[:, :-1].clamp(min=0).numpy()
            second[level] = after[self.used]
        second |= {name: _runs(matches, given.gamma) for name, matches in plain.items()}
        lengths = [len(ids) for ids in answers]
        rows = two_phase.every_pair(first, second, lengths, self.clusters,
                                    n_first=given.gamma_prefill, gamma=given.gamma, **self.options)
        return pd.DataFrame(rows)

    def _checks(self, drafted: Mapping[str, Mapping[str, drafts.Drafts]],
                sequences: Mapping[str, int]) -> pd.DataFrame:
        """What guards the figures: check, value, low, high, passed."""
        rate = floors.duplicate_rate(self.answers, self.training)
        rows: list[dict[str, Any]] = [{
            "check": "held-out sequences that were trained on", "value": 0, "passed": True,
            "n": sequences["held_out"]
        }, {
            "check": "answers that equal another held-out answer", "value": rate.shared, "n": rate.n
        }, {
            "check": "answers that stand in the training set", "value": rate.in_training,
            "n": rate.n
        },]
        if counterfactual.AGAIN in drafted:
            level = self.given.waterfall
            twice = [
                _rates(self._counts(self._used(drafted[arm][level].match), "token_acceptance"))
                for arm in _TWICE
            ]
            found = statistics.aa_check(*twice, self.clusters, **self.options)
            about = {
                "low": found.difference.low, "high": found.difference.high, "passed": found.passed,
                "n": len(self.used)
            }
            rows.append({
                "check": f"A/A: {level} on stored states minus on states made anew",
                "value": found.difference.value, **about
            })
        return pd.DataFrame(rows, columns=["check", "value", "low", "high", "passed", "n"])


def _chain(level: str, steps: Mapping[str, Matches], rolled: Mapping[str, Matches],
           free: Mapping[str, Matches]) -> dict[str, Matches]:
    """The arms of a level's waterfall that were measured; B1 is its own verifier-self."""
    arms = {decomposition.VERIFIER: [np.ones_like(hit) for hit in steps[level]]}
    if B1 in steps:
        arms[decomposition.SELF] = steps[B1]
    if level != B1:
        arms[decomposition.FORCED] = steps[level]
    arms[decomposition.ROLLOUT] = rolled[level]
    if level in free:
        arms[decomposition.FREE] = free[level]
    return arms


_TWICE = (counterfactual.REAL, counterfactual.AGAIN)


def _rates(counts: Counts) -> np.ndarray:
    return np.asarray(counts[0], dtype=float) / np.maximum(np.asarray(counts[1], dtype=float), 1)


def _runs(matches: Sequence[np.ndarray], gamma: int) -> np.ndarray:
    padded = torch.nn.utils.rnn.pad_sequence([torch.as_tensor(hit) for hit in matches],
                                             batch_first=True)
    real = torch.nn.utils.rnn.pad_sequence(
        [torch.ones(len(hit), dtype=torch.bool) for hit in matches], batch_first=True)
    return two_phase.runs_of(padded, real, gamma)
