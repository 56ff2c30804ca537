"""Token traces of models that ran elsewhere: figures known by hand from a small own file, and what
a bad file says."""

import json
import os

import pytest

from xsd import cli
from xsd.core import DatasetError, ParameterError
from xsd.decode import replay
from xsd.evaluate import curves
from xsd.evaluate import table as token_table
from xsd.runs import folder
from xsd.steps import judge, traces

A, B = [5, 6, 7, 8, 2], [5, 6, 9, 8, 2]
ROWS = [{"clip": 0, "sequence": "s0", "drafter_ids": [5, 6, 7], "verifier_ids": A},
        {"clip": 1, "sequence": "s0", "drafter_ids": [4, 6, 7, 8, 2], "verifier_ids": A},
        {"clip": 0, "sequence": "s1", "drafter_ids": [4, 6, 7, 8, 2],
         "verifier_ids": A}, {"clip": 0, "sequence": "s2", "drafter_ids": [], "verifier_ids": B},]
REFERENCE = os.environ.get("XSD_REFERENCE_TRACES", "")


@pytest.fixture
def trace_file(tmp_path):
    path = tmp_path / "seven.json"
    path.write_text(json.dumps({"question": "What is there?", "rows": ROWS}))
    return path


def test_agreement_floors_and_duplicates_are_those_counted_by_hand(trace_file, tmp_path):
    found = traces.run(trace_file, tmp_path / "run", gamma=5, resamples=50)
    own = found["arms"]["drafter tokens"]
    assert own["token_acceptance"]["value"] == pytest.approx((3 + 4 + 4 + 0) / 20)
    assert [each["share"] for each in own["by_position"]] == [0.25, 0.75, 0.75, 0.5, 0.5]
    # Trained on the other sequences: s0 sees A and B (7 before 9 on a tie), s1 sees A A B, s2 sees
    # A only, so B's third token is missed.
    assert found["arms"]["position mode"]["token_acceptance"]["value"] == pytest.approx(19 / 20)
    assert found["duplicates"]["verifier"]["shared"] == 0.75 and found["duplicates"]["verifier"][
        "repeated"] == 0.5
    assert found["duplicates"]["drafter"] == {
        "shared": pytest.approx(2 / 3), "repeated": pytest.approx(1 / 3), "n": 3
    }
    assert found["n_sequences"] == 3 and found["arms"]["4-gram"]["token_acceptance"][
        "n_clusters"] == 3


def test_a_floor_never_sees_the_sequence_it_is_tried_on(tmp_path):
    rows = [{**row, "sequence": f"s{i}", "verifier_ids": [10 + i, 20 + i]}
            for i, row in enumerate(ROWS)]
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"question": "q", "rows": rows}))
    found = traces.run(path, tmp_path / "run", resamples=50)
    assert found["arms"]["position mode"]["token_acceptance"]["value"] == 0
    assert found["arms"]["4-gram"]["token_acceptance"]["value"] == 0


def test_the_run_holds_the_projects_token_table(trace_file, tmp_path):
    traces.run(trace_file, tmp_path / "run", resamples=50)
    tokens = token_table.check(folder.load_tokens(tmp_path / "run"), "cosine", "match")
    assert set(tokens["level"]) == {"drafter tokens", "position mode", "4-gram"
                                    } and len(tokens) == 3 * 20
    assert curves.by_position(tokens)["marginal"].between(0, 1).all()
    assert folder.load_results(tmp_path / "run")["traces"]["n"] == 4


def test_replayed_schedules_count_passes_and_price_them(trace_file, tmp_path):
    prices = tmp_path / "prices.json"
    prices.write_text(
        json.dumps({
            "verifier_prefill_s": 1, "drafter_prefill_s": 0.5, "draft_s": 0,
            "verify": {"1": 1, "6": 1}
        }))
    found = traces.run(trace_file, tmp_path / "run", gamma=5, prices=prices, resamples=50)
    mode = found["arms"]["position mode"]["schedule"]
    # An answer of five tokens: the prefill gives the first, one pass accepts three and adds the
    # last; B needs a second pass.
    assert (mode["passes"], mode["passes_alone"]) == (5, 16)
    assert mode["predicted_alone_s"] == 20 and mode["predicted_s"] == 4 + 5
    floor = traces.arms(traces.read(trace_file)[0])["position mode"]
    walked = replay.replay(A, lambda prefix, n: floor.draft(prefix, n, 0), gamma=5,
                           eos_token_ids=frozenset({2}))
    assert [(r.n_drafted, r.n_accepted, r.bonus) for r in walked] == [(0, 0, True), (3, 3, True)]
    with pytest.raises(ParameterError, match="holds no prices"):
        judge.read_prices(trace_file)


def test_rows_without_sequences_are_cut_into_blocks_of_neighbours(tmp_path):
    path = tmp_path / "t.json"
    path.write_text(
        json.dumps({
            "question": "q",
            "rows": [{"clip": i, "drafter_ids": [1], "verifier_ids": [1, 2]} for i in range(7)]
        }))
    assert [t.sequence[-2:]
            for t in traces.read(path, blocks=3)[0]] == ["00", "00", "00", "01", "01", "02", "02"]
    traces.write(tmp_path / "again.json", traces.read(path, blocks=3)[0])
    assert traces.read(tmp_path / "again.json") == traces.read(path, blocks=3)


