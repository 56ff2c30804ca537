"""Typed parameters, one model a notebook: the ``parameters`` cell holds plain literals, these
models say what they may be.

Defaults are the smoke profile: each notebook runs alone in at most 90 s on two cores. Field
descriptions are the help of ``xsd run
NB --help-parameters``.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator, ValidationError

from xsd import files
from xsd.core import ParameterError

LEVELS = ("L1", "L2", "L3", "L4", "L5", "L5F", "B1")
Mode = Literal["free_running", "teacher_forced"]


def _level(value: Any, *more: str) -> Any:
    """A level of ours by name, "module:Class", or a class or module with reads, shift and
    forward."""
    if value in (*LEVELS, *more) or (isinstance(value, str) and ":" in value) or all(
            hasattr(value, name) for name in ("reads", "shift", "forward")):
        return value
    raise ValueError(f"input should be one of {', '.join((*LEVELS, *more))}, or a class of your "
                     "own as module:Class (docs/extending.md)")


Level = Annotated[Any, PlainValidator(_level), PlainSerializer(files.name_of)]
TrainedLevel = Annotated[Any, PlainValidator(lambda value: _level(value, "L6")),
                         PlainSerializer(files.name_of)]


class NotebookParameters(BaseModel):
    """What every notebook takes. Frozen, strict types (an int may stand for a float), unknown names
    refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    notebook: ClassVar[str] = ""

    run_dir: str = Field(
        "runs/smoke", min_length=1,
        description="folder shared by the notebooks of one run, relative to the checkout or absolute"
    )
    seed: int = Field(0, ge=0, lt=2**31, description="seed of everything that draws")

    @classmethod
    def from_namespace(cls, namespace: Mapping[str, Any]) -> Self:
        """The parameters among a notebook's globals. Raises: ParameterError as :func:`validate`."""
        return cls.checked({name: namespace[name] for name in cls.model_fields if name in namespace})

    @classmethod
    def checked(cls, values: Mapping[str, Any]) -> Self:
        """A model of ``values``.

        Raises: ParameterError naming the notebook, the parameter, what was given and what is
        expected, with a suggestion for a
        misspelt name.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise ParameterError(_sentence(cls, error)) from None


def _sentence(model: type[NotebookParameters], error: ValidationError) -> str:
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"]) or "(all)"
    known = list(model.model_fields)
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return (f"notebook {model.notebook} has no parameter {name!r}: {hint}it takes "
                f"{', '.join(known)}")
    field = model.model_fields.get(str(first["loc"][0])) if first["loc"] else None
    about = f" ({field.description})" if field and field.description else ""
    why = first["msg"].removeprefix("Value error, ")
    return (f"parameter {name!r} of notebook {model.notebook} cannot be {first['input']!r}: "
            f"{why[0].lower()}{why[1:]}{about}")


class PairParameters(NotebookParameters):
    """00: the pair and its world."""

    notebook = "00_pair"
    pair: str = Field("embedded", min_length=1,
                      description="the shipped pair, or a folder with drafter/ and verifier/")
    n_sequences: int = Field(4, ge=1, le=10_000,
                             description="held-out drives whose answers are scored")
    train_profile: Literal["none", "smoke", "quick", "full"] = Field(
        "none", description="train the embedded pair anew: none keeps the shipped weights")
    device: str = Field("cpu", min_length=1, description="where to train: cpu, cuda, …")


class ExtractParameters(NotebookParameters):
    """01: extraction of paired hidden states (Stage 0 and 1)."""

    notebook = "01_extract"
    pair: str = Field("embedded", min_length=1,
                      description="the shipped pair, or a folder with drafter/ and verifier/")
    data: str = Field("simulated", min_length=1,
                      description="what adapters are trained on: simulated, or a dataset folder")
    test_data: list[str] = Field(
        ["simulated", "davis_road"], min_length=1,
        description="held-out sets: simulated, davis_road (the shipped recording), or folders")
    n_train_sequences: int = Field(
        6, ge=0, le=100_000,
        description="drives to train adapters on; 0 extracts held-out sets alone")
    n_test_sequences: int = Field(4, ge=1, le=100_000,
                                  description="held-out drives; never the same sequences")
    questions_per_sequence: int = Field(
        4, ge=1, le=50,
        description="questions a sequence is asked, each on one of its clips in turn")
    max_new_tokens: int = Field(48, ge=1, le=4096, description="longest answer, in tokens")
    train_modes: list[Mode] = Field(["teacher_forced"], min_length=1,
                                    description="kinds of pairs for training")
    test_modes: list[Mode] = Field(["teacher_forced", "free_running"], min_length=1,
                                   description="kinds of pairs of the held-out sets")
    dtype: Literal["fp32", "fp16", "bf16", "int8"] = Field("fp16",
                                                           description="how the states are stored")
    batch_size: int = Field(32, ge=1, le=1024, description="samples answered at a time")
    workers: int = Field(2, ge=1, le=256, description="processes that simulate drives")


class TrainParameters(NotebookParameters):
    """02: training of the adapters."""

    notebook = "02_train"
    levels: list[TrainedLevel] = Field(
        ["L1", "L4", "L5F", "B1"], min_length=1,
        description="levels to train; L6 is LoRA of the drafter itself")
    data: str = Field("simulated", min_length=1,
                      description="the training set that notebook 01 extracted")
    mode: Mode = Field("teacher_forced", description="which pairs to train on")
    profile: Literal["reference", "converged", "tokens", "rollout",
                     "best"] = Field("best", description="recipe (docs/adapters.md, 5)")
    epochs: int = Field(8, ge=1, le=10_000, description="longest training, in epochs")
    batch_size: int = Field(16, ge=1, le=65_536, description="answers a step")
    learning_rate: float = Field(2e-3, gt=0, lt=1,
                                 description="AdamW's peak rate; lower it for wide models")
    objective: str = Field(
        "", description=
        "terms of the loss, such as mse + 0.5*cosine + kl; empty leaves them to the recipe")
    position_decay: float = Field(
        1.0, gt=0, le=1,
        description="weight of the loss at place t of an answer is this to the power t")
    noise: float = Field(0.0, ge=0, le=10,
                         description="noise on the states that are read, in standard deviations")
    token_fusion: bool = Field(
        False,
        description="L5, L5F and B1 also read the token before (docs/adapters.md, section 3)")
    draft_vocabulary: int = Field(
        0, ge=0, le=10_000_000,
        description="train and draft with so many most frequent tokens; 0 means all")
    lora_learning_rate: float = Field(1e-3, gt=0, lt=1,
                                      description="L6's peak rate; 1e-4 for 7B models")


class HiddenParameters(NotebookParameters):
    """03: acceptance of hidden states."""

    notebook = "03_hidden"
    levels: list[Level] = Field(["L1", "L4", "L5F", "B1"], min_length=1,
                                description="trained levels to evaluate")
    test_data: list[str] = Field(["simulated", "davis_road"], min_length=1,
                                 description="held-out sets that notebook 01 extracted")
    mode: Mode = Field("teacher_forced", description="which held-out pairs to evaluate on")
    threshold: float = Field(0.9, gt=-1, lt=1,
                             description="cosine threshold τ of the headline and of the curves")
    thresholds: list[float] = Field([0.8, 0.85, 0.9, 0.95], min_length=1,
                                    description="all cosine thresholds that are counted")
    gamma: int = Field(5, ge=1, le=64, description="draft tokens a round")
    max_positions: int = Field(20, ge=1, le=4096,
                               description="positions shown by the per-position curve")
    resamples: int = Field(400, ge=50, le=100_000,
                           description="bootstrap resamples, drawn by sequence")
    batch_size: int = Field(64, ge=1, le=65_536, description="answers at a time")


class TokenParameters(NotebookParameters):
    """04: acceptance of tokens, floors, reliability."""

    notebook = "04_tokens"
    levels: list[Level] = Field(["L1", "L4", "L5F", "B1"], min_length=1,
                                description="trained levels to evaluate")
    data: str = Field("simulated", min_length=1,
                      description="the training set, whose answers make the floors")
    test_data: list[str] = Field(["simulated", "davis_road"], min_length=1,
                                 description="held-out sets that notebook 01 extracted")
    mode: Mode = Field("teacher_forced", description="which held-out pairs to evaluate on")
    gamma: int = Field(5, ge=1, le=64, description="draft tokens a round")
    top_k: int = Field(5, ge=1, le=254,
                       description="how many of the head's best tokens count as top-k")
    threshold: float = Field(0.9, gt=-1, lt=1,
                             description="cosine threshold τ compared with the token truth")
    max_positions: int = Field(20, ge=1, le=4096,
                               description="positions shown by the per-position curve")
    resamples: int = Field(400, ge=50, le=100_000,
                           description="bootstrap resamples, drawn by sequence")
    batch_size: int = Field(64, ge=1, le=65_536, description="answers at a time")


class LiveParameters(NotebookParameters):
    """05: live decoding against the baselines, and the timeline."""

    notebook = "05_live"
    pair: str = Field("embedded", min_length=1,
                      description="the shipped pair, or a folder with drafter/ and verifier/")
    data: str = Field("simulated", min_length=1,
                      description="the training set, whose answers fill the 4-gram table")
    test_data: list[str] = Field(["simulated", "davis_road"], min_length=1,
                                 description="held-out sets that notebook 01 extracted")
    arms: list[str] = Field(
        [
            "ar", "ar_all_cores", "hf_generate", "hf_prompt_lookup", "drafter", "ngram", "L1", "L4",
            "L1+L5F", "L1+ngram", "B1"
        ], min_length=1, description=
        "arms of one interleaved run, named as in docs/decoding.md; ar is the own loop, L1+L5F has "
        "L1 behind the prefill",
    )
    check_arms: list[str] = Field(
        ["L4"], min_length=1, description="arms whose ids are compared on every held-out sample")
    check_in_turns: bool = Field(
        False, description=
        "one of check_arms a held-out sample, in turn, in place of all of them: less time")
    n_samples: int = Field(2, ge=1, le=100_000,
                           description="samples of each held-out set that are put on the clock")
    n_samples_others: int = Field(
        0, ge=0, le=100_000, description="the same for the sets after the first; 0 means as many")
    gamma: int = Field(5, ge=1, le=64, description="draft tokens a round")
    gamma_prefill: int = Field(
        10, ge=1, le=4096, description="at most so many draft tokens behind the verifier's prefill")
    max_new_tokens: int = Field(48, ge=1, le=4096, description="longest answer, in tokens")
    repeats: int = Field(1, ge=1, le=100, description="how often each sample is timed")
    threads: int = Field(
        1, ge=1, le=1024,
        description="cores for each model; drafter and verifier run at the same time")
    workers: int = Field(1, ge=1, le=256,
                         description="processes that share the check of all held-out samples")
    resamples: int = Field(400, ge=50, le=100_000,
                           description="bootstrap resamples, drawn by sequence")


class CompareParameters(NotebookParameters):
    """06: comparison of runs."""

    notebook = "06_compare"
    runs: list[str] = Field(["runs/smoke"], min_length=1,
                            description="run folders to set side by side")
    metric: Literal["accepted_per_round", "token_acceptance", "cosine",
                    "speedup"] = Field("accepted_per_round",
                                       description="what the first picture compares")
    baseline: str = Field(
        "", description="run the differences are taken against; empty means the first")
    resamples: int = Field(400, ge=50, le=100_000,
                           description="bootstrap resamples, drawn by sequence")


class ExploreParameters(NotebookParameters):
    """07: interactive explorer."""

    notebook = "07_explore"
    runs: list[str] = Field(["runs/smoke"], min_length=1, description="run folders to explore")
    levels: list[Level] = Field(["L1", "L4"], min_length=1,
                                description="levels chosen at the start")
    threshold: float = Field(0.9, ge=0.5, le=0.99, description="cosine threshold τ at the start")


class RawDsecParameters(NotebookParameters):
    """08: raw DSEC sequences into a dataset folder."""

    notebook = "08_prepare_dsec"
    source: str = Field(
        "simulated", min_length=1,
        description="folder of raw DSEC sequences; simulated writes two small ones first")
    split: Literal["train", "test"] = Field("train", description="split the clips belong to")
    clip_ms: int = Field(1000, ge=1, le=3_600_000, description="length of a clip")
    hop_ms: int = Field(500, ge=1, le=3_600_000,
                        description="from one clip's start to the next one's")
    video_size: str = Field("",
                            description="resize the pictures to WxH; empty leaves them as they are")
    canvas: Literal["slice",
                    "sensor"] = Field("slice",
                                      description="of the event frames; slice is the official one")
    rectify: bool = Field(False, description="move events by the sequence's rectify map")


class RecordingParameters(NotebookParameters):
    """09: any recording or video, and traces of models that ran elsewhere."""

    notebook = "09_recordings"
    pair: str = Field("embedded", min_length=1,
                      description="the shipped pair, or a folder with drafter/ and verifier/")
    source: str = Field("davis_road", min_length=1,
                        description="davis_road (shipped), an event file, or a video")
    clip_ms: int = Field(1000, ge=1, le=3_600_000, description="length of a clip")
    hop_ms: int = Field(500, ge=1, le=3_600_000,
                        description="from one clip's start to the next one's")
    max_clips: int = Field(3, ge=1, le=10_000, description="clips that are asked")
    max_seconds: float = Field(10.0, gt=0, le=3600, description="how much of a video is read")
    max_side: int = Field(346, ge=16, le=4096,
                          description="longer sides of a video are scaled down to it, in pixels")
    n_questions: int = Field(
        4, ge=1, le=10,
        description="questions every clip is asked, of the ten that the embedded pair knows")
    questions: list[str] = Field([], description="own questions instead of those")
    adapters: list[str] = Field(
        [], description="adapter files or folders to draft with, besides the unadapted drafter")
    max_new_tokens: int = Field(48, ge=1, le=4096, description="longest answer, in tokens")
    gamma: int = Field(5, ge=1, le=64, description="draft tokens a round")
    traces: str = Field(
        "", description=
        "trace file of models that ran elsewhere; empty takes this notebook's own answers")
    resamples: int = Field(400, ge=50, le=100_000, description="bootstrap resamples, drawn by clip")


class StudyParameters(NotebookParameters):
    """12: every level, the reference's training against the best one."""

    notebook = "12_study"
    levels: list[Level] = Field(["L1", "L5F"], min_length=1, description="levels to train")
    recipes: list[Literal["reference", "documented", "converged",
                          "best"]] = Field(["reference", "best"], min_length=1,
                                           description="how to train them (docs/recipes.md)")
    budget_levels: list[Level] = Field(
        [], description="levels that are also trained as documented and as long as converged")
    n_seeds: int = Field(2, ge=1, le=100,
                         description="trainings of each level and recipe, seeds counted from seed")
    max_epochs: int = Field(
        2, ge=0, le=10_000,
        description="no training is longer; 0 leaves each recipe its own length")
    shares: list[Annotated[float, Field(gt=0, le=1)]] = Field(
        [0.5, 1.0], description="learning curve: shares of the training drives; empty for none")
    curve: list[Literal["ridge", "ridge, both", "L1", "L2", "L3", "L4", "L5", "L5F", "B1"]] = Field(
        ["ridge", "L1"],
        description="learning curve: closed forms, and levels with the best recipe")
    data: str = Field("simulated", min_length=1,
                      description="the training set that notebook 01 extracted")
    test_data: str = Field("simulated", min_length=1,
                           description="the held-out set that notebook 01 extracted")
    gamma: int = Field(5, ge=1, le=64, description="draft tokens a round")
    threshold: float = Field(0.9, gt=-1, lt=1, description="cosine threshold τ")
    resamples: int = Field(400, ge=50, le=100_000,
                           description="bootstrap resamples, drawn by sequence")
    batch_size: int = Field(64, ge=1, le=65_536, description="held-out answers at a time")
    workers: int = Field(1, ge=1, le=256,
                         description="trainings at the same time, a process of one thread each")
    n_train_sequences: int = Field(
        6, ge=2, le=100_000,
        description="drives to train on, when the run folder holds no extraction")
    n_test_sequences: int = Field(4, ge=1, le=100_000, description="held-out drives, likewise")
    questions_per_sequence: int = Field(4, ge=1, le=50,
                                        description="questions a sequence is asked, likewise")
    max_new_tokens: int = Field(48, ge=1, le=4096, description="longest answer in tokens, likewise")


