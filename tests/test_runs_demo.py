"""The demo: its parameters are valid, and its page says what the results say."""

import json
import re

import nbformat
import pages
import pandas as pd
import pytest
from views_examples import lengths_table, live_runs, speedups, token_table

from xsd import files
from xsd.core import ParameterError
from xsd.runs import demo, demo_page, exports, folder, notebooks, numbers, profiles, report
from xsd.steps import evaluation


def interval(value, width=0.1, n=24):
    return {"value": value, "low": value - width, "high": value + width, "n": n}


def results():
    names = {
        "L4": "L4", "L5F": "L5F", "B1 (reads the verifier)": "B1",
        "drafter tokens": "drafter_tokens", "4-gram": "ngram", "L1": "L1"
    }
    rows = {
        names[row["name"]]: {
            "label": row["name"], "kind": row["kind"], "token_acceptance": interval(0.5),
            "accepted_per_round": {key: row[key] for key in ("value", "low", "high", "n")},
            "above_floor": interval(row["value"] - 1.5),
        } for row in lengths_table().to_dict("records") if row["name"] in names
    }
    levels = {
        level: {"cosine": interval(0.9, 0.01), "accept": interval(0.5)}
        for level in ("L1", "L4", "L5F", "B1")
    }
    arms = {
        f"arm{index}": {
            "label": row["name"], "kind": row["kind"], "speedup": interval(row["value"]),
            "total_ms": interval(300.0, 20), "accepted_per_round": interval(2.0),
        } for index, row in enumerate(speedups().to_dict("records"))
    }
    check = {
        "labels": "L4, B1 and L1 + L5F", "n_answers": 30, "n_identical": 30, "n_near_ties": 0,
        "n_divergences": 0
    }
    counts = {"sequences": 4, "pairs": 80, "tokens": 1900}
    return {
        "extract": {
            "train": counts,
            "test": {"simulated": {**counts, "duplicate_rate": 0.34},
                     "davis_road": counts}, "data_hash": "abc"
        }, "train": {
            "levels": {
                level: {"parameters": 33281, "seconds": 2.5, "epochs": 12, "validation_loss": 0.8}
                for level in ("L1", "L4")
            }
        }, "hidden": {"test": {"simulated": {"threshold": 0.9, "levels": levels}}}, "tokens": {
            "test": {"simulated": {"rows": rows, "best_floor": "ngram", "best_adapter": "L5F"}}
        }, "live": {
            "arms": arms,
            "test": {"simulated": {"arms": arms, "n_timed": 10, "baseline": "arm0"}},
            "best_arm": "arm1", "baseline": "arm0", "n_drafting": 7, "n_timed": 10, "n_answers": 30,
            "n_identical": 30, "check": check
        },
    }


def body(found, run_dir="nowhere"):
    return report.render(demo_page.template(), found, **demo_page.parts(run_dir, found))


@pytest.fixture
def finished(tmp_path):
    run_dir, found = tmp_path / "run", results()
    folder.save_tokens(
        run_dir,
        pd.concat([
            token_table().assign(data="simulated"),
            token_table(4, run="demo").assign(data="davis_road")
        ]))
    kept = folder.save_live(run_dir, live_runs(), {token: f" word{token}" for token in range(12)},
                            question="What is moving?")
    found["tokens"]["test"]["simulated"] |= evaluation.drawn(token_table())
    found["live"]["timeline"] = json.loads(kept.read_text())
    for name, values in found.items():
        folder.save_results(run_dir, name, values)
    return tmp_path


@pytest.mark.parametrize("profile", profiles.names())
def test_the_parameters_of_every_step_are_valid(profile, tmp_path):
    plan = demo.given(demo.STEPS, profile, tmp_path, ["seed=3"])
    assert all(values["seed"] == 3 for values in plan.values())
    assert plan["06_compare"]["runs"] == [str(tmp_path)]


