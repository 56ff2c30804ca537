"""Which runs may be subtracted from each other, and why others may not."""

import json

import pytest
from views_examples import token_table

from xsd.core import ParameterError
from xsd.runs import folder, listing
from xsd.steps import compare


def made(place, *, seed=0, levels=("L1", "L4", "drafter_tokens"), data="aaaa", gamma=5,
         mode="teacher_forced", verifier="one", longest=48, sets=("simulated",), live=None):
    """A run folder as notebooks 01 and 04 leave it, of a made-up token table."""
    given = {"gamma": gamma, "mode": mode, "test_data": list(sets)}
    hashes = [f"{data}_{name}" for name in sets]
    folder.save_results(place, "extract", {
        "weights": {"verifier": verifier}, "data_hashes": {
            f"test_{name}": value for name, value in zip(sets, hashes, strict=True)},
        "provenance": {"parameters": {"max_new_tokens": longest}}})
    folder.save_results(place, "tokens", {
        "gamma": gamma, "mode": mode, "test": {name: {"rows": {}} for name in sets},
        "provenance": {"parameters": given, "data_hash": "+".join(hashes)}})
    folder.save_tokens(place, token_table(seed, levels=levels).assign(data=sets[0]))
    if live:
        folder.save_results(place, "live", {
            "baseline": live.get("baseline", "ar"), "test": {name: {} for name in sets},
            "provenance": {"parameters": {"gamma": gamma, "threads": live.get("threads", 1)},
                           "machine": live.get("machine", {"cores": 2})}})
    return str(place)


def difference(runs):
    return compare.differences(runs, "accepted_per_round", resamples=50, seed=0)


def test_runs_that_share_data_pair_and_parameters_are_subtracted(tmp_path):
    runs = [made(tmp_path / "a"), made(tmp_path / "b", seed=1)]
    assert compare.apart(runs, "accepted_per_round").empty
    assert set(difference(runs)["against"]) == {"a L1", "a L4", "a drafter_tokens"}


@pytest.mark.parametrize(("other", "why"), [
    ({"data": "bbbb"}, "its held-out data is bbbb_simulated, that of a aaaa_simulated"),
    ({"gamma": 3}, "its gamma is 3, that of a 5"),
    ({"mode": "free_running"}, "its mode is free_running, that of a teacher_forced"),
    ({"verifier": "two"}, "its verifier's weights is two, that of a one"),
    ({"longest": 64}, "its longest answer is 64, that of a 48"),
    ({"sets": ("davis_road",)}, "a was not evaluated on it"),
])
def test_other_runs_are_named_with_the_reason_and_not_subtracted(tmp_path, other, why):
    runs = [made(tmp_path / "a"), made(tmp_path / "b", **other), made(tmp_path / "c", seed=1)]
    found = compare.apart(runs, "accepted_per_round")
    assert set(found["run"]) == {"b"} and why in list(found["why"])
    assert set(difference(runs)["run"]) == {"c"}
    assert found["why"].tolist() == compare.apart(runs, "accepted_per_round", baseline="a")[
        "why"].tolist()


@pytest.mark.parametrize(("other", "why"), [
    ({"baseline": "hf_generate"}, "its baseline is hf_generate, that of a ar"),
    ({"threads": 2}, "its threads is 2, that of a 1"),
    ({"machine": {"cores": 8}}, "its machine is {'cores': 8}, that of a {'cores': 2}"),
])
def test_speed_ups_of_another_baseline_or_machine_are_not_subtracted(tmp_path, other, why):
    runs = [made(tmp_path / "a", live={"baseline": "ar"}), made(tmp_path / "b", live=other)]
    assert compare.apart(runs, "speedup")["why"].tolist() == [why]
    assert compare.apart(runs, "accepted_per_round").empty


def test_points_of_a_sweep_open_as_one_comparison(tmp_path):
    place = tmp_path / "sweep"
    points = {"gamma=3_levels=L1": (3, "L1"), "gamma=3_levels=L4": (3, "L4"),
              "gamma=5_levels=L4": (5, "L4")}
    rows = [{"run_dir": made(place / name / "run", gamma=gamma, levels=(level, "drafter_tokens")),
             "status": "finished"} for name, (gamma, level) in points.items()]
    rows.append({"run_dir": str(place / "failed" / "run"), "status": "failed"})
    (place / "sweep.json").write_text(json.dumps({"runs": rows}))
    runs = listing.runs_of([str(place)])
    assert listing.names(runs) == list(points)
    assert list(listing.overview(runs)["gamma"]) == ["3", "3", "5"]
    found = difference(runs)  # each holds one level: it is compared with the baseline's only one
    assert found["against"].tolist() == [f"{names} {level}" for names, level in (
        ("gamma=3_levels=L1", "L1"), ("gamma=3_levels=L1", "drafter_tokens"))]
    assert set(found["run"]) == {"gamma=3_levels=L4"}
    assert compare.apart(runs, "accepted_per_round")["run"].tolist() == ["gamma=5_levels=L4"]
    (place / "sweep.json").write_text(json.dumps({"runs": rows[3:]}))
    with pytest.raises(ParameterError, match=r"no point of .* has finished"):
        listing.runs_of([str(place)])