class StorageParameters(NotebookParameters):
    """10: acceptance against stored bytes."""

    notebook = "10_storage"
    levels: list[Level] = Field(["L1", "L5F"], min_length=1,
                                description="levels trained on every dtype")
    dtypes: list[Literal["fp32", "bf16", "fp16", "int8"]] = Field(
        ["fp32", "bf16", "fp16", "int8"], min_length=1,
        description="how the states are stored; fp32 is compared with")
    data: str = Field("simulated", min_length=1,
                      description="simulated, or a dataset folder with both splits")
    n_train_sequences: int = Field(
        6, ge=2, le=100_000, description="drives to train on, at most those that the run holds")
    n_test_sequences: int = Field(4, ge=1, le=100_000, description="held-out drives, likewise")
    questions_per_sequence: int = Field(
        4, ge=1, le=50,
        description="questions a sequence is asked, each on one of its clips in turn")
    max_new_tokens: int = Field(48, ge=1, le=4096, description="longest answer, in tokens")
    profile: Literal["reference", "converged", "tokens",
                     "rollout"] = Field("tokens",
                                        description="recipe (docs/adapters.md, section 5)")
    epochs: int = Field(6, ge=1, le=10_000, description="longest training, in epochs")
    batch_size: int = Field(16, ge=1, le=65_536, description="answers a step")
    learning_rate: float = Field(2e-3, gt=0, lt=1,
                                 description="AdamW's peak rate; lower it for wide models")
    gamma: int = Field(5, ge=1, le=64, description="draft tokens a round")
    resamples: int = Field(400, ge=50, le=100_000,
                           description="bootstrap resamples, drawn by sequence")


