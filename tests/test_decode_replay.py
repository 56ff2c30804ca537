"""A replayed schedule has the rounds of the live run, and its price follows from the measured
costs."""

import itertools

import pytest
from toy_decoder import EOS, ToyDecoder

from xsd.core import ParameterError
from xsd.decode import autoregressive, proposers, replay, speculative

BODY = (3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8)


def test_replay_gives_the_rounds_of_the_live_run():
    verifier = ToyDecoder()
    for eos_at, gamma, hiding, every, length in itertools.product((1, 4, 9), (1, 3, 8), (1, 5),
                                                                  (2, 3, 99), (1, 4, 12)):
        sample = (*BODY[:eos_at], EOS)

        def table(prefix, gamma, sample=sample, every=every):
            at = len(prefix)
            return [
                7 if i % every == every - 1 else sample[i] if i < len(sample) else 7
                for i in range(at, at + gamma)
            ]

        live = speculative.generate(verifier, proposers.OracleProposer(table), sample, gamma=gamma,
                                    gamma_prefill=hiding, max_new_tokens=length, overlap="serial",
                                    )
        answer = autoregressive.generate(verifier, sample, length).ids
        rounds = replay.replay(answer, table, gamma=gamma, gamma_prefill=hiding,
                               eos_token_ids=verifier.eos_token_ids, max_new_tokens=length)
        assert [(r.n_drafted, r.n_accepted, r.bonus) for r in rounds
                ] == [(len(r.drafted), r.n_accepted, r.bonus is not None) for r in live.rounds]


def test_rows_fed_are_those_of_the_live_run():
    verifier = ToyDecoder()

    def table(prefix, gamma):
        return BODY[len(prefix):len(prefix) + gamma]

    live = proposers.OracleProposer(table)
    speculative.generate(verifier, live, BODY, gamma=3, gamma_prefill=2, max_new_tokens=12,
                         overlap="serial")
    rounds = replay.replay(BODY, table, gamma=3, gamma_prefill=2)
    assert [r.rows for r in rounds if r.rows] == verifier.rows_fed


def test_the_price_adds_up():
    prices = replay.Prices(verifier_prefill_s=10.0, drafter_prefill_s=4.0, draft_s=1.0,
                           verify={1: 2.0, 4: 5.0})
    assert [prices.verify_s(k) for k in (1, 2, 4, 6)] == [2.0, 3.0, 5.0, 7.0]
    rounds = [replay.ReplayedRound(2, 0, True, 0, hiding=True), replay.ReplayedRound(3, 3, True, 4)]
    assert replay.predicted_seconds(rounds, prices) == 10 + 3 + 5
    assert replay.predicted_seconds(rounds, prices, overlapped=False) == 10 + 4 + 2 + 3 + 5


def test_impossible_replays_are_refused():
    with pytest.raises(ParameterError, match="replay needs at least one of each"):
        replay.replay((), lambda prefix, gamma: [], gamma=3)
    with pytest.raises(ParameterError, match="verification_curve"):
        replay.Prices(1, 1, 1, {}).verify_s(2)
