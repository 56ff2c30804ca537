"""Arms, records and summaries on a tiny pair of the real model classes (random weights): lossless,
resumable, refused where it must be."""

import collections
import itertools
import json
import subprocess
import sys
import types

import pandas as pd
import pytest
import torch
from tiny_pair import make_samples, make_tiny_pair
from toy_decoder import OracleProposer

from xsd.adapters import registry
from xsd.bench import arms, baselines, costs, run, speedups
from xsd.bench import records as records_file
from xsd.core import LosslessError, MetricError, ParameterError, StorageError
from xsd.decode import autoregressive, certificate, proposers, rules, speculative, tracks
from xsd.models import loading
from xsd.runs import typed

LENGTH = 12


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return loading.load_pair(make_tiny_pair(tmp_path_factory.mktemp("pair")))


@pytest.fixture(scope="module")
def samples():
    return make_samples(6)


@pytest.fixture(scope="module")
def adapters(pair):
    torch.manual_seed(0)
    width = pair.verifier.hidden_size
    return {
        level: registry.create_adapter(level, width).eval()
        for level in ("L1", "L4", "L5", "B1", "L5F")
    }


ALL = ("ar", "hf_generate", "hf_static", "hf_prompt_lookup", "drafter", "ngram", "prompt_lookup",
       "L1", "L4", "L5", "B1", "L5F", "L4+L5F", "B1@2x5", "ngram^L5F",
       "L4+ngram^prompt_lookup^L5F@4x9~.01")


def build(name, pair, adapters, **options):
    return arms.build(name, pair, adapters, gamma=3, ngram=lambda prefix:
                      (7 * len(prefix)) % 300 or None, **options)


@pytest.mark.parametrize("name", ALL)
def test_every_arm_says_what_the_verifier_says(name, pair, adapters, samples):
    arm = build(name, pair, adapters)
    for sample in samples[::2]:
        own = autoregressive.generate(pair.verifier, sample, LENGTH)
        got = arm.run(sample, LENGTH)
        assert (got.ids, got.finish) == (own.ids, own.finish)
        assert 0 < got.first_token_s <= got.total_s


@pytest.mark.parametrize("overlap", ["threads", "serial"])
def test_partly_right_drafts_are_lossless_on_a_real_model(pair, samples, overlap):
    """Drafts right for 0…4 tokens, then wrong: every rollback of a real KV cache, one-row against
    many-row, ids equal in float32."""
    verifier = pair.verifier
    for sample in samples[:3]:
        own = autoregressive.generate(verifier, sample, 16)
        calls = iter(range(100))

        def script(known, gamma, own=own, calls=calls):
            right = list(own.ids[len(known):len(known) + next(calls) % 5])
            return [*right, *[(own.ids[0] + 1) % 300] * (gamma - len(right))]

        got = speculative.generate(verifier, OracleProposer(script), sample, gamma=4,
                                   max_new_tokens=16, overlap=overlap)
        assert got.ids == own.ids
        assert {r.n_accepted for r in got.rounds} >= {0, 1, 2, 3}


@pytest.mark.parametrize("name", ["ar", "hf_generate", "hf_prompt_lookup", "drafter", "L1", "L5F",
                                  "L5F@3x9"])
def test_every_arm_meets_the_last_position_as_the_plain_loop_does(name, pair, adapters, samples,
                                                                 monkeypatch):
    """The same tokens up to it, though a draft would reach beyond, and the same sentence there."""
    length = pair.verifier.prefill(samples[0]).length
    whole = autoregressive.generate(pair.verifier, samples[0], 6)
    monkeypatch.setattr(pair.verifier, "max_positions", length + 5)
    arm = build(name, pair, adapters)
    assert arm.run(samples[0], 6).ids == whole.ids and whole.finish == "length"
    with pytest.raises(ParameterError, match=f"need {length + 6} positions, but the verifier has "
                                             f"{length + 5}"):
        arm.run(samples[0], 7)