class PixelParameters(NotebookParameters):
    """11: the pixel-level baseline P0."""

    notebook = "11_pixels"
    data: str = Field("simulated", min_length=1,
                      description="simulated, or a dataset folder with both splits")
    n_train_sequences: int = Field(6, ge=2, le=100_000,
                                   description="drives to train on, where the run holds none yet")
    n_test_sequences: int = Field(4, ge=1, le=100_000, description="held-out drives, likewise")
    image_size: int = Field(
        32, ge=8, le=1024,
        description="pictures are cut square and scaled to it, in pixels; 224 in the reference")
    n_event_frames: int = Field(5, ge=1, le=64, description="pairs of pictures from each clip")
    width: int = Field(64, ge=1, le=65_536,
                       description="of P0's middle layers; 512 in the reference")
    epochs: int = Field(30, ge=1, le=10_000, description="length of the training, in epochs")
    batch_size: int = Field(16, ge=1, le=65_536, description="pairs a step")
    learning_rate: float = Field(1e-3, gt=0, lt=1, description="AdamW's peak rate")
    thresholds: list[float] = Field([0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95], min_length=1,
                                    description="cosine thresholds that are counted")
    resamples: int = Field(400, ge=50, le=100_000,
                           description="bootstrap resamples, drawn by sequence")
    workers: int = Field(2, ge=1, le=256, description="processes that simulate drives")


