"""Speculative output is the verifier's own, whatever is drafted, at every length, EOS position and
accepted count."""

import itertools

import pytest
import torch
from toy_decoder import EOS, PROMPT, WIDTH, CopyAdapter, OracleProposer, ToyDecoder

from xsd.core import ParameterError
from xsd.decode import autoregressive, hybrid, proposers, rules, speculative, tracks

BODY = (3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8)


def answer(eos_at):
    return (*BODY[:eos_at], EOS)


def accepts(verifier, counts):
    """A script whose i-th proposal is right for exactly counts[i % len] tokens, then wrong."""
    calls = itertools.count()

    def script(known, gamma):
        count, prefix, drafts = counts[next(calls) % len(counts)], list(known), []
        for i in range(gamma):
            right = verifier.next(prefix)
            drafts.append(right if i != count else 1 + (right + 4) % (WIDTH - 1))
            prefix.append(drafts[-1])
        return drafts

    return script


def run(proposer, sample, *, verifier=None, **options):
    verifier = verifier or ToyDecoder()
    return speculative.generate(verifier, proposer, sample, **options)


def check(generation, expected):
    assert generation.ids == expected.ids and generation.finish == expected.finish
    assert sum(r.n_accepted + (r.bonus is not None)
               for r in generation.rounds) == len(generation.ids)
    said = [
        token for r in generation.rounds
        for token in (*r.drafted[:r.n_accepted], *(() if r.bonus is None else (r.bonus,)))
    ]
    assert tuple(said) == generation.ids
    assert [r.phase for r in generation.rounds
            ] == ["prefill_hiding"] + ["decode"] * (len(generation.rounds) - 1)


@pytest.mark.parametrize("mode", ["serial", "threads"])
def test_output_equals_the_verifiers_own_for_every_accepted_count_eos_position_and_length(mode):
    cases, met = 0, set()
    verifier = ToyDecoder()
    for eos_at, length in itertools.product(range(0, 11), range(1, 13)):
        expected = autoregressive.generate(verifier, answer(eos_at), length)
        for gamma in (1, 2, 5, 8) if mode == "serial" else (3,):
            for count in range(gamma + 1):
                drafts = OracleProposer(accepts(verifier, (count,)))
                got = run(drafts, answer(eos_at), verifier=verifier, gamma=gamma,
                          gamma_prefill=gamma, max_new_tokens=length, overlap=mode)
                check(got, expected)
                met |= {(len(r.drafted), r.n_accepted) for r in got.rounds}
                cases += 1
    assert met >= {(k, n) for k in (range(1, 9) if mode == "serial" else range(1, 4))
                   for n in range(k + 1)}
    assert cases >= (2400 if mode == "serial" else 500)


def test_mixed_accepted_counts_are_what_the_rounds_report():
    verifier = ToyDecoder()
    verifier.script = BODY
    script = accepts(verifier, (2, 0, 3, 1))
    got = run(OracleProposer(script), BODY, verifier=verifier, gamma=3, max_new_tokens=10,
              overlap="serial")
    assert [(len(r.drafted), r.n_accepted) for r in got.rounds] == [(3, 2), (3, 0), (3, 3), (1, 1)]


@pytest.mark.parametrize("eos_at", range(1, 9))
def test_eos_inside_accepted_drafts_ends_the_answer_there(eos_at):
    beyond = OracleProposer(lambda known, gamma: [*answer(eos_at)[len(known):], 7, 7, 7])
    got = run(beyond, answer(eos_at), gamma=9, max_new_tokens=50, overlap="serial")
    assert got.ids == answer(eos_at) and got.finish == "eos"
    assert got.rounds[-1].bonus is None and got.rounds[-1].drafted[-1] == EOS


