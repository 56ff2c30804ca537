"""A training's folder: damage and exchanged files are seen, a full disk and a kill lose nothing,
and one process writes."""

import builtins
import errno
import os
import random
import shutil

import pytest
import torch
import train_examples as examples

from xsd import files
from xsd.core import CheckpointError, ParameterError, StorageError, TrainingError, XsdError
from xsd.steps import training, verify
from xsd.train import fit, folders, lora, objectives, recipes

LEVEL = "L1"


def train(run, *, epochs=2, seed=0, level=LEVEL, **options):
    config = fit.FitConfig(epochs=epochs, batch_size=16, validation_share=0.2)
    return fit.fit_adapter(level, examples.answers(), folder=run / "adapters" / level,
                           config=config, seed=seed, **options)


def weights(run, level=LEVEL):
    return [(run / "adapters" / level / f"{name}.safetensors").read_bytes()
            for name in ("best", "final")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run = tmp_path_factory.mktemp("trained")
    train(run), train(run, level="L4")
    return run


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


@pytest.mark.parametrize("name", [
    "best.safetensors", "final.safetensors", "checkpoint.pt", "config.json", "history.json",
    "checksums.json", "best.json", "provenance.json"])
def test_a_flipped_bit_is_named_and_never_trained_on(run, name):
    path, draw = run / "adapters" / LEVEL / name, random.Random(name)
    whole = path.read_bytes()
    for _ in range(6):
        bit = draw.randrange(8 * len(whole))
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        found = training.problems(run)
        assert len(found) == 1 and str(path) in found[0] and "; " in found[0], found
        if name == "checkpoint.pt":
            with pytest.raises(CheckpointError, match="is damaged"):
                train(run)
        if name in ("history.json", "checksums.json"):
            with pytest.raises(CheckpointError):
                training.history(run, [LEVEL])
    path.write_bytes(whole)
    assert training.problems(run) == []


def test_missing_left_over_and_exchanged_files_are_named(run):
    place = run / "adapters" / LEVEL
    (place / ".best.safetensors.1a.part").touch()
    (place / "final.safetensors").unlink()
    assert ["left by a killed process" in one or "is missing" in one
            for one in training.problems(run)] == [True, True]
    shutil.copy(run / "adapters" / "L4" / "best.safetensors", place)
    assert any("holds an L4, and its folder is that of L1" in one for one in training.problems(run))
    other = run / "other"
    train(other, seed=1)
    shutil.copy(other / "adapters" / LEVEL / "best.safetensors", place)
    with pytest.raises(CheckpointError, match="another training than its folder: seed 1 where"):
        training.load(run, [LEVEL])
    (place / "best.safetensors").unlink()
    with pytest.raises(CheckpointError, match="is missing, and the weights of epoch"):
        train(run)


def test_a_finished_training_without_its_checksums_gets_them_again(run):
    (run / "adapters" / LEVEL / folders.CHECKSUMS).unlink()
    assert "checksums.json is missing" in training.problems(run)[0]
    before = weights(run)
    train(run)
    assert training.problems(run) == [] and weights(run) == before


@pytest.mark.parametrize("text", ["", "[]", "{", "3", "[" * 100_000, '[{"epoch": 1}]'],
                         ids=lambda text: text[:8])
def test_unreadable_records_are_one_sentence(run, text):
    for name in ("config.json", "history.json"):
        path = run / "adapters" / LEVEL / name
        whole = path.read_bytes()
        path.write_text(text)
        with pytest.raises(CheckpointError, match=f"{name} .*; "):
            training.trainings(run)
        path.write_bytes(whole)


def test_what_makes_it_another_training_is_named(run):
    with pytest.raises(TrainingError, match="epochs is 2 in the folder but 3 now, seed is 0"):
        train(run, epochs=3, seed=1)


# --- one writer


def test_a_second_training_is_refused_and_a_finished_one_found_all_the_same(run, tmp_path):
    before = weights(run)
    with (files.FolderLock(run / "adapters" / LEVEL),
          files.FolderLock(tmp_path / "new" / "adapters" / LEVEL)):
        assert train(run).best_epoch >= 1 and weights(run) == before
        with pytest.raises(StorageError, match=f"is being written by process {os.getpid()}"):
            train(tmp_path / "new")
        with pytest.raises(StorageError, match="is being written by process"):
            folders.set_aside(run / "adapters" / LEVEL, "")
        assert "is being written by" in training.problems(run)[0]
    assert train(tmp_path / "new").history
    assert not list(tmp_path.rglob(files.LOCK))


def test_a_training_set_aside_comes_back_when_it_is_asked_for_again(run):
    place, before = run / "adapters" / LEVEL, weights(run)
    asked = folders.read_config(place)["training"]
    folders.set_aside(place, "another")
    train(run, seed=1)
    assert weights(run) != before
    folders.set_aside(place, asked)
    rows = []
    train(run, progress=rows.append)
    assert weights(run) == before and not rows and training.problems(run) == []
    assert len(list((place / folders.EARLIER).iterdir())) == 1


def test_a_folder_deleted_under_its_training_is_told(tmp_path):
    def delete(row):
        shutil.rmtree(tmp_path / "adapters")

    with pytest.raises(StorageError, match="was deleted or moved while L1 was training in it"):
        train(tmp_path, progress=delete)
    assert not (tmp_path / "adapters").exists()


# --- full disks and kills


class Failing:
    """An open file whose writes count down to an error."""

    def __init__(self, file, left):
        self.file, self.left = file, left

    def write(self, data):
        self.left[0] -= 1
        if self.left[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


def test_a_disk_that_is_full_at_any_write_loses_nothing(trained, tmp_path, monkeypatch):
    real, number = builtins.open, 1
    for number in (1, 2, 3, 4, 5, 6, 7, 9, 20, 60, 90):
        run, left = tmp_path / str(number), [number]

        def opened(path, mode="r", *args, left=left, **options):
            file = real(path, mode, *args, **options)
            ours = str(path).endswith(".part") and mode != "rb"
            return Failing(file, left) if ours else file

        with monkeypatch.context() as patched:
            patched.setattr(builtins, "open", opened)
            patched.setattr("pathlib.Path.write_bytes",
                            lambda self, data: opened(self, "wb").write(data))
            with pytest.raises(StorageError, match="the disk is full; free space"):
                train(run)
        assert not list(run.rglob("*.part"))
        train(run)
        assert weights(run) == weights(trained) and training.problems(run) == []


def test_a_training_killed_at_any_file_operation_ends_in_the_same_bytes(trained, tmp_path):
    number, died = 1, True
    while died:
        run = tmp_path / str(number)
        child = os.fork()
        if child == 0:
            die_at(number)
            train(run)
            os._exit(0)
        died = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        train(run)
        assert weights(run) == weights(trained) and training.problems(run) == []
        assert not list(run.rglob("*.part"))
        number += 7
    assert number > 20


def die_at(number):
    """End this process at its n-th file operation."""
    count = [0]

    def counted(real):
        def operation(*args, **options):
            count[0] += 1
            if count[0] == number:
                os._exit(9)
            return real(*args, **options)

        return operation

    for name in ("replace", "unlink", "fsync"):
        setattr(os, name, counted(getattr(os, name)))


# --- settings


@pytest.mark.parametrize("text", [
    "1.2.3*mse", "", "+", "mse +", "1e999*mse", "0*mse", "-1*mse", "nan*mse", ".*mse", "mse mse",
    "0x1*mse", ".:x", "math:pi", "a" * 100_000, None, 3, ["mse"]], ids=lambda text: str(text)[:9])
def test_an_objective_that_cannot_be_read_is_one_short_sentence(text):
    with pytest.raises(ParameterError) as found:
        objectives.parse(text)
    assert len(str(found.value)) < 700 and "\n" not in str(found.value)


@pytest.mark.parametrize(("config", "options"), [
    (recipes.FitConfig, {"epochs": 2.5}), (recipes.FitConfig, {"epochs": "x"}),
    (recipes.FitConfig, {"learning_rate": float("nan")}), (recipes.FitConfig, {"noise": -1}),
    (recipes.FitConfig, {"dtype": "float16"}), (recipes.FitConfig, {"select_by": "luck"}),
    (recipes.FitConfig, {"clip": 0}), (recipes.FitConfig, {"token_fusion": "yes"}),
    (recipes.FitConfig, {"adapter_options": {"hidden_size": 4}}),
    (recipes.FitConfig, {"profile": 3}),
    (lora.LoraFitConfig, {"rank": 1.5}), (lora.LoraFitConfig, {"dropout": 1}),
    (lora.LoraFitConfig, {"targets": ("mlp",)}), (lora.LoraFitConfig, {"alpha": float("inf")})])
def test_settings_of_a_training_are_checked_by_name(config, options):
    with pytest.raises(ParameterError, match=next(iter(options)).partition("adapter_")[2]
                       or next(iter(options))):
        config(**options)


@pytest.mark.parametrize(("level", "options"), [
    ("L4", {"n_heads": "x"}), ("L4", {"layers": 0}), ("L1", {"bottleneck": -3}),
    ("L1", {"dropout": 2}), ("os:path", {}), ("..", {})])
def test_levels_and_options_that_make_no_adapter_are_one_sentence(level, options, tmp_path):
    config = fit.FitConfig(epochs=1, adapter_options=options)
    with pytest.raises(XsdError, match=r"; |, not |choose one of"):
        fit.fit_adapter(level, examples.answers(), folder=tmp_path, config=config)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_term_of_ones_own_gives_a_number():
    own = {"mine:rows": lambda aligned, *_: aligned.mean(-1)}
    objective = objectives.Objective({"mine:rows": 1.0}, own)
    states, mask = torch.randn(1, 3, 4), torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(TrainingError, match=r"mine:rows gives Tensor \[3\]; it is to give"):
        objective(states, states, torch.zeros(1, 3, dtype=torch.int64), mask)


def test_verify_names_what_is_wrong_with_a_runs_trainings(run):
    assert not any(verify.verify(run).values())
    (run / "adapters" / "L4" / "history.json").write_text("[]")
    (problem,) = verify.verify(run)[run / "adapters"]
    assert str(problem).startswith(f"{run / 'adapters' / 'L4' / 'history.json'} is no history")