def test_a_drafter_without_positions_left_drafts_no_more(pair, adapters, samples, monkeypatch):
    monkeypatch.setattr(pair.drafter, "max_positions", pair.drafter.prefill(samples[0]).length + 2)
    got = build("drafter", pair, adapters).run(samples[0], LENGTH)
    assert got.ids == autoregressive.generate(pair.verifier, samples[0], LENGTH).ids
    assert not got.rounds[-1].drafted


def test_settings_of_the_models_generation_do_not_reach_an_arm(tmp_path, samples):
    folder = make_tiny_pair(tmp_path)
    path = folder / "verifier" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {
        "repetition_penalty": 3.0, "no_repeat_ngram_size": 2, "min_new_tokens": 9, "num_beams": 2,
        "return_dict_in_generate": True, "use_cache": False, "suppress_tokens": [5, 6, 7]}))
    with pytest.warns(UserWarning, match="not used, every answer here is the model's plain greedy"):
        changed = loading.load_pair(folder)
    own = autoregressive.generate(changed.verifier, samples[0], LENGTH).ids
    for name in ("hf_generate", "hf_prompt_lookup"):
        assert arms.build(name, changed, {}).run(samples[0], LENGTH).ids == own


def test_the_drafters_cache_equals_a_fresh_prefill_and_extend(pair, samples):
    track, fresh = tracks.DrafterTrack(pair.drafter), tracks.DrafterTrack(pair.drafter)
    for each in (track, fresh):
        each.begin(samples[0])
    for tokens in ([5, 6, 7, 8], [5, 6, 9], [5, 6, 9, 10, 11, 12], [5, 6]):
        track.follow(tokens)
    fresh.follow([5, 6])
    assert track.state.length == fresh.state.length
    torch.testing.assert_close(track.states(), fresh.states(), atol=1e-4, rtol=0)
    torch.testing.assert_close(track.logits, fresh.logits, atol=1e-4, rtol=0)


def test_control_arm_is_identical_and_the_noise_floor_small(pair, samples):
    assert {v.outcome
            for v in certificate.control(pair.verifier, samples[:2], LENGTH)} == {"identical"}
    answers = [autoregressive.generate(pair.verifier, sample, LENGTH).ids for sample in samples[:2]]
    assert certificate.noise_floor(pair.verifier, samples[:2], answers).largest < 1e-3


def test_a_handle_that_swaps_the_best_two_in_wide_passes_is_caught(pair, samples):
    class Swapping(type(pair.verifier)):
        def extend(self, state, ids):
            hidden, logits = super().extend(state, ids)
            if len(ids) > 1:
                values, best = logits.topk(2)
                logits = logits.scatter(1, best, values.flip(1))
            return hidden, logits

    own = pair.verifier
    engine = Swapping(own.model, own.tokenizer, own.role, own.pixels,
                      draft_vocab_size=own.draft_vocab_size)
    for sample in samples[:3]:
        reference = autoregressive.generate(engine, sample, LENGTH).ids
        right = OracleProposer(
            lambda known, gamma, ids=reference: ids[len(known):len(known) + gamma])
        wrong = speculative.generate(engine, right, sample, gamma=3, max_new_tokens=LENGTH).ids
        verdict = certificate.certify(engine, sample, reference, wrong)
        assert wrong != reference and verdict.outcome == "divergence"
        assert verdict.floor.largest < 1e-3