class TruthParameters(NotebookParameters):
    """13: where acceptance is lost, what the events are worth, and the full report of a run."""

    notebook = "13_truth"
    levels: list[Level] = Field(
        ["L1", "L4", "L5F", "B1"], min_length=1,
        description="trained levels to evaluate; B1 is the verifier-self arm")
    waterfall: Level = Field("L4", description="the level whose losses are drawn")
    data: str = Field("simulated", min_length=1,
                      description="the training set, whose answers make the floors")
    test_data: list[str] = Field(["simulated"], min_length=1,
                                 description="held-out sets that notebook 01 extracted")
    drafter_sees: list[Literal["blank events", "other scene", "text only"]] = Field(
        ["blank events", "other scene", "text only"],
        description="what the drafter is shown in place of the clip's own events")
    gamma: int = Field(5, ge=1, le=64, description="draft tokens a round")
    gamma_prefill: int = Field(
        10, ge=1, le=4096,
        description="draft tokens behind the verifier's prefill, in the two-phase table")
    top_k: int = Field(5, ge=1, le=254,
                       description="how many of the head's best tokens count as top-k")
    threshold: float = Field(0.9, gt=-1, lt=1,
                             description="cosine threshold τ compared with the token truth")
    thresholds: list[float] = Field([0.8, 0.85, 0.9, 0.95], min_length=1,
                                    description="all cosine thresholds that are counted")
    resamples: int = Field(400, ge=50, le=100_000,
                           description="bootstrap resamples, drawn by sequence")
    batch_size: int = Field(32, ge=1, le=65_536, description="answers at a time")
    pictures: bool = Field(
        False, description=
        "also write every figure as PNG and SVG, where a Chromium is installed (a minute)")
    page: str = Field(
        "", description=
        "Markdown page whose measured block is written anew (docs/teacher_forcing.md); empty for "
        "none"
    )


