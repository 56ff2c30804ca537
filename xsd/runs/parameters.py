"""Typed parameters, one model a notebook: its ``parameters`` cell holds literals, these models say
what they may be. Defaults are the smoke profile: each notebook runs alone in at most 90 s on two
cores. Descriptions are the help of ``xsd run NB --help-parameters``."""

from typing import Any, Literal

from pydantic import Field

from xsd import files
from xsd.core import ParameterError, as_used
from xsd.runs import typed
from xsd.runs.typed import NotebookParameters, whole

SETS = ["simulated", "davis_road"]
TRAINED = ["L1", "L4", "L5F", "B1"]


class ModelParameters(NotebookParameters):
    """What every notebook that loads a pair takes."""

    pair: typed.PairName = "embedded"
    device: typed.Device = "auto"
    dtype: typed.ModelDtype = "auto"
    quant: typed.Quant = ""

    @property
    def loads(self) -> dict[str, Any]:
        """The keywords of models.loading.load_pair, as used."""
        device, dtype = as_used(self.device, self.dtype)
        return {"dtype": dtype, "device": device, "quant": self.quant or None}


class ExtractParameters(ModelParameters):
    """01: extraction of paired hidden states (Stage 0 and 1)."""

    notebook = "01_extract"
    data: str = Field("simulated", min_length=1,
                      description="what adapters are trained on: simulated, or a dataset folder")
    test_data: typed.TestData = Field(
        SETS, description="held-out: simulated, davis_road (the shipped recording), or folders")
    n_train_sequences: int = whole(6, 0, 100_000,
                                   "drives to train adapters on; 0 extracts held-out sets alone")
    n_test_sequences: int = whole(4, 1, 100_000, "held-out drives; never the same sequences")
    sampling: Literal["spread", "all"] = Field(
        "spread", description="a sequence is asked each question once, or every clip everything")
    questions_per_sequence: typed.Asked = 4
    max_questions: int = whole(10, 1, 1000, "the first so many of a folder's or file's questions")
    questions_file: str = Field("", description="questions for dataset folders: a text file with "
                                "one a line, or JSON; empty: the folder's own")
    duration: str = Field("", description="only clips of this length in dataset folders: 1s, 500ms")
    max_new_tokens: typed.NewTokens = 48
    train_modes: list[typed.Mode] = Field(["teacher_forced"], min_length=1,
                                          description="kinds of pairs for training")
    test_modes: list[typed.Mode] = Field(["teacher_forced", "free_running"], min_length=1,
                                         description="kinds of pairs of the held-out sets")
    contexts: typed.Contexts
    stored: typed.Dtype = Field("fp16", description="how the states are stored")
    batch_size: typed.Batch = 32
    workers: typed.Simulators = 2


class TrainParameters(NotebookParameters):
    """02: training of the adapters."""

    notebook = "02_train"
    levels: list[typed.TrainedLevel] = Field(
        TRAINED, min_length=1, description="levels to train; L6 is LoRA of the drafter itself")
    data: typed.TrainData = "simulated"
    mode: typed.Mode = Field("teacher_forced", description="which pairs to train on")
    validation_data: str = Field("", description="pairs that choose the best epoch, named as data; "
                                 "empty: sequences held back from data")
    validation_share: float = Field(0.1, gt=0, lt=1, description="of the training samples, held "
                                    "back by whole sequences")
    head: str = Field("", description="the verifier's LM head, a file or a folder of shards; "
                      "empty: that of data")
    device: typed.Device = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="numbers of the forward pass (the weights stay float32); auto: "
        "bfloat16 on a GPU, float32 on a CPU")
    recipe: Literal["smoke", "best", "reference", "converged", "tokens", "rollout"] = Field(
        "smoke", description="how to train (docs/adapters.md, section 5); smoke is best in 8 "
        "epochs")
    epochs: typed.Epochs | None = Field(
        None, description="longest training, in epochs; None, here and below: the recipe's")
    batch_size: typed.AStep | None = Field(None, description="answers a step")
    learning_rate: typed.Rate | None = Field(
        None, description="AdamW's peak rate; lower it for wide models")
    patience: typed.Epochs | None = Field(
        None, description="epochs without a better validation before stopping")
    options: dict[str, Any] = Field(
        {}, description="of the adapters (docs/adapters.md, 1), for all or by level: "
        "{'dropout': 0.2, 'L5': {'layers': 2}}")
    objective: str = Field("", description="loss, such as mse + 0.5*cosine + kl; empty: the "
                           "recipe's")
    position_decay: float = Field(
        1.0, gt=0, le=1, description="weight of the loss at place t is this to the power t")
    noise: float = Field(0.0, ge=0, le=10,
                         description="noise on the states read, in standard deviations")
    token_fusion: bool = Field(
        False, description="L5, L5F and B1 also read the token before (docs/adapters.md, 3)")
    draft_vocabulary: int = whole(0, 0, 10_000_000,
                                  "draft with the k most frequent tokens alone; 0: with all")
    lora_learning_rate: typed.Rate | None = Field(
        None, description="L6's peak rate; 1e-4 for 7B models")
    lora_rank: int | None = Field(None, ge=1, le=4096, description="rank of L6's matrices")
    lora_alpha: float | None = Field(None, gt=0, description="L6's scale, times 1 / rank")
    lora_dropout: float | None = Field(None, ge=0, lt=1, description="on L6's matrices' input")
    lora_accumulation: typed.AStep | None = Field(None, description="L6's forward passes a step")
    lora_patience: typed.Epochs | None = Field(None, description="as patience, for L6")
    lora_checkpointing: bool = Field(
        False, description="L6 computes layers again in the backward pass, to save memory")


