"""The losslessness certificate: identical, a tie proven by its margin, or a divergence; with its
control and its negative control."""

import certificate_cases as cases
import pytest
import torch
from models_fixtures import tiny_pair
from tiny_pair import make_samples
from toy_decoder import EOS, NOISE, WIDTH, OracleProposer, RoundingDecoder, ToyDecoder

from xsd.core import CheckpointError, LosslessError, ParameterError
from xsd.decode import autoregressive, certificate, speculative
from xsd.models import handle, small_steps

BODY = (3, 1, 4, 1, 5, 9, 2, 6)


def speculate(verifier, length=8):
    right = OracleProposer(lambda known, gamma: BODY[len(known):len(known) + gamma])
    return speculative.generate(verifier, right, BODY, gamma=3, max_new_tokens=length,
                                overlap="serial").ids


def test_equal_ids_are_identical_and_cost_nothing():
    verifier = ToyDecoder()
    assert certificate.certify(verifier, BODY, BODY, list(BODY)).outcome == "identical"
    assert verifier.rows_fed == []


def test_a_tie_that_rounding_decides_is_proven_by_its_margin():
    verifier = RoundingDecoder(tie_at=5)
    reference = autoregressive.generate(verifier, BODY, 8).ids
    candidate = speculate(verifier)
    assert candidate != reference  # the many-row pass really picked the other token
    verdict = certificate.certify(verifier, BODY, reference, candidate)
    assert (verdict.outcome, verdict.position) == ("near-tie", 5)
    assert verdict.reference_token == 9 and verdict.candidate_token == 10
    assert verdict.margin == pytest.approx(
        1e-4, abs=1e-5) and verdict.floor.largest == pytest.approx(NOISE, rel=0.01)


def test_the_same_token_with_a_margin_above_the_noise_is_a_divergence():
    verifier = RoundingDecoder(tie_at=5, margin=0.01)
    reference = autoregressive.generate(verifier, BODY, 8).ids
    verdict = certificate.certify(verifier, BODY, reference, (*reference[:5], 10, *reference[6:]))
    assert verdict.outcome == "divergence" and "below the best, the noise allows" in verdict.reason


def test_what_follows_a_tie_must_be_the_verifiers_own_too():
    verifier = RoundingDecoder(tie_at=5)
    reference = autoregressive.generate(verifier, BODY, 8).ids
    good = speculate(verifier)
    broken = (*good[:6], 1 + good[6] % (WIDTH - 1), *good[7:])
    verdict = certificate.certify(verifier, BODY, reference, broken)
    assert verdict.outcome == "divergence" and "after the candidate's own prefix" in verdict.reason
    cut_short = certificate.certify(verifier, BODY, reference, good[:7])
    assert cut_short.outcome == "divergence" and "without EOS" in cut_short.reason


def test_a_defect_of_the_many_row_pass_does_not_raise_its_own_tolerance():
    verifier = RoundingDecoder(tie_at=5, margin=1.0, defect=3.0)
    reference = autoregressive.generate(verifier, BODY, 8).ids
    verdict = certificate.certify(verifier, BODY, reference, speculate(verifier))
    assert verdict.outcome == "divergence" and "no rounding" in verdict.reason


@pytest.mark.parametrize("candidate,longer", [(BODY[:5], "reference"), ((*BODY, 7), "candidate")])
def test_an_answer_that_only_ends_elsewhere_is_a_divergence(candidate, longer):
    verdict = certificate.certify(ToyDecoder(), BODY, BODY, candidate)
    assert verdict.outcome == "divergence" and verdict.reason.startswith(f"the {longer} goes on")


def test_an_engine_cannot_raise_the_tolerance_it_is_judged_by():
    class Swapping(RoundingDecoder):
        """Wide passes swap the two best logits, here 0.1 apart: well within a quarter of the
        spread."""
        def extend(self, state, ids, parents=None):
            hidden, logits = super().extend(state, ids, parents)
            if len(ids) > 1:
                values, best = logits.topk(2)
                logits.scatter_(1, best, values.flip(1))
            return hidden, logits

        def plain(self):
            return RoundingDecoder(self.tie_at, self.margin)

    engine = Swapping(tie_at=5, margin=0.1)
    reference, candidate = autoregressive.generate(engine, BODY, 8).ids, speculate(engine)
    verdict = certificate.certify(engine, BODY, reference, candidate)
    assert candidate != reference and verdict.outcome == "divergence"
    no_clean_form = ToyDecoder()
    verdict = certificate.certify(no_clean_form, BODY, BODY, (*BODY[:5], 10, *BODY[6:]))
    assert verdict.outcome == "divergence" and verdict.floor.largest == 0


def test_negative_control_a_broken_rollback_is_found():
    class Forgetful(ToyDecoder):
        """Leaves one refused draft in the cache at every rollback."""
        def rollback(self, state, length, path=()):
            if state.length > length + 1:
                super().rollback(state, length + 1)

    reference = autoregressive.generate(ToyDecoder(), BODY, 8).ids
    wrong_third = OracleProposer(
        lambda known, gamma: [*BODY[len(known):len(known) + 1], 7, 7][:gamma])
    candidate = speculative.generate(Forgetful(), wrong_third, BODY, gamma=3, max_new_tokens=8,
                                     overlap="serial").ids
    verdict = certificate.certify(ToyDecoder(), BODY, reference, candidate)
    assert verdict.outcome == "divergence"
    with pytest.raises(LosslessError,
                       match="1 outputs differ from the verifier's own, first seq/1 at token"):
        certificate.require_lossless([("seq/0", certificate.Verdict("identical")),
                                      ("seq/1", verdict)])