def test_records_are_complete_and_a_second_run_measures_nothing(pair, adapters, samples, tmp_path):
    chosen = [build(name, pair, adapters) for name in ("ar", "hf_generate", "L1")]
    path = tmp_path / "records.jsonl"
    first = run.measure(chosen, samples[:3], path=path, max_new_tokens=LENGTH, repeats=2, warmup=0)
    assert len(first) == 3 * 2 * 3 and all(r["identical_to_ar"] for r in first)
    assert {r["ids_hash"] for r in first
            if r["sample"] == samples[0].key} == {run.ids_hash(first[0]["ids"])}
    starts = [next(r["arm"] for r in first if r["sample"] == s.key) for s in samples[:3]]
    assert sorted(starts) == ["L1", "ar", "hf_generate"]  # each arm goes first once
    made = []
    again = run.measure(chosen, samples[:3], path=path, max_new_tokens=LENGTH, repeats=2, warmup=0,
                        progress=made.append)
    assert made == [] and again == first == records_file.read_records(path)


def test_resume_continues_where_it_stopped_after_a_half_written_line(pair, adapters, samples,
                                                                     tmp_path):
    chosen = [build(name, pair, adapters) for name in ("ar", "drafter")]
    path = tmp_path / "records.jsonl"
    run.measure(chosen, samples[:2], path=path, max_new_tokens=6, warmup=0)
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])  # the last record lost its end
    made = []
    records = run.measure(chosen, samples[:3], path=path, max_new_tokens=6, warmup=1,
                          progress=made.append)
    assert made == [1, 2] and len(records) == 6
    assert len({(r["arm"], r["sample"]) for r in records_file.read_records(path)}) == 6


def test_a_lossy_arm_says_so_and_what_it_changed(pair, adapters, samples, tmp_path):
    chosen = [build(name, pair, adapters) for name in ("ar", "L1~cos.01")]
    found = run.measure(chosen, samples[:2], path=tmp_path / "records.jsonl", max_new_tokens=8,
                        warmup=0)
    assert [r["lossless"] for r in found if "changed" in r] == [False, False]
    row = run.summarise(found, n_resamples=20)["arms"]["L1~cos.01"]
    assert 0 < row["changed"] <= 1 and row["identical"] < 2
    assert arms.label_of("L1~cos.01") == "L1, lossy: cos.01"


def test_a_tree_arm_is_priced_by_what_was_measured(pair, adapters, samples):
    pricing = costs.pricing(pair, adapters, {"any": samples[:1]})
    arm = build("ngram^L5F@3x6", pair, adapters, prices=pricing)
    assert arm.info["priced"] and arm.info["tree_nodes"] == 6
    own = autoregressive.generate(pair.verifier, samples[0], LENGTH)
    assert arm.run(samples[0], LENGTH).ids == own.ids


def test_another_core_count_drafter_or_table_is_another_configuration(pair, adapters, samples,
                                                                      tmp_path, monkeypatch):
    path = tmp_path / "records.jsonl"

    def measure(answer=(5, 6), seed=0):
        chosen = [arms.build(name, pair, adapters, gamma=3, ngram=rules.NGramTable([answer]))
                  for name in ("ar", "ngram", "L1")]
        return run.measure(chosen, samples[:1], path=path, max_new_tokens=4, warmup=0,
                           about={"parameters": {"x": seed}})

    records = measure()
    begun = records_file.read_provenance(path)
    assert begun["parameters"] == {"x": 0} and begun["git_revision"] and begun["seed"] == 0
    assert measure(seed=1) == records and records_file.read_provenance(
        path) == begun  # found again, with where it came from
    with pytest.raises(ParameterError, match=r"another configuration \(arms differ"):
        measure(answer=(7, 8))
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        with pytest.raises(ParameterError, match=r"another configuration \(threads differ"):
            measure()
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr(run, "available_cores", lambda: 1000)
    with pytest.raises(ParameterError, match=r"another configuration \(cores differ"):
        measure()
    monkeypatch.undo()
    monkeypatch.setattr(pair.drafter, "weights_hash", lambda: "other weights")
    with pytest.raises(ParameterError, match=r"another configuration \(arms differ"):
        measure()


