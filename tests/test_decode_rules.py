"""Drafting rules over token ids: what live proposers and offline floors share."""

import pytest

from xsd.core import ParameterError
from xsd.decode import proposers, rules

TRAIN = [[1, 2, 3, 4, 9], [1, 2, 3, 5, 9], [1, 2, 3, 4, 9], [7, 2, 8, 9]]


def test_a_table_drafts_live_what_it_drafts_offline():
    table = rules.NGramTable(TRAIN, n=3)
    live = proposers.RuleProposer(lambda sample: table)
    live.begin(None)
    assert live.propose(4) == rules.draft(table, [], 4) == [1, 2, 3, 4]
    live.observe([7, 2], None)
    assert live.propose(2) == rules.draft(table, [7, 2], 2) == [8, 9]


def test_a_drafted_end_ends_the_drafting():
    live = proposers.RuleProposer(lambda sample: rules.stored([1, 9, 9]), frozenset({9}))
    live.begin(None)
    assert live.propose(5) == [1, 9]


def test_a_stored_answer_has_nothing_beyond_its_end():
    assert rules.draft(rules.stored(rules.position_modes(TRAIN)), [0, 0, 0], 9) == [4, 9]
    assert rules.NGramTable([])([1, 2]) is None


@pytest.mark.parametrize(("make", "message"),
                         [(lambda: rules.NGramTable(TRAIN, 0), "n of at least 1 but got 0"),
                          (lambda: rules.prompt_lookup(longest=0), "longest is 0")])
def test_a_rule_without_context_is_refused(make, message):
    with pytest.raises(ParameterError, match=message):
        make()