def test_a_near_tie_passes_only_where_it_is_allowed():
    tie = certificate.Verdict("near-tie", 5, reason="close")
    certificate.require_lossless([("a", tie)], allow_near_ties=True)
    with pytest.raises(LosslessError, match="near-tie: close"):
        certificate.require_lossless([("a", tie)])


def test_control_arm_says_identical_on_a_repeatable_machine():
    assert [v.outcome for v in certificate.control(ToyDecoder(), [BODY, (*BODY[:3], EOS)], 8)
            ] == ["identical"] * 2


def test_noise_floor_is_calibrated_over_many_samples():
    floor = certificate.noise_floor(RoundingDecoder(), [BODY, BODY[:4]], [BODY, BODY[:4]])
    assert floor.n == 7 + 3 and floor.largest == pytest.approx(NOISE, rel=0.01)
    assert certificate.noise_floor(ToyDecoder(), [BODY], [BODY]).largest == 0.0
    with pytest.raises(ParameterError, match="calibrate on longer answers"):
        certificate.noise_floor(ToyDecoder(), [BODY], [BODY[:1]])


def test_logits_of_both_passes_are_read_at_the_same_positions():
    one, many = (f(ToyDecoder(), BODY, BODY)
                 for f in (certificate._one_row, certificate._many_rows))
    assert torch.equal(one, many) and one.argmax(-1).tolist() == list(BODY)


class NoNumbers(ToyDecoder):
    """Every logit is NaN."""
    def prefill(self, sample):
        state = super().prefill(sample)
        state.logits = state.logits * float("nan")
        return state

    def extend(self, state, ids, parents=None):
        hidden, logits = super().extend(state, ids, parents)
        return hidden, logits * float("nan")


def test_logits_that_are_no_numbers_prove_nothing():
    verdict = certificate.certify(NoNumbers(), BODY, [3, 1, 4], [3, 1, 5])
    assert verdict.outcome == "divergence" and "not finite" in verdict.reason
    nan = certificate.NoiseFloor(float("nan"), 3)
    verdict = certificate.certify(ToyDecoder(), BODY, [3, 1, 4], [3, 1, 5], floor=nan)
    assert verdict.outcome == "divergence" and "not finite" in verdict.reason
    with pytest.raises(LosslessError, match="not finite"):
        certificate.require_lossless([("sample", verdict)], allow_near_ties=True)
    said = OracleProposer(lambda known, gamma: [3, 1, 4][len(known):])
    for decode in (lambda: autoregressive.generate(NoNumbers(), BODY, 4),
                   lambda: speculative.generate(NoNumbers(), said, BODY, gamma=2, max_new_tokens=4),
                   lambda: certificate.noise_floor(NoNumbers(), [BODY], [[3, 1, 4]])):
        with pytest.raises(CheckpointError, match="the model gives NaN or infinity"):
            decode()


def test_every_kind_of_request_is_identical_or_a_proven_tie():
    """A sample; all of them: python tests/certificate_cases.py."""
    outcomes, accepted = cases.counted(cases.exact(step=31))
    assert set(outcomes) == {"identical"} and set(accepted) >= set(range(8))
    outcomes, _ = cases.counted(cases.rounding(step=29))
    assert set(outcomes) == {"identical", "near-tie"}
    for verifier in (tiny_pair().verifier, tiny_pair().verifier.plain()):
        outcomes, _ = cases.counted(cases.live(verifier, make_samples(2, seed=3), step=43))
        assert set(outcomes) == {"identical"}


def causal(parents, start, room=0, *, device=None):
    """A tree mask that forgets who is whose child: every row sees all before it."""
    places, seen = TREE_ROWS(parents, start, room, device=device)
    return places, seen | torch.ones_like(seen).tril_(start)


def in_a_row(parents, start, room=0, *, device=None):
    """Positions that do not know of branches."""
    _, seen = TREE_ROWS(parents, start, room, device=device)
    return start + torch.arange(len(parents), device=device), seen


TREE_ROWS = small_steps.tree_rows
BROKEN = {
    "mask": (small_steps, "tree_rows", causal),
    "positions": (small_steps, "tree_rows", in_a_row),
    "rows stay where they were": (small_steps.GrowingCache, "move", lambda *given: None),
    "one row too many stays": (handle.ModelHandle, "rollback", lambda self, state, length, path=():
                               ROLLBACK(self, state, length + (state.length > length + 1), path)),
}
ROLLBACK = handle.ModelHandle.rollback


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_tree_is_found(broken, monkeypatch):
    monkeypatch.setattr(*BROKEN[broken])
    verifier, sample = tiny_pair().verifier, make_samples(1, seed=3)[0]
    answer = autoregressive.generate(verifier, sample, 16).ids
    assert any(
        cases.verdict(verifier, sample, "partial", shape, 4, 12, answer=answer,
                      seed=seed)[0].outcome == "divergence"
        for seed in range(4) for shape in cases.SHAPES[1:])