def test_a_file_of_another_configuration_or_another_writer_is_refused(pair, adapters, samples,
                                                                      tmp_path):
    path = tmp_path / "records.jsonl"
    ar = build("ar", pair, adapters)
    run.measure([ar], samples[:1], path=path, max_new_tokens=4, warmup=0)
    with pytest.raises(ParameterError, match=r"another configuration \(max_new_tokens differ"):
        run.measure([ar], samples[:1], path=path, max_new_tokens=5, warmup=0)
    with pytest.raises(ParameterError, match="give at least one, each with a name of its own"):
        run.measure([ar, ar], samples[:1], path=path, max_new_tokens=4)
    header = json.loads(path.read_text().splitlines()[0])["header"]
    with (records_file.open_records(path, header),
          pytest.raises(StorageError, match="another run")):
        run.measure([ar], samples[:1], path=path, max_new_tokens=4, warmup=0)
    (tmp_path / "other.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(StorageError, match="its first line is no header"):
        records_file.read_records(tmp_path / "other.jsonl")
    with pytest.raises(StorageError, match="run the benchmark first"):
        records_file.read_records(tmp_path / "none.jsonl")
    with pytest.raises(StorageError, match="cannot write"):
        run.measure([ar], samples[:1], path=path / "below" / "records.jsonl", max_new_tokens=4)


def record(arm, sample, seconds, *, sequence="a", identical=True, baseline=False, rounds=(),
           n_tokens=5, outcome="divergence", repeat=0, others=0.0):
    return {
        "arm": arm, "sample": sample, "sequence": sequence, "repeat": repeat, "total_s": seconds,
        "others": others,
        "first_token_s": seconds / 5, "baseline": baseline, "lossless": True,
        "identical_to_ar": identical, "n_tokens": n_tokens, "rounds": list(rounds), "ids": [],
        "verdict": {
            "outcome": "identical" if identical else outcome, "position": 2, "reason": "made up"
        },
    }


def test_summary_is_against_the_best_baseline_from_paired_ratios():
    two = {"phase": "decode", "drafted": [1, 2, 3], "accepted": 2, "bonus": 9}
    first = {"phase": "prefill_hiding", "drafted": [4], "accepted": 0, "bonus": 1}
    empty = {"phase": "decode", "drafted": [], "accepted": 0, "bonus": 1}
    records = [
        record("ar", "x", 2.0, baseline=True),
        record("ar", "y", 4.0, sequence="b", baseline=True),
        record("hf_generate", "x", 1.0, baseline=True),
        record("hf_generate", "y", 3.0, sequence="b", baseline=True),
        record("L1", "x", 2.0, rounds=[first, two, empty]),
        record("L1", "y", 1.0, sequence="b", rounds=[two]),
        record("L1", "only here", 9.0),
    ]
    summary = run.summarise(records, n_resamples=200)
    assert summary["baseline"] == "hf_generate" and summary["n_samples"] == 2 and summary[
        "n_clusters"] == 2
    row = summary["arms"]["L1"]
    speed = row["speedup"]
    assert speed["value"] == pytest.approx((0.5 + 3) / 2)
    assert speed["total"] == pytest.approx(4 / 3) and speed["baseline"] == "hf_generate"
    assert (speed["low"], speed["high"], speed["n"]) == (0.5, 3.0, 2)
    assert speed["slower"] == 0.5 and speed["spread"] is None and not speed["busy"]
    assert row["first_token_ms"] == pytest.approx(300) and row["decode_ms"] == pytest.approx(1200)
    assert row["total_ms"]["value"] == pytest.approx(1500)
    assert row["decode_ms_per_token"] == pytest.approx(1e3 * 0.8 * 3 / 8)
    assert row["accepted_per_round"]["value"] == 2 and row["accepted_per_round_drafted"] == 3
    assert row["hidden_accepted"]["value"] == 0 and row["hidden_accepted_drafted"] == 1
    assert summary["alarms"] == ["the own greedy loop takes 1.50× the time of transformers "
                                 "generate; speed-ups against it would flatter"]
    json.dumps(summary, allow_nan=False)


def test_one_stalled_sample_does_not_choose_the_baseline():
    """The slower loop took 304 ms an answer, the faster one 250 ms but once 926 ms: by total time
    the slower one was "fastest", and an arm of 245 ms ran at 1.24× instead of 1.02×."""
    times = {"ar": [0.304] * 12, "ar_all_cores": [0.250] * 11 + [0.926], "L4": [0.245] * 12}
    assert sum(times["ar"]) < sum(times["ar_all_cores"])
    records = [record(arm, f"s{i}", seconds, sequence=f"drive {i}", baseline=arm != "L4")
               for arm, some in times.items() for i, seconds in enumerate(some)]
    speed = speedups.of(records, n_resamples=200)["L4"]
    assert speed["baseline"] == "ar_all_cores" and f"{speed['value']:.2f}" == "1.02"
    assert speed["low"] == pytest.approx(speed["value"]) == speed["high"]


def test_the_baseline_is_chosen_sample_by_sample_however_long_the_answers_are():
    """On the middle sample "ar" is faster, so its median time is smaller; on four of five it is
    not."""
    times = {"ar": [1, 2, 3, 10, 11], "ar_all_cores": [0.9, 1.8, 3.1, 9, 10], "L4": [1] * 5}
    records = [record(arm, f"s{i}", seconds, sequence=f"drive {i}", baseline=arm != "L4")
               for arm, some in times.items() for i, seconds in enumerate(some)]
    found = speedups.of(records, n_resamples=50)
    assert {row["baseline"] for row in found.values()} == {"ar_all_cores"}
    assert found["ar"]["value"] == pytest.approx(0.9)


def test_repeats_are_paired_by_their_median_and_their_spread_is_told():
    def repeated(arm, seconds):
        return [record(arm, f"s{i}", s * (1 + i), sequence=f"drive {i}", repeat=k,
                       baseline=arm == "ar") for i in range(4) for k, s in enumerate(seconds)]

    records = [*repeated("ar", [1.0, 1.02, 1.01]), *repeated("L4", [0.5, 0.9, 0.51]),
               *repeated("B1", [0.5, 0.5, 0.5])]
    found = speedups.of(records, n_resamples=50)
    assert found["B1"]["value"] == pytest.approx(2.02) and not found["B1"]["busy"]
    assert found["L4"]["value"] == pytest.approx(1.01 / 0.51)
    assert found["L4"]["spread"] > speedups.SPREAD and found["L4"]["busy"]
    restless = [{**one, "others": 0.4} for one in records]
    assert all(row["busy"] and row["others"] == pytest.approx(0.4)
               for row in speedups.of(restless, n_resamples=50).values())


def test_one_sequence_gives_no_interval():
    records = [record(arm, f"s{i}", seconds, baseline=arm == "ar")
               for arm, seconds in (("ar", 1.0), ("L4", 0.5)) for i in range(3)]
    found = speedups.of(records, n_resamples=50)["L4"]
    assert found["value"] == 2.0 and found["low"] is None and found["high"] is None


@pytest.mark.parametrize("n", [2, 5, 8])
def test_every_arm_follows_every_other_about_equally_often(n):
    follows = collections.Counter()
    for turn in range(n):
        for repeat in (0, 1):
            row = run._in_turn(range(n), turn, repeat)
            assert sorted(row) == list(range(n))
            follows.update(itertools.pairwise(row))
    assert len(follows) == n * (n - 1) and set(follows.values()) == {2}


def test_what_other_processes_take_is_seen(pair, samples, tmp_path):
    script = "import time\nend = time.time() + 20\nwhile time.time() < end: pass"
    hogs = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(arms.available_cores())]
    try:
        records = run.measure([arms.build("ar", pair)], samples[:3], path=tmp_path / "r.jsonl",
                              max_new_tokens=60, warmup=0, repeats=8)
    finally:
        for hog in hogs:
            hog.kill()
    others = [one["others"] for one in records]
    if others[0] is None:
        pytest.skip("this system does not say what other processes take")
    assert max(others) > speedups.OTHERS


