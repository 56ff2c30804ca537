"""Training and held-out sets named by path: what the verb extracted, a shard folder, another run,
and chunks of the first scripts go through the steps of notebooks 02, 03 and 04."""

import shutil

import pytest
import torch
from test_studies_truth import run_notebook
from tiny_pair import make_tiny_pair
from torch.nn.utils.rnn import pad_sequence

from studies import parameters as studies
from studies import pixels, storage
from xsd import cli
from xsd.core import ParameterError
from xsd.embedded import drive
from xsd.evaluate import metrics, table
from xsd.runs import folder, parameters
from xsd.shards.store import ShardDataset
from xsd.steps import data as datasets
from xsd.steps import evaluation, extraction, ready, training

LEVELS = ["L1", "B1"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two extractions by verb (train in both modes, test), and the pair they are of."""
    root = tmp_path_factory.mktemp("by_path")
    pair = make_tiny_pair(root / "pair", seed=4)
    for split, modes in (("train", "teacher_forced,free_running"), ("test", "teacher_forced")):
        drive.write_dataset(root / "drives", split=split, n_sequences=2, seed=7, workers=1)
        assert cli.main(["data", "extract", str(root / "drives"), "-o", str(root / split),
                         "--pair", str(pair), "--split", split, "--modes", modes,
                         "--max-questions", "2", "--max-new-tokens", "8", "--stored", "fp32"]) == 0
    return root


@pytest.fixture(scope="module")
def found(place):
    """The steps of 02, 03 and 04 on those paths, in a run of their own."""
    run, train, test = (str(place / name) for name in ("run", "train", "test"))
    training_given = parameters.TrainParameters.checked(
        {"run_dir": run, "data": train, "levels": LEVELS, "epochs": 1})
    ready.ensure(training_given)
    training.run(training_given)
    given = {"run_dir": run, "levels": LEVELS, "test_data": [test], "resamples": 50}
    hidden_given = parameters.HiddenParameters.checked(given)
    ready.ensure(hidden_given, adapters=True)
    adapters = training.load(run, LEVELS)
    pairs = evaluation.held_out_sets(run, hidden_given.test_data, hidden_given.mode)
    states = {name: table.measure(adapters, one, gamma=None) for name, one in pairs.items()}
    figures = {name: metrics.state_figures(one, n_resamples=50) for name, one in states.items()}
    results = evaluation.hidden(figures, adapters, pairs, threshold=0.9)
    evaluation.save(run, "hidden", results, pairs, hidden_given.model_dump(), figures)
    tokens = ready.token_table(parameters.TokenParameters.checked({**given, "data": train}))
    return run, pairs, tokens


def test_what_the_verb_extracted_is_trained_on_and_judged_and_nothing_else_is_extracted(found):
    run, pairs, tokens = found
    assert list(tokens["test"]) == ["test"] and list(pairs) == ["test"]
    assert not (folder.resolve(run) / extraction.PAIR_FILE).exists()
    assert set(folder.load_results(run)) == {"train", "hidden", "tokens"}
    rows = folder.load_tokens(run)
    assert rows["draft_token"].notna().all() and "kind" in rows, "texts are known"
    assert set(tokens["test"]["test"]["rows"]) == {*LEVELS, "drafter_tokens", "position_mode",
                                                   "ngram", "prompt_lookup"}


def test_the_pictures_of_a_sample_come_from_the_folder_that_was_extracted(found):
    _, pairs, _ = found
    sample = pairs["test"].load(3)
    assert sample.key == pairs["test"].keys[3] and len(sample.event_frames) == 5


def test_a_training_sequence_by_path_is_refused_among_the_held_out(found, place):
    run, *_ = found
    with pytest.raises(Exception, match="sequences are in training and in test"):
        evaluation.held_out_sets(run, [str(place / "train")], "teacher_forced")


def test_a_shard_folder_an_extraction_and_a_run_are_one_set(place):
    train, other = place / "train", place / "other"
    shutil.copytree(train, other / "shards" / "train_drives")
    for path in (train, train / "teacher_forced", other, other / "shards" / "train_drives"):
        found = extraction.open_pairs(place / "run", "train", str(path), "teacher_forced")
        assert len(found) == 16 and found.mode == "teacher_forced"
        assert datasets.name_of(str(path)) in ("train", "other", "train_drives")
    shutil.copytree(train, other / "shards" / "train_more")
    with pytest.raises(ParameterError, match=r"2 train sets \(train_drives, train_more\); name"):
        extraction.open_pairs(place / "run", "train", str(other))


def test_a_mode_is_chosen_only_where_it_is_the_only_one(place):
    run = place / "run"
    assert extraction.open_pairs(run, "test", str(place / "test"),
                                 "free_running").mode == "teacher_forced"
    assert extraction.open_pairs(run, "train", str(place / "train")).mode == "teacher_forced"
    assert extraction.open_pairs(run, "train", str(place / "train"),
                                 "free_running").mode == "free_running"


@pytest.fixture(scope="module")
def chunked(place):
    """Free-running pairs as the first scripts kept them, imported: one .pt file to train on, whose
    sequences a dataset folder names, and one held out, whose sequences nobody names."""
    shards = ShardDataset(place / "train" / "free_running")
    torch.save({"lm_head": shards.head("verifier")}, place / "head.pt")
    named = ["--data", str(place / "drives"), "--split", "train"]
    every = list(shards)
    for name, more, some in (("old_train", named, every), ("old_test", [], every[8:])):
        lengths = [min(len(one.ids_by_drafter), len(one.ids_by_verifier)) for one in some]
        columns = {f"{ours}_hidden": pad_sequence(
            [getattr(one, f"hidden_by_{theirs}")[:n] for one, n in zip(some, lengths, strict=True)],
            batch_first=True) for ours, theirs in (("egpt", "drafter"), ("vl", "verifier"))}
        lines = [{"sample_idx": i // 2, "question_idx": i % 2, "question": one.question}
                 for i, one in enumerate(some)]
        torch.save({**columns, "seq_lens": torch.tensor(lengths), "metadata": lines},
                   place / f"{name}.pt")
        assert cli.main(["data", "import-chunks", str(place / f"{name}.pt"), str(place / name),
                         "--head", str(place / "head.pt"), *more]) == 0
    return place / "old_train", place / "old_test"


def test_imported_chunks_are_trained_on_and_judged_with_what_is_known_of_them(chunked, place):
    run, (train, test) = str(place / "imported_run"), map(str, chunked)
    training.run(parameters.TrainParameters.checked(
        {"run_dir": run, "data": train, "levels": LEVELS, "epochs": 1, "recipe": "reference"}))
    given = {"run_dir": run, "levels": LEVELS, "data": train, "test_data": [test], "resamples": 50}
    with pytest.warns(UserWarning, match="was not checked: imported chunks do not name theirs"):
        tokens = ready.token_table(parameters.TokenParameters.checked(given))
    rows = tokens["test"]["old_test"]["rows"]
    assert set(rows) == {*LEVELS, "position_mode", "ngram"}, "no drafter tokens, no prompts"
    assert set(folder.load_tokens(run)["kind"]) == {"unknown"}
    pairs = evaluation.held_out(run, test, "teacher_forced")
    assert pairs.dataset.mode == "free_running" and pairs.texts[7] == "#7"
    source = ShardDataset(place / "train" / "free_running")
    wanted = [one.ids_by_verifier.tolist() for one in source][-len(pairs):]
    assert [own == ids[:len(own)] for own, ids in zip(pairs.answers, wanted, strict=True)]
    with pytest.raises(ParameterError, match="does not say of which clips its pairs are"):
        pairs.load(0)


def test_a_chunk_file_is_imported_into_the_run_once(chunked, place):
    run = place / "imported_run"
    for _ in range(2):
        found = extraction.open_pairs(run, "train", str(place / "old_train.pt"))
        assert found.folder == run / "imported" / "old_train" and not found.has_token_ids


def test_any_adapter_is_judged_on_any_pairs_with_any_head(found, chunked, place, capsys, tmp_path):
    own = [str(place / "run" / "adapters" / level) for level in LEVELS]
    said = ["evaluate", *own, "--pairs", str(place / "test"), "--train", str(place / "train")]
    assert cli.main([*said, "--head", str(place / "head.pt"), "-o", str(tmp_path / "a")]) == 0
    text = capsys.readouterr().out
    assert text.count("[8] Tokens") == 2 and "the best floor" in text and "floor 4-gram" in text
    assert (tmp_path / "a" / "report.txt").read_text() in text
    stems = {path.stem for path in (tmp_path / "a" / "tables").iterdir() if path.suffix != ".jsonl"}
    assert stems == {"metrics", "headline", "floors", "expected_speedup", "wall_clock",
                     "break_even"}
    stored = folder.load_results(tmp_path / "a")["evaluate"]
    tokens = found[2]
    rows = {row["level"]: row for row in stored["headline"] if row["unit"] == "token_acceptance"}
    for level, name in zip(LEVELS, rows, strict=True):  # the head is the pairs' own: as in 04
        here = tokens["test"]["test"]["rows"][level]["token_acceptance"]
        assert rows[name]["acceptance"] == pytest.approx(here["value"])
    assert cli.main([*said, "-o", str(tmp_path / "b"), "--train", str(place / "test")]) == 2
    assert "sequences are in training and in test" in capsys.readouterr().err


def test_what_nobody_knows_of_imported_pairs_is_left_out_with_a_sentence(found, chunked, place,
                                                                         capsys, tmp_path):
    assert found
    said = ["evaluate", str(place / "run" / "adapters" / "L1"), "--pairs", str(chunked[1])]
    with pytest.warns(UserWarning, match="word kinds and the prompt-lookup floor are left out"):
        assert cli.main([*said, "-o", str(tmp_path / "a")]) == 2
    assert "there is no floor to compare with; name the training set" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="was not checked"):
        assert cli.main([*said, "--train", str(chunked[0]), "-o", str(tmp_path / "b")]) == 0
    text = capsys.readouterr().out
    assert "floor position mode" in text and "prompt lookup" not in text


def test_notebook_13_measures_imported_pairs_by_what_is_known_of_them(chunked, place):
    run, (train, test) = str(place / "measured"), map(str, chunked)
    training.run(parameters.TrainParameters.checked(
        {"run_dir": run, "data": train, "levels": LEVELS, "epochs": 1, "recipe": "reference"}))
    with pytest.warns(UserWarning, match="drafter_sees is left out"):
        by_path = [f"{run}/adapters/{level}" for level in LEVELS]
        found = run_notebook(run, levels=by_path, data=train, test_data=[test],
                             waterfall=by_path[0], head=str(place / "head.pt"))
    assert set(found.first["arms"]["arm"]) == {"real events"}
    assert set(found.first["floors"]["floor"]) == {"position mode", "4-gram"}
    names = {"L1 of measured", "B1 of measured"}
    assert set(found.first["two_phase"]["phase2"]) == {*names, "4-gram"}
    gap = found.first["gap"].query("level == 'L1 of measured'")
    assert "verifier-self" in set(gap["name"]), "B1 by path is the arm that reads the verifier"
    assert "floor 4-gram" in found.text or "floor 4-gram" in (
        folder.resolve(run) / "report" / "report.txt").read_text()


# --- the studies of notebooks 10 and 11


def test_the_storage_study_rewrites_pairs_by_path_and_refuses_rounded_ones(place, tmp_path):
    train, test = str(place / "train"), str(place / "test")
    given = {"run_dir": str(tmp_path), "data": train, "test_data": test,
             "levels": ["L1"], "dtypes": ["fp32", "int8"], "epochs": 1, "resamples": 50}
    asked = studies.StorageParameters.checked(given)
    ready.ensure(asked)
    results = storage.run(asked)
    assert results["pairs"] == {
        split: len(extraction.open_pairs(tmp_path, split, str(place / split), "teacher_forced"))
        for split in ("train", "test")}
    assert not (tmp_path / extraction.PAIR_FILE).exists(), "nothing was extracted"
    rounded = str(tmp_path / "storage" / "int8" / "train")
    with pytest.raises(ParameterError, match="holds states that are rounded to int8 already; give"):
        storage.run(studies.StorageParameters.checked({**given, "data": rounded}))


def test_pixels_are_those_of_the_clips_behind_pairs_by_path(place, tmp_path):
    given = studies.PixelParameters.checked({
        "run_dir": str(tmp_path), "data": str(place / "train"), "test_data": str(place / "test"),
        "image_size": 8, "n_event_frames": 2})
    for split in ("train", "test"):
        found = pixels.read_pairs(given, split)
        clips = extraction.clips_of(tmp_path, split, str(place / split), extraction.open_pairs(
            tmp_path, split, str(place / split), "teacher_forced"))
        assert set(found.sequence) == {clip.sequence for clip in clips}
        assert len(found.sequence) == 2 * len(clips)