NOTEBOOKS: dict[str, type[NotebookParameters]] = {
    model.notebook: model
    for model in (PairParameters, ExtractParameters, TrainParameters, HiddenParameters,
                  TokenParameters, LiveParameters, CompareParameters, ExploreParameters,
                  RawDsecParameters, RecordingParameters, StorageParameters, PixelParameters,
                  StudyParameters, TruthParameters,
                  )
}
"""File stem of a notebook → its model."""


def model_of(notebook: str) -> type[NotebookParameters]:
    """The model of a notebook by file stem, path, or number (``05``).

    Raises: ParameterError naming the notebooks there are.
    """
    stem = str(notebook).replace("\\", "/").rsplit("/", 1)[-1].removesuffix(".ipynb")
    found = [name for name in NOTEBOOKS if stem in (name, name.split("_")[0])]
    if not found:
        close = difflib.get_close_matches(stem, NOTEBOOKS, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ParameterError(
            f"there is no notebook {notebook!r}: {hint}the notebooks are {', '.join(NOTEBOOKS)}")
    return NOTEBOOKS[found[0]]


def read_values(pairs: list[str], model: type[NotebookParameters]) -> dict[str, Any]:
    """``["levels=L1,L4", "seed=3"]`` as typed values: text for text fields, otherwise YAML; a comma
    makes a list where a list is expected.

    Raises: ParameterError when a pair has no ``=`` or its value is not readable.
    """
    import yaml

    values: dict[str, Any] = {}
    for pair in pairs:
        name, sign, text = pair.partition("=")
        if not sign or not name:
            raise ParameterError(f"a parameter is written name=value, not {pair!r}")
        field = model.model_fields.get(name)
        annotation = str(field.annotation) if field else ""
        if annotation.startswith("list") and not text.lstrip().startswith("["):
            text = f"[{text}]"
        if field is not None and field.annotation is str:
            values[name] = text
            continue
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ParameterError(
                f"the value of {name!r} cannot be read: {text!r}; lists are written a,b or [a, b]"
            ) from None
        if isinstance(
                value,
                str) and "e" in value.lower() and field is not None and field.annotation is float:
            try:
                value = float(value)  # YAML reads 1e-3 as text
            except ValueError:
                raise ParameterError(
                    f"the value of {name!r} must be a number, not {text!r}") from None
        values[name] = value
    return values


def read_grid(axes: list[str], model: type[NotebookParameters]) -> dict[str, list[Any]]:
    """``["seed=0,1", "level=L1,L4"]`` as typed axes of a grid.

    ``level`` is an axis over single levels: each point gets ``levels`` with that one.
    Raises: ParameterError as :func:`read_values`.
    """
    grid = {}
    for axis in axes:
        name, sign, text = axis.partition("=")
        if not sign:
            raise ParameterError(f"a grid axis is written name=value,value, not {axis!r}")
        name = "levels" if name == "level" and "levels" in model.model_fields else name
        grid[name] = [read_values([f"{name}={one}"], model)[name] for one in text.split(",") if one]
    return grid