def test_a_chain_is_a_span_of_notebooks_on_one_run_folder(tmp_path):
    assert demo.steps_of("02-04") == ["02_train", "03_hidden", "04_tokens"]
    assert demo.steps_of("05") == demo.steps_of("x-y") == []
    with pytest.raises(ParameterError, match="00-07 is no part of the chain; it goes from 01 to"):
        demo.steps_of("00-07")
    with pytest.raises(ParameterError, match="share the run folder"):
        demo.given(demo.STEPS, "", tmp_path, ["run_dir=runs/mine"])
    with pytest.raises(ParameterError, match="'sed': did you mean 'seed'"):
        demo.given(demo.STEPS, "", tmp_path, ["sed=1"])


def test_a_chain_goes_on_with_the_first_notebook_that_is_not_finished(tmp_path, monkeypatch):
    """And runs again what follows one that was given something else."""
    ran, results = [], tmp_path / "run" / "results"
    monkeypatch.setattr(files, "_git", lambda *about: "abc" if about[0] == "rev-parse" else "")
    monkeypatch.setattr(demo, "build", lambda out_dir, **about: out_dir)

    def execute(book, copy, written, values):
        ran.append(copy.stem)
        if len(ran) == 2:
            raise KeyboardInterrupt
        nbformat.write(book, written)
        files.write_json(results / f"{copy.stem.partition('_')[2]}.json", {})

    monkeypatch.setattr(notebooks, "_execute", execute)
    options = {"profile": "", "steps": ["02_train", "03_hidden", "04_tokens"],
               "say": lambda text, **how: None}
    with pytest.raises(KeyboardInterrupt):
        demo.run(tmp_path, **options)
    demo.run(tmp_path, **options)
    assert ran == ["02_train", "03_hidden", "03_hidden", "04_tokens"]
    demo.run(tmp_path, **options)
    assert len(ran) == 4
    demo.run(tmp_path, **options, changes=["max_positions=7"])
    assert ran[4:] == ["03_hidden", "04_tokens"]


def test_the_page_is_true_offline_and_complete(finished):
    page = demo.build(finished, profile="demo", seed=0, seconds={"01_extract": 10.0}).read_text()
    assert numbers.external_requests(page) == []
    stored = {**folder.load_results(finished / "run")}
    lead = page[page.index('class="lead"'):page.index("<nav>")]
    above = "tokens/test/simulated/rows/L5F/above_floor/value"
    assert f'data-key="{above}" data-format="+.2f">+2.60<' in lead
    assert 'data-key="live/arms/arm1/speedup/value"' in lead
    text = page[page.index("How templated the answers are"):]
    assert 'data-key="extract/test/simulated/duplicate_rate" data-format=".1%">34.0%<' in text[:400]
    assert 'data-key="tokens/test/simulated/rows/ngram/accepted_per_round/value"' in text[:600]
    assert all(title in page
               for title in ("What was done", "How many draft tokens", "Position by position",
                             "token by token", "Live", "does not show"))
    assert stored["live"]["n_identical"] == 30 and page.count("token-pairs") == 20
    assert "Yardstick" in page and "Ceiling" not in page
    for href in set(re.findall('href="#([^"]+)"', page)):  # a table's row leads to its tokens
        assert f'id="{href}"' in page, href
    assert 'href="#tokens-simulated-L5F"' in page
    assert '<details id="tokens-simulated-L5F" open>' in page


def test_every_number_in_a_picture_is_in_the_results(finished):
    page = demo.build(finished, profile="demo", seed=0, seconds={}).read_text()
    stored = json.loads((finished / "results.json").read_text())
    assert page.count(
        'class="figure"') >= 6 and "in the answer" in page and "milliseconds since" in page
    assert pages.picture_disagreements(page, stored) == []
    stored["tokens"]["test"]["simulated"]["by_position"]["survival"][2] += 0.0123
    for span in stored["live"]["timeline"]["generations"]["baseline"]["spans"]:
        span["start_s"], span["end_s"] = span["start_s"] + 0.0007, span["end_s"] + 0.0007
    wrong = pages.picture_disagreements(page, stored)
    assert any("in 'verifier', which is not" in one for one in wrong) and len(wrong) >= 2


def test_a_run_with_less_says_less(finished):
    for name in ("hidden", "live", "train"):
        (finished / "run" / "results" / f"{name}.json").unlink()
    (finished / "run" / "live.json").unlink()
    page = demo.build(finished, profile="demo", seed=0, seconds={}).read_text()
    assert "measured timeline" not in page and "How many draft tokens" in page