def test_no_speedup_is_reported_for_a_lossless_arm_whose_ids_differ():
    records = [record("ar", "x", 2.0, baseline=True), record("L1", "x", 1.0, identical=False)]
    with pytest.raises(
            LosslessError,
            match=r"first L1 on x at token 2 \(divergence: made up\); no speed-up is reported"):
        run.summarise(records)
    tie = [
        record("ar", "x", 2.0, baseline=True),
        record("L1", "x", 1.0, identical=False, outcome="near-tie")
    ]
    with pytest.raises(LosslessError):
        run.summarise(tie)
    assert run.summarise(tie, allow_near_ties=True, n_resamples=10)["arms"]["L1"]["identical"] == 0


def test_a_broken_arm_is_recorded_as_such_and_then_refused(pair, adapters, samples, tmp_path):
    good = build("ar", pair, adapters)

    def tamper(sample, n):
        generation = good.run(sample, n)
        return type(generation)((*generation.ids[:2], generation.ids[2] + 1, *generation.ids[3:]),
                                generation.finish, total_s=1.0)

    broken = arms.Arm("broken", tamper, pair.verifier)
    records = run.measure([good, broken], samples[:1], path=tmp_path / "r.jsonl",
                          max_new_tokens=LENGTH, warmup=0)
    bad = next(r for r in records if r["arm"] == "broken")
    assert not bad["identical_to_ar"] and bad["verdict"]["outcome"] == "divergence" and bad[
        "verdict"]["position"] == 2
    with pytest.raises(LosslessError, match="first broken on"):
        run.summarise(records)