class AcceptanceParameters(NotebookParameters):
    """What notebooks 03 and 04 both take."""

    levels: typed.Levels = TRAINED
    test_data: typed.TestData = SETS
    mode: typed.HeldOutMode = "teacher_forced"
    head: typed.Head = ""
    device: typed.Device = "auto"
    gamma: typed.Gamma = 5
    max_positions: typed.Positions = 20
    resamples: typed.Resamples = 400
    batch_size: typed.AtATime = 64


class HiddenParameters(AcceptanceParameters):
    """03: acceptance of hidden states."""

    notebook = "03_hidden"
    threshold: typed.Threshold = Field(
        0.9, description="cosine threshold τ of the headline and of the curves")
    thresholds: typed.Thresholds = Field([0.8, 0.85, 0.9, 0.95])


class TokenParameters(AcceptanceParameters):
    """04: acceptance of tokens, floors, reliability."""

    notebook = "04_tokens"
    data: typed.FloorsData = "simulated"
    top_k: typed.TopK = 5
    threshold: typed.TruthThreshold = 0.9
    columns: list[typed.Column] = Field(
        [], description="own columns of the token table, each as module:function")


class LiveParameters(ModelParameters):
    """05: live decoding against the baselines, and the timeline."""

    notebook = "05_live"
    data: typed.TrainData = Field("simulated",
                                  description="training set, whose answers fill the 4-gram table")
    test_data: typed.TestData = SETS
    drafter_device: str = Field("", description="another one for the drafter and the adapters: a "
                                "second GPU, cuda:1; empty: device")
    hide_prefill: typed.Hiding = "yes"
    arms: typed.Arms = Field(["ar", "ar_all_cores", "hf_generate", "hf_prompt_lookup", "drafter",
                              "ngram", "L1", "L4", "L1+L5F", "L1+ngram", "B1"])
    check_arms: typed.CheckArms = Field(["L4"])
    check_in_turns: bool = Field(
        False, description="one of check_arms a sample, in turn, in place of all of them")
    n_checked: int = whole(0, 0, 10**6, "samples of each held-out set for check_arms; 0: all")
    n_samples: int = whole(2, 1, 100_000, "timed samples of each held-out set")
    n_samples_others: int = whole(0, 0, 100_000,
                                  "the same for the sets after the first; 0 means as many")
    gamma: typed.Gamma = 5
    gamma_prefill: typed.GammaPrefill = 10
    max_new_tokens: typed.NewTokens = 48
    repeats: int = whole(2, 1, 100, "how often each sample is timed")
    threads: int = whole(1, 1, 1024, "cores for each model; both run at the same time")
    workers: int = whole(1, 1, 256, "processes that share the check of all held-out samples")
    resamples: typed.Resamples = 400


