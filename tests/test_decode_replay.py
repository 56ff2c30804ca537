"""A replayed schedule has the rounds of the live run, and its price follows from the measured
costs."""

import dataclasses
import itertools

import pytest
from toy_decoder import EOS, OracleProposer, ToyDecoder

from xsd.core import ParameterError
from xsd.decode import autoregressive, replay, speculative
from xsd.decode.prices import Prices

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

        live = speculative.generate(verifier, OracleProposer(table), sample, gamma=gamma,
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

    live = OracleProposer(table)
    speculative.generate(verifier, live, BODY, gamma=3, gamma_prefill=2, max_new_tokens=12,
                         overlap="serial")
    rounds = replay.replay(BODY, table, gamma=3, gamma_prefill=2)
    assert [r.rows for r in rounds if r.rows] == verifier.rows_fed


def test_the_price_adds_up():
    prices = Prices(verifier_prefill_s=10.0, drafter_prefill_s=4.0, draft_s=1.0,
                    verify={1: 2.0, 4: 5.0})
    rounds = [replay.ReplayedRound(2, 0, True, 0, hiding=True), replay.ReplayedRound(3, 3, True, 4)]
    assert replay.predicted_seconds(rounds, prices) == 10 + 3 + 5
    serial = dataclasses.replace(prices, overlap=0.0)
    assert replay.predicted_seconds(rounds, serial) == 10 + 4 + 2 + 3 + 5
    once = dataclasses.replace(prices, round_s=0.5, contention=1.2)
    assert replay.predicted_seconds(rounds, once) == 12 + 3.5 + 5
    late = dataclasses.replace(prices, drafter_prefill_s=9.0)
    assert replay.predicted_seconds(rounds, late) == 9 + 2 + 3 + 5


def test_a_pass_is_a_straight_line_between_measured_widths_and_refused_beyond():
    prices = Prices(10.0, 4.0, 1.0, verify={1: 2.0, 4: 5.0, 8: 5.0})
    assert [prices.verify_s(k) for k in (1, 2, 4, 6, 8)] == [2.0, 3.0, 5.0, 5.0, 5.0]
    with pytest.raises(ParameterError, match=r"v\(9\) was not measured \(K = 1 … 8\)"):
        prices.verify_s(9)


@pytest.mark.parametrize(("values", "message"), [
    ({"verify": {}}, "verification_curve from K = 1 on"),
    ({"verify": {2: 3.0}}, "single-token pass"),
    ({"draft_s": float("nan")}, "finite times"), ({"overlap": 1.2}, r"overlap in \[0, 1\]"),
    ({"contention": 0.5}, "contention at least 1")])
def test_prices_that_are_none_are_refused(values, message):
    with pytest.raises(ParameterError, match=message):
        Prices(**{"verifier_prefill_s": 1.0, "drafter_prefill_s": 1.0, "draft_s": 1.0,
                  "verify": {1: 1.0}, **values})


def test_impossible_replays_are_refused():
    with pytest.raises(ParameterError, match="replay needs at least one of each"):
        replay.replay((), lambda prefix, gamma: [], gamma=3)