def test_a_comparison_without_baseline_is_refused():
    with pytest.raises(MetricError, match="measure 'ar' beside the others"):
        run.summarise([record("L1", "x", 1.0)])


def test_the_parameters_know_the_arms_there_are():
    assert typed.ARMS == arms.PLAIN


@pytest.mark.parametrize("name,message", [("L9", "it names L9"), ("L1+L4+L5", "three phases"),
                                          ("ngram", "needs a table")])
def test_unknown_arms_are_refused_by_name(name, message, pair, adapters):
    with pytest.raises(ParameterError, match=message):
        arms.build(name, pair, adapters)


def test_hf_inputs_are_the_prompt_the_handle_prefills(pair, samples):
    inputs = baselines.hf_inputs(pair.verifier, samples[0])
    assert inputs["input_ids"].shape[1] == pair.verifier.prefill(samples[0]).length


def test_costs_cover_every_part_in_one_table(pair, adapters, samples):
    curve = costs.verification_curve(pair.verifier, samples[0], rows=(1, 4, 32), context=3,
                                     repeats=2)
    assert curve["rows"].tolist() == [1, 4, 32] and (curve["n"] == 2).all()
    assert ((curve["low"] > 0) & (curve["low"] <= curve["ms"])
            & (curve["ms"] <= curve["high"])).all()
    both = {level: adapters[level] for level in ("L1", "L5F")}
    steps = costs.step_costs(pair.drafter, pair.verifier, both, samples[0], repeats=2)
    assert steps["what"].tolist() == ["drafter_prefill", "verifier_prefill", "drafter_step",
                                      "verifier_step", "adapter L1", "adapter L5F"]
    proposer = arms.proposer_of("L1", pair, adapters)
    lanes = costs.prefill_overlap(pair.verifier, proposer, samples[0], n_drafts=3, repeats=2)
    ms = lanes.set_index("what")["ms"]
    assert ms[costs.IDEAL] == max(ms[lane] for lane in costs.LANES)
    table = costs.table(curve, steps, lanes).set_index("what")
    assert len(table) == 3 + 6 + 5 and table.loc["verifier_step", "verifier steps"] == 1
    with pytest.raises(ParameterError, match="measure at least once"):
        costs.measure({}, repeats=0)


