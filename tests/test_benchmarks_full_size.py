"""``xsd bench full-size`` in tiny on the CPU: what a GPU will run first is run here first."""

import json
import time

import pytest

from benchmarks import full_size, full_size_page
from xsd.core import ParameterError
from xsd.models import quantization


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The whole script, which takes about a minute: every part of it in one run."""
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:  # a busy machine takes its time, and may
        patch.setattr(full_size, "PARTS",
                      {name: (20 * most, part) for name, (most, part) in full_size.PARTS.items()})
        page = full_size.run(folder, size="tiny", device="cpu", seconds=3000)
    assert (folder / "full_size.md").read_text(encoding="utf-8") == page
    return json.loads((folder / "full_size.json").read_text(encoding="utf-8"))


def test_every_part_runs_and_every_answer_is_the_same(results):
    found = results["parts"]
    assert list(found) and set(found) == set(full_size.PARTS)
    failed = {name: one["error"] for name, one in found.items() if "error" in one}
    if not quantization.is_torchao_available():
        assert "pip install 'xsd[int4]'" in failed.pop("int4")
    assert not failed
    ways = [
        *found["ladder"].values(), *found["static"].values(), *found["dial"].values(),
        found["4bit"]["answer"], found["8bit"]["answer"], found["two in 4bit"]
    ]
    wrong = [one for one in ways if isinstance(one, dict) and one.get("identical") is not True]
    assert not wrong


def test_the_dial_turns_what_is_accepted(results):
    ms = {
        name: one["total_ms"] for name, one in results["parts"]["dial"].items()
        if isinstance(one, dict)
    }
    assert set(ms) == {
        f"{share:g} right, {what}" for share in (0.6, 0.8, 1.0)
        for what in ("5 drafts", "15 drafts", "a block of 8")
    }


def test_the_page_says_each_aim_with_what_was_measured(results):
    page = full_size_page.page(results)
    rows = full_size_page.aims(results["parts"])
    assert len(rows) == 9 and all(f"| {what} | {aim} |" in page for what, aim, _, _ in rows)
    assert all(value is not None for what, _, value, _ in rows if "GB, training" not in what)
    results["parts"]["dial"]["0.8 right, 5 drafts"]["identical"] = False
    speed_up = [row for row in full_size_page.aims(results["parts"]) if "ids identical" in row[0]]
    assert speed_up[0][3] is not True  # other ids are no speed-up


def test_a_part_that_fails_or_runs_over_leaves_a_sentence_and_the_rest_goes_on(
        tmp_path, monkeypatch):
    def broken(bench):
        raise RuntimeError("no such kernel\nand more")

    def slow(bench):
        try:
            time.sleep(30)
        except Exception:
            pytest.fail("a part may not hold this")

    monkeypatch.setattr(
        full_size, "PARTS", {
            "broken": (5, broken), "slow": (1, slow), "needy":
                (5, lambda bench: bench.verifier), "good": (5, lambda bench: {"x": 1.5})
        })
    page = full_size.run(tmp_path, size="tiny", device="cpu")
    found = json.loads((tmp_path / "full_size.json").read_text(encoding="utf-8"))["parts"]
    assert found["broken"]["error"] == "RuntimeError: no such kernel"
    assert found["slow"]["error"] == "OutOfTime: it took longer than its 1 s"
    assert found["needy"]["error"].startswith("it needs 'verifier'")
    assert found["good"]["x"] == 1.5 and "| x | 1.5 |" in page
    full_size.run(tmp_path, size="tiny", device="cpu", seconds=0)
    found = json.loads((tmp_path / "full_size.json").read_text(encoding="utf-8"))["parts"]
    assert all("no time was left" in one["error"] for one in found.values())


def test_a_device_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ParameterError, match="device='cuda:9'"):
        full_size.run(tmp_path, size="tiny", device="cuda:9")
