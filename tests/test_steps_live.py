"""Live decoding, the check of every held-out answer, comparison and explorer, on a run of a
random-weight pair of the real classes."""

import dataclasses
import json
import shutil

import pandas as pd
import pytest
from tiny_pair import make_tiny_pair

from xsd import cli
from xsd.bench import arms, costs
from xsd.core import LosslessError, ParameterError
from xsd.evaluate import table
from xsd.runs import demo_page, folder, listing, parameters, report
from xsd.steps import compare, explore, extraction, judge, live, lossless, ready, traces, training
from xsd.views import figures, timeline, tokens

LEVELS = ["L1", "L4", "L5F", "B1"]
# Random weights may say <video> in an answer, which transformers' prompt lookup cannot: it is
# tested in test_bench_live.
ARMS = [
    "ar", "ar_all_cores", "hf_generate", "drafter", "ngram", "L4", "L4@2", "L4~0.9", "L1+L5F",
    "L1+ngram", "B1"
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("live")
    pair = make_tiny_pair(place / "pair", seed=4)
    run = str(place / "run")
    sizes = {
        "n_train_sequences": 3, "n_test_sequences": 2, "questions_per_sequence": 6,
        "max_new_tokens": 12, "workers": 1
    }
    extraction.run(
        parameters.ExtractParameters.checked({"run_dir": run, "pair": str(pair), **sizes}))
    training.run(parameters.TrainParameters.checked({"run_dir": run, "levels": LEVELS,
                                                     "epochs": 1}))
    ready.token_table(
        parameters.TokenParameters.checked({"run_dir": run, "levels": LEVELS, "resamples": 50}))
    return place


def given(place, **values):
    sizes = {
        "arms": ARMS, "check_arms": ["L4", "B1"], "max_new_tokens": 12, "gamma": 3, "resamples": 50,
        "repeats": 1,
    }
    return parameters.LiveParameters.checked(
        {"run_dir": str(place / "run"), "pair": str(place / "pair"), **sizes, **values})


@pytest.fixture(scope="module")
def bench(place):
    return live.open_bench(given(place))


@pytest.fixture(scope="module")
def records(bench):
    return live.measure(bench, bench.arms(bench.given.arms))


def test_every_arm_answers_the_same_samples_with_the_verifiers_ids(bench, records):
    assert len(records) == len(ARMS) * 4 and all(record["identical_to_ar"] for record in records)
    assert {record["data"] for record in records} == {"simulated", "davis_road"}
    assert live.measure(bench, bench.arms(bench.given.arms)) == records  # found again
    found = live.summary(records, LEVELS, resamples=50, seed=0)
    for one in found.values():
        base = one["arms"][one["baseline"]]
        assert base["baseline"] and base["speedup"]["value"] == 1
        assert base["speedup"]["baseline"] == base["label"]
        assert not one["arms"][one["best_arm"]]["baseline"] and len(live.table(one)) == len(ARMS)
    assert found["simulated"]["arms"]["L4@2"]["label"] == "L4, 2 drafts a round"
    assert found["simulated"]["arms"]["L4@2"]["accepted_per_round_drafted"] <= 2


def test_a_near_tie_is_no_excuse_in_float32(records):
    tie = {
        "identical_to_ar": False,
        "verdict": {"outcome": "near-tie", "position": 2, "reason": "close"}
    }
    with pytest.raises(LosslessError, match="near-tie: close"):
        live.summary([{**one, **tie} if one["arm"] == "L4" else one for one in records], LEVELS,
                     resamples=50, seed=0)


def test_unlikely_drafts_end_a_round_and_cost_no_loss(records):
    drafted = {
        arm: sum(
            len(r["drafted"]) for one in records if one["arm"] == arm
            for r in one["rounds"][1:]) for arm in ("L4", "L4~0.9")
    }
    assert drafted["L4~0.9"] < drafted["L4"]


@pytest.mark.parametrize(("name", "meaning"), [("L4", ("L4", 0, 0.0, 0)),
                                               ("L1+ngram@3", ("L1+ngram", 3, 0.0, 0)),
                                               ("B1~0.6", ("B1", 0, 0.6, 0)),
                                               ("L4@2~.5", ("L4", 2, 0.5, 0)),
                                               ("L4@5x16", ("L4", 5, 0.0, 16)),
                                               ("ngram^L5F", ("ngram^L5F", 0, 0.0, 16)),
                                               ("L1 of a+L5F of b@1f@2", ("L1 of a+L5F of b", 2,
                                                                          0.0, 0))],
                         )
def test_an_arms_name_says_its_settings(name, meaning):
    assert arms.parts_of(name) == meaning


@pytest.mark.parametrize("name", ["L4@", "L4@0", "L4~1", "L4 L5", ""])
def test_a_name_of_another_form_is_refused(name):
    with pytest.raises(ParameterError, match="the form is L4, L4@3"):
        arms.parts_of(name)


def test_the_recordings_clips_are_its_scenes_but_no_clusters(bench):
    recorded = bench.samples["davis_road"]
    assert {name.count("/") for name in recorded.scenes} == {1}
    assert set(recorded.clusters) == {"davis_road"}
    simulated = bench.samples["simulated"]
    assert simulated.clusters == simulated.scenes == simulated.samples["sequence"].tolist()


def test_samples_on_the_clock_come_from_as_many_scenes_as_there_are(bench):
    for some in bench.samples.values():
        scenes = set(some.scenes)
        picked = some.choose(len(scenes), seed=3)
        assert {some.scenes[i] for i in picked} == scenes
        assert some.choose(len(scenes), seed=3) == picked == sorted(picked)
        assert some.choose(10_000, seed=0) == list(range(len(some)))


def test_a_sample_is_the_one_that_was_extracted(bench):
    own = bench.samples["davis_road"]
    sample = own.load(0)
    assert (sample.key, sample.question) == (own.keys[0], own.samples["question"].iloc[0])
    assert len(sample.event_frames) == 5 and sample.video.shape[0] == 8
    references = [some.reference(i, 12) for some in bench.samples.values()
                  for i in range(len(some))]
    whole = [ids for ids in references if ids is not None]
    assert whole and all(len(ids) == 12 or ids[-1] == 2 for ids in whole)


def test_every_held_out_answer_is_checked_at_every_limit(bench):
    rows = lossless.check(bench)
    counted = lossless.counts(rows)
    n = sum(map(len, bench.samples.values()))
    assert counted["n_answers"] == 2 * (n + 4 * len(lossless.LIMITS)) == counted["n_identical"]
    hidden = rows[(rows["arm"] == "L4") & (rows["limit"] == 12)]["n_hidden"]
    assert (hidden > 0).all() and counted["n_hidden_drafts"] >= hidden.sum() and (
        rows[rows["arm"] == "B1"]["n_hidden"] == 0).all()
    assert counted["n_references"] == counted["n_references_identical"] > 0
    assert counted["n_divergences"] == 0 and set(rows["limit"]) == {1, 2, 7, 12}
    assert (rows.loc[rows["limit"] == 1, "n_tokens"] == 1).all()
    assert sum(one["n_samples"] for one in counted["data"].values()) == n


def test_arms_that_take_turns_cover_every_held_out_sample(place, bench):
    rows = lossless.check(live.open_bench(given(place, check_in_turns=True)))
    whole = rows[rows["limit"] == 12]
    n = sum(map(len, bench.samples.values()))
    assert whole["sample"].nunique() == n and len(whole) == n + 2 * len(bench.samples)
    assert set(whole["arm"]) == {"L4", "B1"} and rows["identical"].all()


def test_two_processes_check_what_one_does(place, bench):
    alone = lossless.check(bench)
    shared = lossless.check(live.open_bench(given(place, workers=2)))
    pd.testing.assert_frame_equal(alone, shared)


def test_a_wrong_answer_is_counted_as_one(bench, monkeypatch):
    def changed(generation):
        ids = (*generation.ids[:-1], (generation.ids[-1] + 7) % 300)
        return dataclasses.replace(generation, ids=ids)

    def broken(*given, **options):
        arm = build(*given, **options)
        return dataclasses.replace(arm, run=lambda s, n: changed(arm.run(s, n)))

    build = arms.build
    monkeypatch.setattr(arms, "build", broken)
    counted = lossless.counts(lossless.check(bench))
    assert counted["n_identical"] == 0 and counted["n_divergences"] == counted["n_answers"]


def measured(bench):
    sample = bench.timed["simulated"][0]
    curve = costs.verification_curve(bench.pair.verifier, sample, rows=live.widths(bench.given),
                                     repeats=1)
    steps = costs.step_costs(bench.pair.drafter, bench.pair.verifier, bench.adapters, sample,
                             repeats=1)
    return curve, steps


def test_costs_predictions_and_pictures(bench, records):
    curve, steps = measured(bench)
    table = costs.table(curve, steps)
    assert {"verify 1", "drafter_step", "adapter L4"} <= set(table["what"]) and (table["ms"]
                                                                                 > 0).all()
    assert curve["rows"].max() == 10  # the widest pass: ten drafts behind the prefill
    predicted = costs.predictions([r for r in records if r["data"] == "simulated"], curve, steps,
                                  bench.adapters, bench.pair.verifier.eos_token_ids)
    assert set(predicted["arm"]) == {
        "drafter tokens", "4-gram table", "L4", "L4, 2 drafts a round", "L4, only above 90%", "B1"
    }
    shares = predicted[["prefill", "draft", "verify"]].sum(axis=1)
    assert ((shares - 1).abs() < 1e-9).all()
    curve = timeline.verification_curve(curve)
    assert [trace.name for trace in curve.data[1:]] == ["one pass over K rows", "K single steps"]
    assert len(timeline.predicted_and_measured(predicted).data) == 4


def test_results_fill_the_reports_page_and_one_answer_is_kept(bench, records, place):
    found = live.summary(records, LEVELS, resamples=50, seed=0)
    one, best = bench.timed["simulated"][0], found["simulated"]["best_arm"]
    generations = {arms.label_of(arm.name): arm.run(one, 12)
                   for arm in bench.arms([best, "ar"])}
    live.save_one(bench, "simulated", one, generations, best)
    said = bench.pair.verifier.token_text
    assert len({g.ids
                for g in generations.values()}) == 1 and list(generations)[-1] == "own greedy loop"
    timeline.scrubber(generations, lambda ids: "".join(map(said, ids)))
    tokens.rounds(next(iter(generations.values())), said)
    counted = {"arms": ["L4", "B1", "L1+L5F"], "n_answers": 30, "n_identical": 30,
               "n_near_ties": 0, "n_divergences": 0, "data": {}}
    curve, steps = measured(bench)
    nothing = costs.predictions([], curve, steps, {}, frozenset())
    live.save(bench.given, found, counted, costs.table(curve, steps), nothing, hidden_share=0.5)
    results = folder.load_results(place / "run")
    assert "own greedy loop" in results["live"]["sentence"]
    assert results["live"]["check"]["labels"] == "L4, B1 and L1 + L5F"
    page = report.render(demo_page.template(), results, **demo_page.parts(place / "run", results))
    assert 'data-key="live/check/labels"' in page[:page.index("<nav>")]
    assert page.count('class="figure"') >= 2 and page.count("data-key=\"live/test/") > 10
    hashes = [
        value[:16] for name, value in results["extract"]["data_hashes"].items()
        if name.startswith("test")
    ]
    assert results["live"]["provenance"]["data_hash"] == "+".join(hashes) and hashes
    assert results["live"]["provenance"]["parameters"]["gamma"] == 3 and "git_revision" in results[
        "live"]["checked_with"]
    stored = json.loads((place / "run" / "live.json").read_text())
    assert folder.live_of(stored)[2]["question"] == one.question
    figures.speedup_bars(live.bars(found["simulated"]))


def measured_arm(low=0.9, high=1.2, **speed):
    speed = {"value": 1.0, "low": low, "high": high, "n": 9, "n_clusters": 9, "total": 1.01,
             "slower": 0.5, "baseline": "own greedy loop", "spread": 0.02, "others": 0.01,
             "busy": False, **speed}
    return {"label": "L4", "kind": "measured", "speedup": speed, "total_ms": {"value": 400.0},
            "first_token_ms": 100.0, "decode_ms": 300.0, "identical": 3}


def measured_set(**speed):
    arm = measured_arm(**speed)
    return {"best_arm": "L4", "baseline": "ar", "n_timed": 3, "n_drafting": 4,
            "arms": {"L4": arm, "ar": {**arm, "label": "own greedy loop"}}}


@pytest.mark.parametrize(("low", "high", "words"),
                         [(1.1, 1.3, "faster, and its interval lies above 1"), (0.7, 0.9, "slower"),
                          (0.9, 1.2, "not told apart"), (None, None, "no interval")],
                         )
def test_the_sentence_says_which_way_it_went_and_against_what(low, high, words):
    said = live.sentence(measured_set(low=low, high=high))
    assert "best of 4 on these 3 samples" in said and "baseline, own greedy loop (median" in said
    assert words in said and "50% of its samples are slower" in said


def test_few_sequences_claim_nothing():
    said = live.sentence(measured_set(low=1.1, high=1.3, n_clusters=2))
    assert said.split(":")[1].startswith(" 2 sequences are too few to claim anything")


def test_a_busy_machine_claims_nothing():
    one = measured_set(busy=True, others=0.48)
    said = live.sentence(one)
    assert said.startswith("the machine was busy (other processes took 48%, repeats spread by 2%)")
    assert "no speed-up over the best baseline, own greedy loop, is claimed" in said
    assert "×" not in said
    unsteady = live.sentence(measured_set(busy=True, others=0.01, spread=0.4))
    assert unsteady.startswith("the machine was unsteady (other processes took 1%, repeats spread "
                               "by 40%)")
    table = live.table(one)
    assert table["speed-up over own greedy loop"].isna().all()
    assert (table["ms per answer"] == 400).all() and (table["prefill ms"] == 100).all()
    figure = figures.speedup_bars(live.bars(one))
    assert "no speed-up is claimed" in figure.layout.title.text
    assert figure.layout.xaxis.title.text == "times as fast as own greedy loop"
    assert not any(text for bars in figure.data for text in bars.text)


def test_other_settings_put_the_old_records_aside(place, bench, records):
    again = live.open_bench(given(place, arms=["ar", "L1"], n_samples=2, n_samples_others=1))
    assert [len(some) for some in again.timed.values()] == [2, 1]
    assert len(live.measure(again, again.arms(again.given.arms))) == 6
    assert (place / "run" / "records.before.jsonl").is_file()
    live.measure(bench, bench.arms(bench.given.arms))


def test_stored_pairs_are_replayed_with_adapters_and_measured_prices(place, bench, tmp_path,
                                                                     capsys):
    measured_at = tmp_path / "priced"
    rows = costs.table(*measured(bench)).set_index("what")[["ms", "low", "high"]]
    folder.save_results(measured_at, "live", {"costs": rows.to_dict("index")})
    shards = place / "run" / "shards" / "test_simulated"
    adapters = {level: bench.adapters[level] for level in ("L4", "L5F", "B1")}
    found = traces.run(shards, tmp_path / "out", adapters=adapters, gamma=3, gamma_prefill=5,
                       prices=measured_at, resamples=50)
    pairs = bench.samples["simulated"]
    tokens = table.measure(adapters, pairs, gamma=3)
    sums = table.counts(tokens, 3).groupby("level", observed=True)[["accepted", "rounds"]].sum()
    for level in adapters:  # the figures of notebook 04
        told = found["arms"][level]["mean_accepted"]["value"]
        assert told == sums.loc[level, "accepted"] / sums.loc[level, "rounds"]
        assert found["arms"][level]["schedule"]["predicted_speedup"] > 0
    prices = [judge.read_prices(measured_at, level=level).draft_s for level in ("", "L4")]
    assert prices[1] > prices[0] and found["mode"] == "teacher_forced"
    with pytest.raises(ParameterError, match=r"holds no prices .* notebook 05 measured L2"):
        judge.read_prices(measured_at, level="L2")
    with pytest.raises(ParameterError, match="holds no states for adapters to read"):
        traces.run(measured_at / "results" / "live.json", tmp_path / "out", adapters=adapters)
    path = str(place / "run" / "adapters" / "L4")
    assert cli.main(["data", "import-traces", str(shards), "-o", str(tmp_path / "out"), "--prices",
                     str(measured_at), "--adapters", path]) == 0
    said = capsys.readouterr().out
    assert "L4 of run" in said and "predicted ms per answer" in said


def test_paths_one_event_frame_and_the_references_spellings_are_arms(place, tmp_path):
    shutil.copytree(place / "run", tmp_path / "run", ignore=shutil.ignore_patterns("records*"))
    path = str(tmp_path / "run" / "adapters" / "L4" / "best.safetensors")
    asked = given(place, run_dir=str(tmp_path / "run"), n_samples=1, test_data=["simulated"],
                  arms=["vl_baseline", "L4+VL", "L4", "L4@1f", path],
                  check_arms=["L4@1f", "L4+VL", path])
    assert asked.arms[:2] == ["ar", "L4+ar"]
    with pytest.raises(ParameterError, match="vl_baseline and L4\\+VL are understood"):
        given(place, arms=["vl_base"])
    bench = live.open_bench(asked)
    assert list(bench.adapters) == ["L4", "L4 of run"]
    records = live.measure(bench, bench.arms(asked.arms))
    drafted = {one["arm"]: [len(r["drafted"]) for r in one["rounds"]] for one in records}
    assert all(one["identical_to_ar"] for one in records)
    # how much fits behind the prefill is up to the clock; after it nothing is drafted
    assert not any(drafted["L4+ar"][1:])
    found = live.summary(records, bench.adapters, resamples=50, seed=0)["simulated"]
    assert {row["label"] for row in found["arms"].values()} == {
        "own greedy loop", "L4", "L4 of run", "L4 + own greedy loop", "L4, 1 event frame"}
    assert live.one_frame_table(found)["arm"].tolist() == ["L4", "L4, 1 event frame"]
    calm = {name: row for name, row in found["arms"].items() if name != "L4"}
    assert live.one_frame_table({**found, "arms": calm}).empty
    counted = lossless.counts(lossless.check(bench))
    assert counted["n_identical"] == counted["n_answers"] > 0


def test_held_out_sets_by_path_are_timed_and_one_without_pictures_is_left_out(place, tmp_path):
    shards, bare = place / "run" / "shards", tmp_path / "bare"
    shutil.copytree(shards / "test_simulated" / "teacher_forced", bare / "teacher_forced")
    path = str(place / "run" / "adapters" / "L4")
    options = {"run_dir": str(tmp_path / "other"), "data": str(shards / "train_simulated"),
               "arms": ["ar", "ngram", path], "check_arms": [path], "n_samples": 1}
    bench = live.open_bench(given(place, test_data=[str(shards / "test_simulated"), str(bare)],
                                  **options))
    assert [len(some) for some in bench.timed.values()] == [1] and list(bench.left_out) == ["bare"]
    assert "nobody knows their pictures" in bench.left_out["bare"]
    records = live.measure(bench, bench.arms(bench.given.arms))
    assert len(records) == 3 and all(one["identical_to_ar"] for one in records)
    with pytest.raises(ParameterError, match=r"live decoding needs pictures: .*bare"):
        live.open_bench(given(place, test_data=[str(bare)], **options))


def test_wrong_arms_levels_and_pairs_are_named(place, tmp_path):
    with pytest.raises(ParameterError, match="none of the arms L4 is a baseline; add ar"):
        live.open_bench(given(place, arms=["L4"]))
    with pytest.raises(ParameterError, match="holds no adapter L2"):
        live.open_bench(given(place, arms=["ar", "L2"]))
    other = make_tiny_pair(tmp_path / "other", seed=5)
    with pytest.raises(ParameterError,
                       match=r"extracted with other weights \(verifier and drafter\)"):
        live.open_bench(given(place, pair=str(other)))


# --- 06 and 07
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", compare.METRICS)
def test_one_run_compares_its_levels(place, records, metric):
    runs = [str(place / "run")]
    table = compare.values(runs, metric, resamples=50, seed=0)
    assert set(table["data"]) == {"simulated", "davis_road"}
    best = table[table["best"]]
    if metric == "speedup":  # a busy machine has no best arm
        assert not best["busy"].any() and table["baseline"].str.contains("greedy|generate").all()
    else:
        assert set(best["data"]) == {"simulated", "davis_road"} and "B1" not in set(best["level"])
    differing = compare.differences(runs, metric, resamples=50, seed=0)
    assert set(differing["against"]) == {"ar" if metric == "speedup" else "drafter_tokens"}
    values = table.set_index(["data", "level"])["value"]
    for row in differing.to_dict("records"):
        expected = values[row["data"], row["level"]] - values[row["data"], row["against"]]
        assert row["value"] == pytest.approx(expected)
    compare.picture(table, "simulated", metric)


def test_two_runs_are_compared_level_by_level(place, tmp_path):
    other = tmp_path / "again"
    shutil.copytree(place / "run", other)
    runs = [str(place / "run"), str(other)]
    differing = compare.differences(runs, "accepted_per_round", resamples=50, seed=0)
    assert set(differing["run"]) == {"again"} and (differing["value"]
                                                   == 0).all() and not differing["clear"].any()
    assert set(differing["against"]) == {f"run {level}" for level in [*LEVELS, "drafter_tokens"]
                                         } and len(differing) == 10
    assert list(listing.overview(runs)["run"]) == ["run", "again"]
    assert set(compare.curves(runs)["level"]) == {
        f"{level} · {name}" for level in LEVELS for name in ("run", "again")
    }
    with pytest.raises(ParameterError, match="given twice"):
        listing.names([runs[0], runs[0]])
    with pytest.raises(ParameterError, match="is not among the runs"):
        compare.differences(runs, "cosine", baseline="elsewhere", resamples=50, seed=0)


def test_comparison_is_written_as_plain_numbers(place):
    checked = parameters.CompareParameters.checked(
        {"run_dir": str(place / "run"), "runs": [str(place / "run")], "resamples": 50})
    table = compare.values(checked.runs, checked.metric, resamples=50, seed=0)
    differing = compare.differences(checked.runs, checked.metric, resamples=50, seed=0)
    apart = compare.apart(checked.runs, checked.metric)
    compare.save(checked.run_dir, checked.metric, checked.runs, table, differing, apart,
                 seed=checked.seed, parameters=checked.model_dump())
    text = (place / "run" / "results" / "compare.json").read_text()
    assert "NaN" not in text and len(json.loads(text)["values"]) == len(table)


def test_a_value_lies_inside_its_interval(place, records):
    table = compare.values([str(place / "run")], "accepted_per_round", resamples=50, seed=0)
    known = table.dropna(subset=["low"])
    assert len(known) and known.eval("low <= value and value <= high").all()


def test_the_explorer_shows_tokens_and_pictures_of_a_run(place):
    explorer = explore.explorer([str(place / "run")], levels=["L1", "L4"], threshold=0.9)
    assert explorer.data.runs == ["run · simulated", "run · davis_road"]
    assert explorer.selection.levels == ("L1", "L4") and explorer.pictures.value.count("<img") == 13
    assert explorer.reasons.value.count('class="reason"') == 2
    assert "the verifier would say" in explorer.reasons.value
    for level in ("L1", "drafter_tokens"):
        own = explorer.data.tokens.query("run == 'run · simulated' and level == @level")
        own = own[own["sample"] == explorer.selection.sample]
        found = explorer.data.why("run · simulated", level, explorer.selection.sample)
        found = found[found["position"] >= 0]
        assert [ids[0] for ids in found["draft_ids"]] == own["draft_id"].tolist()
        assert [texts[0] for texts in found["draft_texts"]] == own["draft_token"].tolist()
    assert explorer.data.why("run · simulated", "L5", explorer.selection.sample) is None
    explorer.run.value = "run · davis_road"
    assert explorer.pictures.value.count("<img") == 13
    assert explorer.data.sample("nobody/knows/this") is None


def test_live_answers_are_stepped_from_the_records_and_from_an_opened_bench(place, bench, records):
    kept = explore.of_records(str(place / "run"))
    assert "L4" in kept.arm.options and kept.pictures.value.count("<img") == 13
    kept.arm.value = "L4"
    again = explore.of_bench(bench, ["L4"])
    again.sample.value = kept.sample.value
    assert len(again.sample.options) > len(kept.sample.options)
    for one in (kept, again):  # how much is drafted behind the prefill depends on the machine
        for number in range(one.round.max + 1):
            one.round.value = number
            assert f"round {number} of {one.round.max}" in one.shown.value
            assert "token rejected" in one.shown.value or "nats behind" not in one.shown.value