def test_a_wrong_first_draft_in_the_prefill_costs_no_verification_pass():
    verifier = ToyDecoder()
    wrong = OracleProposer(lambda known, gamma: [7] * gamma)
    run(wrong, BODY, verifier=verifier, gamma=4, max_new_tokens=1 + 1, overlap="serial",
        gamma_prefill=4)
    assert verifier.rows_fed == [1]  # the second token only: its round has no room for a draft


def test_a_round_feeds_the_waiting_token_and_the_drafts_in_one_pass():
    verifier = ToyDecoder()
    right = OracleProposer(lambda known, gamma: BODY[len(known):len(known) + gamma])
    run(right, BODY, verifier=verifier, gamma=3, max_new_tokens=8, overlap="serial")
    assert verifier.rows_fed == [
        3, 4
    ]  # 3 drafts behind the prefill → 4 tokens; then 1 + 3 rows → 4 more


ADAPTED = [("drafter", None), ("verifier", None), ("both", None), ("both", "drafter"),
           ("verifier", "drafter")]


@pytest.mark.parametrize("reads,first", ADAPTED)
def test_adapter_drafting_is_lossless_with_a_drafter_that_slips(reads, first):
    for slips, eos_at, length, gamma, mode in itertools.product(
        ((), (0,), (1, 4), range(12)), (2, 6, 11), (1, 2, 7, 14), (1, 3, 8), ("serial", "threads")):
        verifier, drafter = ToyDecoder(), ToyDecoder(slips)
        expected = autoregressive.generate(ToyDecoder(), answer(eos_at), length)
        track = tracks.DrafterTrack(drafter)
        adapter, opening = CopyAdapter(reads), CopyAdapter("drafter")
        drafts = proposers.AdapterProposer(track, adapter, verifier.lm_head, WIDTH,
                                           verifier.eos_token_ids)
        if first:
            opener = proposers.AdapterProposer(track, opening, verifier.lm_head, WIDTH,
                                               verifier.eos_token_ids)
            drafts = hybrid.TwoPhase(opener, drafts)
        got = run(drafts, answer(eos_at), verifier=verifier, gamma=gamma, max_new_tokens=length,
                  overlap=mode)
        check(got, expected)
        if reads != "drafter" and not first:
            assert got.rounds[0].drafted == ()  # nothing to read before the verifier's first state


def test_the_drafters_own_tokens_are_all_accepted_when_it_never_slips():
    verifier = ToyDecoder()
    drafts = proposers.DrafterTokens(tracks.DrafterTrack(ToyDecoder()), WIDTH,
                                     verifier.eos_token_ids)
    got = run(drafts, answer(10), verifier=verifier, gamma=4, max_new_tokens=20, overlap="serial")
    assert [r.n_accepted for r in got.rounds] == [4, 4, 1] and got.ids == answer(10)


@pytest.mark.parametrize("slips", [(), (0,), (2,), (1, 3, 5), tuple(range(12))])
def test_the_drafters_cache_equals_a_fresh_one_after_every_round(slips):
    drafter, verifier = ToyDecoder(slips), ToyDecoder()
    track = tracks.DrafterTrack(drafter)
    inner = proposers.AdapterProposer(track, CopyAdapter(), verifier.lm_head, WIDTH)
    checked = []

    class Watched(proposers.AdapterProposer):
        def propose(self, gamma, stop=proposers.never):
            if self.known:
                track.follow(self.known)
                fresh = tracks.DrafterTrack(ToyDecoder(slips))
                fresh.begin(BODY)
                fresh.follow(self.known)
                assert track.cached == fresh.cached == track.state.ids == self.known
                assert torch.equal(track.states(), fresh.states()) and torch.equal(
                    track.logits, fresh.logits)
                checked.append(len(self.known))
            return super().propose(gamma, stop)

    watched = Watched(track, inner.adapter, verifier.lm_head, WIDTH)
    run(watched, BODY, verifier=verifier, gamma=3, max_new_tokens=12, overlap="serial")
    assert checked and track.state.length >= PROMPT