def test_one_sequence_alone_has_no_tables_and_says_so(tmp_path):
    path = tmp_path / "one.json"
    path.write_text(json.dumps({"rows": [{"clip": 1, "drafter_ids": [], "verifier_ids": [1]}]}))
    found = traces.run(path, tmp_path / "run", resamples=50)
    assert list(found["arms"]) == ["drafter tokens"] and found["duplicates"]["drafter"]["n"] == 0
    assert "nothing to train the tables on" in traces.text(found)


@pytest.mark.parametrize(
    ("content", "words"),
    [("{", "is no trace file"), ("[]", "is no trace file"), ("[" * 100_000, "nested too deep"),
     ("", "is no trace file"), ('"rows"', "is no trace file"),
     ('{"rows": [{"clip": [], "drafter_ids": [], "verifier_ids": [1]}]}', "of row 0 must be texts"),
     ('{"rows": 3}', "rows must be a list"),
     ('{"rows": [{"clip": 1}]}', "row 0 lacks clip, drafter_ids or verifier_ids"),
     ('{"rows": [{"clip": 1, "drafter_ids": ["a"], "verifier_ids": [1]}]}',
      "drafter_ids of row 0 must be a list of token ids"),
     ('{"rows": [{"clip": 1, "drafter_ids": [], "verifier_ids": []}]}',
      "row 0 has no verifier token"), ('{"rows": []}', "holds no row"),],
)
def test_a_bad_file_is_named(tmp_path, content, words):
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(DatasetError, match=words):
        traces.read(path)


def write_rows(path, ids, **fields):
    rows = [{"clip": i, "sequence": f"s{i}", "drafter_ids": ids, "verifier_ids": ids}
            for i in range(2)]
    path.write_text(json.dumps({"rows": rows, **fields}))
    return path


def test_the_file_names_what_ends_its_answers(tmp_path):
    ids = [10, 2, 11, 2, 12, 2, 13, 2, 14, 2, 15, 2, 16, 128009]  # 2 is a word of this vocabulary
    path = write_rows(tmp_path / "t.json", ids, eos=128009)
    found = traces.run(path, tmp_path / "run", gamma=5, resamples=50)
    # after the prefill's token five drafts and one more a pass: 7, 13 and the last, which ends it
    assert found["arms"]["drafter tokens"]["schedule"]["passes"] == 2 * 3
    assert found["eos"] == [128009] and found["ended"] == 2
    with pytest.raises(DatasetError, match=r"row 0 goes on behind 2, which ends answers \(Llama's"):
        traces.read(write_rows(path, ids))
    cut = traces.run(write_rows(path, ids[:-1], eos=[128009]), tmp_path / "cut", resamples=50)
    assert "no answer ends with 128009" in traces.text(cut)
    again = tmp_path / "again.json"
    traces.write(again, traces.read(path)[0], [128009])
    assert traces.read(again) == traces.read(path)


@pytest.mark.parametrize("ids", [[-1], [1.0], [True], [2**31], ["1"], [None], 3, {"0": 1}, "12"])
def test_what_is_no_token_id_is_refused(tmp_path, ids):
    with pytest.raises(DatasetError, match="must be a list of token ids"):
        traces.read(write_rows(tmp_path / "t.json", ids))


@pytest.mark.parametrize("eos", ["2", -1, [2.5], [None], {}, True])
def test_an_end_that_is_no_token_id_is_refused(tmp_path, eos):
    with pytest.raises(DatasetError, match="eos must be the token id"):
        traces.read(write_rows(tmp_path / "t.json", [1], eos=eos))


def test_a_folder_without_pairs_is_no_trace_file(tmp_path, capsys):
    assert cli.main(["data", "import-traces", str(tmp_path)]) == 2
    assert "is a folder, and holds no stored pairs" in capsys.readouterr().err


def test_the_command_prints_the_table(trace_file, tmp_path, capsys):
    assert cli.main(["import-traces",
                     str(trace_file), "-o",
                     str(tmp_path / "run"), "--gamma", "3"]) == 0
    said = capsys.readouterr().out
    assert "4 pairs of answers in 3 sequences" in said and "4-gram" in said and "γ=3" in said
    assert cli.main(["import-traces", str(tmp_path / "none.json")]) == 2
    assert "there is no trace file" in capsys.readouterr().err


@pytest.mark.skipif(
    not REFERENCE,
    reason="set XSD_REFERENCE_TRACES to the published token traces (not redistributable)")
def test_traces_of_the_real_pair_show_their_template(tmp_path):
    found = traces.run(REFERENCE, tmp_path / "run", resamples=50)
    assert found["n"] == 700 and found["arms"]["drafter tokens"]["by_position"][0]["share"] < 0.02
    assert found["arms"]["4-gram"]["token_acceptance"]["value"] > 0.7