def test_an_adapter_of_verified_states_alone_steps_the_drafter_once_a_round(pair, samples):
    torch.manual_seed(0)
    adapter = registry.create_adapter("L5F", pair.verifier.hidden_size, verified_only=True).eval()
    proposer = arms.proposer_of("mine", pair, {"mine": adapter})
    found = speculative.generate(pair.verifier, proposer, samples[0], gamma=4, max_new_tokens=24)
    drafting = [one for one in found.rounds if one.drafted]
    steps = [span for span in found.spans if span.lane == "drafter" and span.what == "draft"]
    assert 0 < len(steps) <= len(drafting) < sum(len(one.drafted) for one in drafting)
    assert found.ids == autoregressive.generate(pair.verifier, samples[0], 24).ids


@pytest.mark.parametrize("level", ["L4", "B1", "L5F"])
def test_drafts_on_kept_keys_and_values_are_those_of_steps_over_the_whole_answer(
        level, pair, adapters, samples):
    class Forgetful:
        """The same adapter without a memory."""
        def __init__(self, adapter):
            self.reads, self.step = adapter.reads, adapter.step

    for sample in samples:
        rounds = []
        for adapter in (adapters[level], Forgetful(adapters[level])):
            proposer = arms.proposer_of("mine", pair, {"mine": adapter})
            found = speculative.generate(pair.verifier, proposer, sample, gamma=4,
                                         max_new_tokens=24, hide_prefill=False)
            rounds.append([one.drafted for one in found.rounds])
        assert rounds[0] == rounds[1] and any(rounds[0])


def test_a_step_that_fuses_tokens_is_timed_with_the_tokens_given(pair, adapters, samples):
    given = []

    def step(drafter_states, verifier_states, tokens):
        given.append(len(tokens) - len(verifier_states))
        return adapters["L5F"].step(drafter_states, verifier_states)

    fusing = types.SimpleNamespace(reads="both", fuses_tokens=True, step=step)
    costs.step_costs(pair.drafter, pair.verifier, {"mine": fusing}, samples[0], context=3,
                     repeats=1)
    assert set(given) == {0}


def cost(**ms):
    return pd.DataFrame({"what": list(ms), "ms": list(ms.values())})


def test_the_hidden_share_follows_from_the_four_times():
    lanes = pd.DataFrame({"what": [*costs.LANES, costs.SERIAL, costs.AT_ONCE],
                          "ms": [3.0, 2.0, 5.0, 4.0]})
    assert costs.hidden_share(lanes) == 0.5


def test_measured_operations_are_interleaved_and_warmed_up():
    log, ticks = [], iter(range(100))
    operations = {name: lambda name=name: log.append(name) for name in "ab"}
    out = costs.measure(operations, repeats=2, clock=lambda: next(ticks))
    assert log == ["a", "b"] * 3 and out["ms"].tolist() == [1000, 1000]


def test_adapters_that_fuse_tokens_are_given_the_answer_so_far():
    seen = []
    adapter = types.SimpleNamespace(
        reads="verifier", fuses_tokens=True,
        step=lambda drafter, verifier, tokens: seen.append(tokens.tolist()) or torch.eye(8)[4])
    proposer = proposers.AdapterProposer(None, adapter, lambda hidden: hidden, 8)
    proposer.begin(None)
    proposer.observe([2, 3], torch.zeros(2, 8))
    assert proposer.propose(2) == [4, 4] and seen == [[2, 3], [2, 3, 4]]