def test_a_cache_ahead_of_the_verified_tokens_is_rolled_back_to_them():
    track = tracks.DrafterTrack(ToyDecoder())
    track.begin(BODY)
    track.follow(BODY[:5])
    track.follow(BODY[:2])
    assert track.state.ids == list(BODY[:2]) and int(track.logits.argmax()) == BODY[2]
    assert track.states().shape == (3, WIDTH)


def test_self_rollout_uses_predictions_until_the_verifier_has_spoken():
    offered = []

    class Recording(CopyAdapter):
        def step(self, drafter_states, verifier_states):
            offered.append(verifier_states.argmax(-1).tolist())
            return torch.eye(WIDTH)[7]

    drafts = proposers.AdapterProposer(None, Recording("verifier"), lambda h: h, WIDTH)
    run(drafts, BODY, gamma=2, max_new_tokens=4, overlap="serial")
    assert offered == [[3], [3, 7],
                       [3, 1]]  # verified 3; own guess 7; then the verified 1 in its place


def test_prefill_hiding_stops_drafting_when_the_verifier_is_ready():
    import threading

    drafted_three = threading.Event()

    class Slow(ToyDecoder):
        def prefill(self, sample):
            state = super().prefill(sample)
            assert drafted_three.wait(
                10)  # only a drafter that runs at the same time can let this pass
            return state

    class Counting(OracleProposer):
        def propose(self, gamma, stop=proposers.never):
            if self.known:
                return []
            drafts = list(BODY[:3])
            drafted_three.set()
            while not stop():
                pass
            return drafts

    got = run(Counting(None), BODY, verifier=Slow(), gamma=2, max_new_tokens=6)
    assert got.rounds[0].drafted == BODY[:3] and got.rounds[0].n_accepted == 3
    assert got.rounds[0].draft_end_s <= got.rounds[0].verify_start_s


def test_without_prefill_hiding_nothing_is_drafted_before_the_first_token():
    right = OracleProposer(lambda known, gamma: BODY[len(known):len(known) + gamma])
    got = run(right, BODY, gamma=3, max_new_tokens=9, hide_prefill=False)
    assert got.rounds[0].drafted == () and got.rounds[0].bonus == BODY[0] and got.ids == BODY[:9]


@pytest.mark.parametrize("lane", ["verifier", "drafter"])
def test_an_error_in_either_lane_reaches_the_caller(lane):
    class Broken(ToyDecoder):
        def prefill(self, sample):
            raise OSError(f"the {lane} broke")

    verifier, drafter = (Broken(), ToyDecoder()) if lane == "verifier" else (ToyDecoder(), Broken())
    drafts = proposers.DrafterTokens(tracks.DrafterTrack(drafter), WIDTH)
    with pytest.raises(OSError, match=f"the {lane} broke"):
        run(drafts, BODY, verifier=verifier, gamma=2, max_new_tokens=5)


def test_spans_and_rounds_lie_on_one_clock():
    ticks = itertools.count()
    track = tracks.DrafterTrack(ToyDecoder((4,)))
    drafts = proposers.AdapterProposer(track, CopyAdapter(), lambda h: h, WIDTH)
    got = speculative.generate(ToyDecoder(), drafts, BODY, gamma=2, max_new_tokens=9,
                               overlap="serial", clock=lambda: float(next(ticks)))
    assert {(s.lane, s.what) for s in got.spans} == {
        ("drafter", "prefill"), ("drafter", "draft"), ("adapter", "adapter"),
        ("verifier", "prefill"), ("verifier", "verify"), ("verifier", "step"),
    }
    assert all(0 <= s.start_s < s.end_s <= got.total_s for s in got.spans)
    assert all(r.draft_start_s <= r.draft_end_s <= r.verify_start_s < r.verify_end_s <= got.total_s
               for r in got.rounds)
    assert 0 < got.first_token_s <= got.rounds[0].verify_start_s