def test_a_live_run_comes_back_as_it_was(finished):
    stored = json.loads((finished / "run" / "live.json").read_text())
    generations, texts, about = folder.live_of(stored)
    assert generations == live_runs() and texts[3] == " word3" and about == {
        "question": "What is moving?"
    }
    assert list(generations) == ["speculative", "baseline"]


def test_a_busy_machine_claims_nothing_on_the_page():
    found = results()
    calm = body(found)
    assert "of the speed of the best baseline" in calm and ">speed-up</th>" in calm
    found["live"]["busy"] = found["live"]["test"]["simulated"]["busy"] = True
    for arm in found["live"]["arms"].values():
        arm["speedup"]["busy"] = True
    busy = body(found)
    assert "The machine was busy" in busy and "no speed-up is claimed" in busy
    assert ">speed-up</th>" not in busy and "of the speed of the best baseline" not in busy


def test_the_site_of_all_runs_leads_to_pages_and_tokens_and_is_the_same_twice(finished, tmp_path):
    index = demo.site([tmp_path], tmp_path / "site")
    first = {path.name: path.read_bytes() for path in index.parent.glob("*.html")}
    links = re.findall('<a href="([^"#]+)#(tokens-[^"]+)">', index.read_text())
    assert len(links) == 10 and len(first) == 2
    for page, to in links:
        assert f'id="{to}"'.encode() in first[page]
    demo.site([tmp_path], tmp_path / "site")
    assert {path.name: path.read_bytes() for path in index.parent.glob("*.html")} == first
    with pytest.raises(ParameterError, match="there is no run yet"):
        demo.site([tmp_path / "nothing"], tmp_path / "site")


def test_figures_and_tables_of_a_run_are_exported(finished, monkeypatch):
    written = []
    monkeypatch.setattr(exports.doctor, "browser_path", lambda: "chromium")
    monkeypatch.setattr(exports.pio, "write_images", lambda drawn, files, **how:
                        written.extend(path.name for path in files))
    said = exports.export(finished / "run", finished / "out", kinds=("pdf", ))
    assert {"accepted_simulated.pdf", "survival_simulated.pdf", "speedup_simulated.pdf",
            "timeline_one.pdf"} <= set(written)
    assert said.startswith(f"{len(written)} figures as PDF")
    assert "tabular" in (finished / "out" / "tokens_simulated.tex").read_text()
    with pytest.raises(ParameterError, match="written as gif; choose among png, svg, pdf"):
        exports.export(finished / "run", finished / "out", kinds=("gif", ))


def test_missing_parts_of_a_run_are_named(tmp_path):
    for load, words in ((folder.load_results, "holds no results"),
                        (folder.load_tokens, "no token table")):
        with pytest.raises(ParameterError, match=words):
            load(tmp_path)


def test_the_recording_comes_second_and_has_no_interval():
    found = results()
    one = found["tokens"]["test"]["simulated"]
    sets = {
        "davis_road": {**one, "n_clusters": 1, "rows": {
            name: {key: {**kept, "low": None, "high": None} if isinstance(kept, dict) else kept
                   for key, kept in row.items()} for name, row in one["rows"].items()}},
        "simulated": one,
    }
    found["tokens"] = {"gamma": 5, "test": sets}
    page = body(found)
    lead = page[:page.index("<nav>")]
    assert re.search(r'accepted drafts per round \(at γ = <span[^>]*data-key="tokens/gamma"', lead)
    assert lead.index("held-out simulated drives") < lead.index("a real road")
    captions = re.findall(r"<caption>(.*?)</caption>", page, re.DOTALL)
    said = [one for one in captions if "ntervals draw" in one or "No interval" in one]
    assert "whole sequences" in said[0] and "No interval: one sequence" in said[1]
    assert "(no interval: one sequence)" in lead and "–, " not in lead


def test_a_page_without_results_has_no_sentence():
    page = body({})
    assert "best adapter" not in page and "fastest" not in page and page.count("<section") == 1
