"""Typed parameters of the notebooks 00 and 10 to 13 (see xsd/runs/parameters.py)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from xsd import files
from xsd.runs import typed
from xsd.runs.parameters import TRAINED, ModelParameters
from xsd.runs.typed import NotebookParameters, whole

DRIVES = "drives to train on, where the run holds no extraction"
TEST_DRIVES = "held-out drives, likewise"
HeldOut = Annotated[str, Field(description="held-out set, where it is another than data's own: a "
                               "dataset folder, or pairs by path")]


class PairParameters(ModelParameters):
    """00: the pair and its world."""

    notebook = "00_pair"
    n_sequences: int = whole(4, 1, 10_000, "held-out drives whose answers are scored")
    train_profile: Literal["none", "smoke", "quick", "full"] = Field(
        "none", description="train the embedded pair anew: none keeps the shipped weights")


class StorageParameters(NotebookParameters):
    """10: acceptance against stored bytes."""

    notebook = "10_storage"
    levels: typed.Levels = Field(["L1", "L5F"], description="levels trained on every dtype")
    dtypes: list[typed.Dtype] = Field(
        ["fp32", "bf16", "fp16", "int8"], min_length=1,
        description="how the states are stored; fp32 is compared with")
    data: typed.TrainData = Field("simulated", description="simulated, a dataset folder, or pairs "
                                  "by path")
    test_data: HeldOut = ""
    n_train_sequences: int = whole(6, 2, 100_000,
                                   "drives to train on, at most those that the run holds")
    n_test_sequences: int = whole(4, 1, 100_000, TEST_DRIVES)
    questions_per_sequence: typed.Asked = 4
    max_new_tokens: typed.NewTokens = 48
    recipe: Literal["reference", "converged", "tokens", "rollout"] = Field(
        "tokens", description="how to train (docs/adapters.md, section 5)")
    epochs: typed.Epochs = 6
    batch_size: typed.AStep = 16
    learning_rate: typed.Rate = 2e-3
    gamma: typed.Gamma = 5
    resamples: typed.Resamples = 400


class PixelParameters(NotebookParameters):
    """11: the pixel-level baseline P0."""

    notebook = "11_pixels"
    data: typed.TrainData = Field("simulated", description="simulated, a dataset folder, or pairs "
                                  "by path")
    test_data: HeldOut = ""
    n_train_sequences: int = whole(6, 2, 100_000, DRIVES)
    n_test_sequences: int = whole(4, 1, 100_000, TEST_DRIVES)
    image_size: int = whole(32, 8, 1024,
                            "pictures are cut square and scaled to it, in pixels; reference: 224")
    n_event_frames: int = whole(5, 1, 64, "pairs of pictures from each clip")
    width: int = whole(64, 1, 65_536, "of P0's middle layers; 512 in the reference")
    epochs: typed.Epochs = Field(30, description="length of the training, in epochs")
    batch_size: typed.AStep = Field(16, description="pairs a step")
    learning_rate: typed.Rate = Field(1e-3, description="AdamW's peak rate")
    thresholds: typed.Thresholds = Field([0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95])
    resamples: typed.Resamples = 400
    workers: typed.Simulators = 2


class StudyParameters(NotebookParameters):
    """12: every level, the reference's training against the best one."""

    notebook = "12_study"
    levels: typed.Levels = Field(["L1", "L5F"], description="levels to train")
    recipes: list[Literal["reference", "documented", "converged", "best"]] = Field(
        ["reference", "best"], min_length=1, description="how to train them (docs/recipes.md)")
    budget_levels: list[typed.Level] = Field(
        [], description="levels also trained as documented and as long as converged")
    n_seeds: int = whole(2, 1, 100, "trainings of each level and recipe, seeds counted from seed")
    max_epochs: int = whole(2, 0, 10_000,
                            "no training is longer; 0 leaves each recipe its own length")
    shares: list[Annotated[float, Field(gt=0, le=1)]] = Field(
        [0.5, 1.0], description="learning curve: shares of the training drives; empty for none")
    curve: list[Literal["ridge", "ridge, both"] | typed.Level] = Field(
        ["ridge", "L1"], description="learning curve: closed forms, and levels (best recipe)")
    data: typed.TrainData = "simulated"
    test_data: str = Field("simulated", min_length=1,
                           description="the held-out set, from notebook 01")
    gamma: typed.Gamma = 5
    threshold: typed.Threshold = 0.9
    resamples: typed.Resamples = 400
    batch_size: typed.AtATime = 64
    workers: int = whole(1, 1, 256, "trainings at the same time, a process of one thread each")
    n_train_sequences: int = whole(6, 2, 100_000, DRIVES)
    n_test_sequences: int = whole(4, 1, 100_000, TEST_DRIVES)
    questions_per_sequence: typed.Asked = Field(4, description="questions a sequence is asked, "
                                                "likewise")
    max_new_tokens: typed.NewTokens = Field(48, description="longest answer, likewise")


class TruthParameters(NotebookParameters):
    """13: where acceptance is lost, what the events are worth, and the full report of a run."""

    notebook = "13_truth"
    levels: typed.Levels = Field(
        TRAINED, description="trained levels to evaluate; B1 is the verifier-self arm")
    waterfall: typed.Level = Field("L4", validate_default=True,
                                   description="the level whose losses are drawn")
    data: typed.FloorsData = "simulated"
    test_data: typed.TestData = Field(["simulated"])
    head: typed.Head = ""
    device: typed.Device = "auto"
    drafter_sees: list[Literal["blank events", "other scene", "text only"]] = Field(
        ["blank events", "other scene", "text only"],
        description="what the drafter is shown in place of the clip's own events")
    gamma: typed.Gamma = 5
    gamma_prefill: typed.GammaPrefill = 10
    top_k: typed.TopK = 5
    threshold: typed.TruthThreshold = 0.9
    thresholds: typed.Thresholds = Field([0.8, 0.85, 0.9, 0.95])
    resamples: typed.Resamples = 400
    batch_size: typed.AtATime = 32
    timing: typed.Timing = "reference"
    pictures: bool = Field(False, description="also write every figure as PNG and SVG, where a "
                           "Chromium is installed")
    page: str = Field("", description="Markdown page whose measured block is written anew; empty: "
                      "none")

    @field_validator("waterfall")
    @classmethod
    def _is_evaluated(cls, value: Any, info: ValidationInfo) -> Any:
        levels = [files.name_of(level) for level in info.data.get("levels", ())]
        if value == "B1" or files.name_of(value) not in levels:
            raise ValueError(f"it must be one of the levels {', '.join(levels)} but B1")
        return files.name_of(value) if files.is_path(value) else value