def test_ngram_and_prompt_lookup_draft_from_what_they_know():
    table = proposers.RuleProposer(lambda sample: rules.stored(BODY[:4]))
    got = run(table, BODY, gamma=8, max_new_tokens=10, overlap="serial")
    assert got.ids == BODY[:10] and got.rounds[0].n_accepted == 4
    lookup = proposers.RuleProposer(lambda sample: rules.prompt_lookup([9, 1, 2, 3, 8, 1, 2, 5]))
    lookup.begin(None)
    lookup.observe([1, 2], torch.zeros(2, WIDTH))
    assert lookup.propose(3) == [
        5, 1, 2
    ]  # the latest place of "1 2" is followed by 5, then the text goes on
    longer = run(proposers.RuleProposer(rules.prompt_lookup), BODY, gamma=5, max_new_tokens=12,
                 overlap="serial")
    assert longer.ids == BODY


def test_same_request_twice_gives_the_same_answer_from_the_same_proposer():
    verifier = ToyDecoder()
    drafts = proposers.DrafterTokens(tracks.DrafterTrack(ToyDecoder((1, 2))), WIDTH)
    first = run(drafts, BODY, verifier=verifier, gamma=3, max_new_tokens=10, overlap="serial")
    second = run(drafts, BODY, verifier=verifier, gamma=3, max_new_tokens=10, overlap="serial")
    assert first.ids == second.ids
    shape = [(r.drafted, r.n_accepted, r.bonus, r.phase) for r in first.rounds]
    assert shape == [(r.drafted, r.n_accepted, r.bonus, r.phase) for r in second.rounds]


@pytest.mark.parametrize(
    "options,message",
    [({"gamma": 0, "max_new_tokens": 4}, "gamma is 0"),
     ({"gamma": 2, "max_new_tokens": 0}, "max_new_tokens is 0; ask for at least 1"),
     ({"gamma": 2, "max_new_tokens": 4, "gamma_prefill": 0}, "gamma_prefill 0"),
     ({"gamma": 2, "max_new_tokens": 4, "overlap": "magic"
       }, "overlap is 'magic', expected 'threads' or 'serial'"),],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ParameterError, match=message):
        run(OracleProposer(lambda known, gamma: []), BODY, **options)


def test_proposers_that_lack_what_they_read_are_refused():
    with pytest.raises(ParameterError, match="reads 'drafter' needs a drafter"):
        proposers.AdapterProposer(None, CopyAdapter("drafter"), lambda h: h, WIDTH)
    with pytest.raises(ParameterError, match="reads 'thoughts'"):
        proposers.AdapterProposer(None, CopyAdapter("thoughts"), lambda h: h, WIDTH)
    hungry = proposers.AdapterProposer(None, CopyAdapter("verifier"), lambda h: h, WIDTH)
    hungry.begin(BODY)
    with pytest.raises(ParameterError, match="none exist yet"):
        hungry.propose(2)


def test_autoregressive_keeps_eos_and_stops_at_the_length():
    got = autoregressive.generate(ToyDecoder(), answer(3), 10)
    assert got.ids == (3, 1, 4, EOS) and got.finish == "eos" and [s.what for s in got.spans] == [
        "prefill", "step", "step", "step"
    ]
    assert autoregressive.generate(ToyDecoder(), answer(3), 3).finish == "length"
    with pytest.raises(ParameterError, match="max_new_tokens is 0"):
        autoregressive.generate(ToyDecoder(), answer(3), 0)


def test_a_verified_id_that_the_drafter_cannot_read_does_not_stop_it():
    class Narrow(ToyDecoder):
        vocab_size = 8

        def extend(self, state, ids, parents=None):
            assert int(ids.max()) < 8
            return super().extend(state, ids, parents)

    got = run(proposers.DrafterTokens(tracks.DrafterTrack(Narrow()), 8), BODY, gamma=3,
              max_new_tokens=12)
    assert got.ids == BODY and 9 in BODY