def test_a_prediction_is_the_sum_of_its_parts_and_leaves_a_residual():
    rounds = [{"phase": "prefill_hiding", "drafted": [5, 6], "accepted": 1, "bonus": 7},
              {"phase": "decode", "drafted": [8, 2], "accepted": 2, "bonus": None},]
    curve = cost(**{"verify 1": 1e3, "verify 2": 2e3}).assign(rows=[1, 2])
    steps = cost(verifier_prefill=1e4, drafter_prefill=3e3, drafter_step=500.0,
                 **{"adapter L1": 250.0})
    price = costs.prices(curve, steps, level="L1")
    out = costs.predict([{"rounds": rounds, "ids": [5, 7, 8, 2], "total_s": 31.0}], price,
                        frozenset({2}))
    assert (out["prefill_s"], out["draft_s"], out["verify_s"]) == (10.0, 1.5, 2.0 + 2.0
                                                                   )  # the drafted EOS is never fed
    assert out["predicted_s"] == 15.5 and out["residual"] == 1.0
    with pytest.raises(ParameterError, match="choose an arm that drafts"):
        costs.predict([{"rounds": [], "ids": [1], "total_s": 1.0}], price, frozenset())
    table = costs.prices(curve, steps, drafter=False)
    assert (table.draft_s, table.drafter_prefill_s) == (0.0, 0.0)


class Parrot(proposers.TokenByToken):
    """Says the last token but one again."""
    def __init__(self, pair):
        self.eos_token_ids = pair.verifier.eos_token_ids

    def next_token(self, drafts):
        text = [*self.known, *drafts]
        return text[-2] if len(text) > 1 else None


@pytest.mark.parametrize("form", ["object", "name", "behind L1"])
def test_a_proposer_of_ones_own_is_an_arm_and_lossless(form, pair, adapters, samples):
    spec = {"object": Parrot(pair), "name": f"{__name__}:Parrot",
            "behind L1": f"L1+{__name__}:Parrot@2"}[form]
    arm = build(spec, pair, adapters)
    own = autoregressive.generate(pair.verifier, samples[0], LENGTH)
    got = arm.run(samples[0], LENGTH)
    assert got.ids == own.ids and any(r.drafted for r in got.rounds)
    assert len(arm.info["source"]) == 1 and len(arm.info["source"][0]) == 16
    assert arms.label_of(arm.name) == {"object": "Parrot", "name": "Parrot", "behind L1":
                                       "L1 + Parrot, 2 drafts a round"}[form]
    if form != "object":
        assert arms.levels_of([spec]) == (["L1"] if "L1" in spec else [])


class Wild(proposers.TokenByToken):
    said = "no id"

    def __init__(self, pair):
        pass

    def next_token(self, drafts):
        return self.said


@pytest.mark.parametrize(("said", "message"), [
    ("no id", "Wild drafted 'no id'; a draft is a Python int"), (-1, "drafted -1"),
    (True, "drafted True"), (10**6, "an id from 0 to"), (torch.tensor(3), "a Python int")])
def test_drafts_that_are_no_ids_are_refused(said, message, pair, samples, monkeypatch):
    monkeypatch.setattr(Wild, "said", said)
    with pytest.raises(ParameterError, match=message):
        build(f"{__name__}:Wild", pair, {}).run(samples[0], LENGTH)


def test_what_is_no_proposer_is_refused_by_what_it_lacks(pair, samples):
    with pytest.raises(ParameterError, match=r"dict is no proposer: it lacks begin, propose, obs"):
        arms.build({}, pair)
    with pytest.raises(ParameterError, match="test_bench_live:cost cannot be made as cost"):
        arms.build(f"{__name__}:cost", pair)
    with pytest.raises(ParameterError, match="holds no Nobody"):
        arms.build(f"{__name__}:Nobody", pair)
    with pytest.raises(ParameterError, match="is an adapter and not among the loaded ones"):
        arms.build("xsd.adapters.eagle:EagleAdapter", pair)

    class Greedy(Parrot):
        def propose(self, gamma, stop=proposers.never):
            return [1] * (gamma + 1)

    with pytest.raises(ParameterError, match=r"drafted \d+ tokens where at most"):
        arms.build(Greedy(pair), pair).run(samples[0], LENGTH)