class CompareParameters(NotebookParameters):
    """06: comparison of runs."""

    notebook = "06_compare"
    runs: list[str] = Field(["runs/smoke"], min_length=1,
                            description="run folders, or a sweep's, to set side by side")
    metric: Literal["accepted_per_round", "token_acceptance", "cosine", "speedup"] = Field(
        "accepted_per_round", description="what the first picture compares")
    baseline: str = Field("", description="run the differences are taken against; empty: the first")
    resamples: typed.Resamples = 400


class ExploreParameters(NotebookParameters):
    """07: interactive explorer."""

    notebook = "07_explore"
    runs: list[str] = Field(["runs/smoke"], min_length=1,
                            description="run folders, or a sweep's, to explore")
    levels: typed.Levels = Field(["L1", "L4"], description="levels chosen at the start")
    threshold: float = Field(0.9, ge=0.5, le=0.99, description="cosine threshold τ at the start")


class RawDsecParameters(NotebookParameters):
    """08: raw DSEC sequences into a dataset folder."""

    notebook = "08_prepare_dsec"
    source: str = Field("simulated", min_length=1, description="folder of raw DSEC sequences; "
                        "simulated writes two small ones first")
    split: Literal["train", "test"] = Field("train", description="split the clips belong to")
    clip_ms: typed.ClipMs = 1000
    hop_ms: typed.HopMs = 500
    video_size: str = Field("", description="resize the pictures to WxH; empty: as they are")
    canvas: Literal["slice", "sensor"] = Field(
        "slice", description="of the event frames; slice is the official one")
    rectify: bool = Field(False, description="move events by the sequence's rectify map")


class RecordingParameters(ModelParameters):
    """09: any recording or video, and traces of models that ran elsewhere."""

    notebook = "09_recordings"
    source: str = Field("davis_road", min_length=1,
                        description="davis_road (shipped), an event file, or a video")
    sensor_size: str = Field("", description="WxH of the sensor, where an event file does not say; "
                             "empty: from its events")
    video: str = Field("", description="a video of the same scene, beside an event file")
    offset_ms: float = Field(0.0, description="from the first event to the video's first picture")
    clip_ms: typed.ClipMs = 1000
    hop_ms: typed.HopMs = 500
    max_clips: int = whole(3, 1, 10_000, "clips that are asked")
    max_seconds: float = Field(10.0, gt=0, le=3600, description="how much of a video is read")
    max_side: int = whole(346, 16, 4096, "longer sides of a video are scaled down to it, in pixels")
    n_questions: int = whole(4, 1, 10,
        "questions every clip is asked, of the ten that the embedded pair knows")
    questions: list[str] = Field([], description="own questions instead of those")
    adapters: list[str] = Field(
        [], description="adapter files or folders to draft with, besides the plain drafter")
    max_new_tokens: typed.NewTokens = 48
    gamma: typed.Gamma = 5
    traces: str = Field("", description="trace file, or stored pairs; empty: the answers given "
                        "here")
    prices: str = Field("", description="what prices the replay: a JSON of seconds, or a run "
                        "folder with notebook 05")
    resamples: typed.Resamples = 400


NOTEBOOKS: dict[str, type[NotebookParameters] | str] = {
    "00_pair": "studies.parameters:PairParameters",
    **{model.notebook: model for model in (
        ExtractParameters, TrainParameters, HiddenParameters, TokenParameters, LiveParameters,
        CompareParameters, ExploreParameters, RawDsecParameters, RecordingParameters)},
    "10_storage": "studies.parameters:StorageParameters",
    "11_pixels": "studies.parameters:PixelParameters",
    "12_study": "studies.parameters:StudyParameters",
    "13_truth": "studies.parameters:TruthParameters",
}
"""File stem of a notebook → its model; those of the studies stand beside the package and are
imported when asked for."""


def model_of(notebook: str) -> type[NotebookParameters]:
    """The model of a notebook by file stem, path, or number (``05``). Raises: ParameterError."""
    stem = str(notebook).replace("\\", "/").rsplit("/", 1)[-1].removesuffix(".ipynb")
    found = [model for name, model in NOTEBOOKS.items() if stem in (name, name.split("_")[0])]
    if not found:
        raise ParameterError(f"there is no notebook {notebook!r}: {typed.hint(stem, NOTEBOOKS)}the "
                             f"notebooks are {', '.join(NOTEBOOKS)}")
    return files.import_object(found[0]) if isinstance(found[0], str) else found[0]
