"""Checkpoint folders to decoder handles: the drafter (EventGPT), the verifier (a video model of
transformers), and the pair.

Everything is checked before the weights are read: files whole, model type, tensor names and shapes;
after it: NaN. Nothing is
downloaded: a checkpoint is a folder on this machine.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer
from transformers.utils import logging as transformers_logging

from xsd.core import ROOT, CheckpointError, PairError
from xsd.models import keymap, tower
from xsd.models.eventgpt import EventGPTConfig, EventGPTForCausalLM
from xsd.models.handle import ModelHandle, Role
from xsd.models.pixels import PixelSpec, read_pixel_spec
from xsd.models.prompts import VIDEO_TOKEN
from xsd.models.quantization import dtype_of, quantization_config

EMBEDDED = ROOT / "data" / "pair"
"""The pair that ships with the repository: drafter/, verifier/, pair.json."""


@dataclass(frozen=True)
class Pair:
    """Two models that work together. n_event_frames and event_canvas ("slice" | "sensor"): how the
    drafter's frames are to be made.

    draft_vocab_size: ids below it mean the same to both and may be drafted.
    """

    name: str
    drafter: ModelHandle
    verifier: ModelHandle
    n_event_frames: int = 5
    event_canvas: Literal["slice", "sensor"] = "slice"
    draft_vocab_size: int = 0
    folder: Path | None = None


def load_pair(profile: str | Path = "embedded", *, dtype: str | torch.dtype = "float32",
              device: str = "cpu", quant: str | None = None) -> Pair:
    """``"embedded"`` or a folder with drafter/ and verifier/ (pair.json may name other folders:
    ``{"drafter": ..., "verifier": ...}``).

    Raises: CheckpointError for a folder that is no pair; PairError if the models do not share a
    vocabulary.
    """
    folder = EMBEDDED if str(profile) == "embedded" else Path(profile)
    if not folder.is_dir():
        hint = (
            "the embedded pair ships with the repository; clone it again or train it with notebook "
            "00"
            if folder == EMBEDDED else "give 'embedded' or a folder with drafter/ and verifier/")
        raise CheckpointError(f"no pair at {folder}: {hint}")
    info = keymap.read_json(folder / "pair.json") if (folder / "pair.json").is_file() else {}
    options = {"dtype": dtype, "device": device, "quant": quant}
    drafter = load_drafter(folder / info.get("drafter", "drafter"),
                           vision_tower=info.get("vision_tower"), **options)
    verifier = load_verifier(folder / info.get("verifier", "verifier"), **options)
    shared = shared_vocabulary(drafter, verifier)
    name = info.get("name") or ("embedded" if folder == EMBEDDED else folder.name)
    drafter.draft_vocab_size = verifier.draft_vocab_size = shared
    return Pair(name, drafter, verifier, int(info.get("n_event_frames", 5)),
                info.get("event_canvas", "slice"), shared, folder)


def shared_vocabulary(drafter: ModelHandle, verifier: ModelHandle) -> int:
    """Number of leading ids that are the same text token in both models. Raises: PairError, with
    the first difference."""
    a, b = drafter.tokenizer, verifier.tokenizer
    shared = min(drafter.draft_vocab_size, verifier.draft_vocab_size)
    sizes = f"{drafter.draft_vocab_size} text tokens against {verifier.draft_vocab_size}"
    ids = list(range(shared))
    for token_id, one, other in zip(ids, a.convert_ids_to_tokens(ids), b.convert_ids_to_tokens(ids),
                                    strict=True):
        if one != other:
            raise PairError(
                f"the tokenizers disagree: id {token_id} is {one!r} to the drafter and {other!r} "
                f"to the verifier ({sizes}); "
                "choose two models built on one vocabulary, as EventGPT and Video-LLaVA are")
    if drafter.draft_vocab_size != verifier.draft_vocab_size:
        raise PairError(
            f"the tokenizers disagree in size: {sizes}; choose two models built on one vocabulary")
    if drafter.eos_token_ids != verifier.eos_token_ids:
        raise PairError(
            f"the end-of-answer ids differ: {sorted(drafter.eos_token_ids)} for the drafter, "
            f"{sorted(verifier.eos_token_ids)} "
            "for the verifier; correct eos_token_id in the generation_config.json that is wrong")
    return shared


# --- the drafter
# ------------------------------------------------------------------------------------------------


def load_drafter(path: str | Path, quant: str | None = None, dtype: str | torch.dtype = "float32",
                 device: str = "cpu", vision_tower: str | Path | None = None,
                 ) -> ModelHandle:
    """An EventGPT checkpoint folder, official or ours.

    quant: None, "4bit" or "8bit". vision_tower: a CLIP folder, used where the checkpoint holds no
    tower tensors or does not
    describe its tower. Raises: CheckpointError for anything missing, truncated, of the wrong type
    or shape, or not finite.
    """
    folder = _folder(path)
    raw = keymap.read_json(folder / "config.json")
    if raw.get("model_type") != EventGPTConfig.model_type:
        raise CheckpointError(
            f"{folder} is of model type {raw.get('model_type')!r} but the drafter must be "
            f"{EventGPTConfig.model_type!r}; "
            "give an EventGPT checkpoint")
    shapes = keymap.tensor_shapes(folder)
    has_tower = any(name.startswith(keymap.TOWER) for name in shapes)
    clip_folder = tower.find(folder, raw, vision_tower, needed=not has_tower)
    with _quiet():
        config = EventGPTConfig.from_pretrained(folder)
    if config.vision_config is None:
        config.vision_config = tower.describe(folder, clip_folder, shapes)
    with torch.device("meta"):
        expected = keymap.expected_shapes(EventGPTForCausalLM(config))
    report = keymap.compare(
        shapes, expected
        if has_tower else {k: v for k, v in expected.items() if not k.startswith(keymap.TOWER)})
    if report.missing or report.mismatched or report.unexpected:
        raise CheckpointError(
            f"{folder} does not fit EventGPT's tensors: {report}; check config.json, or give the "
            "matching CLIP folder as vision_tower"
        )
    dtype = dtype_of(dtype)
    with _quiet():
        model = _from_pretrained(EventGPTForCausalLM, folder, dtype, device, quant,
                                 config=config)[0]
    if not has_tower:
        tower.load_weights(model, clip_folder)
    _check_finite(model, folder)
    tokenizer = _tokenizer(folder)
    if config.mm_use_im_start_end:
        _check_event_marks(tokenizer, folder, config.vocab_size)
    pixels = read_pixel_spec(folder, clip_folder, image_size=config.tower_config().image_size)
    return _handle(model, tokenizer, "drafter", pixels, folder, quant)


def _check_event_marks(tokenizer: Any, folder: Path, n_rows: int) -> None:
    marks = tokenizer.convert_tokens_to_ids(["<ev_start>", "<ev_end>"])
    unknown = [
        mark for mark in marks if mark is None or mark == tokenizer.unk_token_id or mark >= n_rows
    ]
    if unknown:
        raise CheckpointError(
            f"{folder} says mm_use_im_start_end but its tokenizer and embedding table have no "
            "<ev_start> and <ev_end>; "
            "use the tokenizer saved with the fine-tuned weights")


# --- the verifier
# ------------------------------------------------------------------------------------------------


def load_verifier(path: str | Path, quant: str | None = None, dtype: str | torch.dtype = "float32",
                  device: str = "cpu") -> ModelHandle:
    """A video model that AutoModelForImageTextToText reads: Video-LLaVA, LLaVA-NeXT-Video.

    An absent image tower (videos never use it) is filled from the video tower. Raises:
    CheckpointError as load_drafter.
    """
    folder = _folder(path)
    raw = keymap.read_json(folder / "config.json")
    if raw.get("model_type") == EventGPTConfig.model_type:
        raise CheckpointError(
            f"{folder} is an EventGPT checkpoint, the drafter; give a video model such as "
            "Video-LLaVA as the verifier"
        )
    keymap.tensor_shapes(folder)
    dtype = dtype_of(dtype)
    with _quiet():
        try:
            config = AutoConfig.from_pretrained(folder)
            mapped = AutoModelForImageTextToText._model_mapping[type(config)]
        except (ValueError, KeyError) as error:
            raise CheckpointError(
                f"{folder} is of model type {raw.get('model_type')!r}, which transformers does not "
                "know as an image-text model; "
                "give a video model such as Video-LLaVA") from error
    with _quiet(), torch.device("meta"):
        skeleton = mapped(config)
    _check_video_model(skeleton, folder, raw.get("model_type"))
    with _quiet():
        model, info = _from_pretrained(AutoModelForImageTextToText, folder, dtype, device, quant,
                                       ignore_mismatched_sizes=True)
    missing = sorted(info["missing_keys"])
    if missing and all("image_tower." in name for name in missing):
        model.model.image_tower.load_state_dict(model.model.video_tower.state_dict())
        missing = []
    unexpected = [name for name in info["unexpected_keys"] if not name.endswith(keymap.IGNORED)]
    mismatched = {
        name: (tuple(disk), tuple(expected)) for name, disk, expected in info["mismatched_keys"]
    }
    report = keymap.KeyReport(tuple(missing), tuple(sorted(unexpected)), mismatched)
    if missing or unexpected or mismatched:
        raise CheckpointError(
            f"{folder} does not fit {type(model).__name__}: {report}; check config.json or "
            "download it again"
        )
    _check_finite(model, folder)
    tokenizer = _tokenizer(folder)
    pixels = read_pixel_spec(folder, image_size=config.vision_config.image_size)
    return _handle(model, tokenizer, "verifier", pixels, folder, quant)


def _check_video_model(model: nn.Module, folder: Path, model_type: str | None) -> None:
    features = getattr(getattr(model, "model", None), "get_video_features", None)
    reads = [] if features is None else list(inspect.signature(features).parameters)
    if not reads or "video_grid_thw" in reads or not hasattr(model.model, "language_model"):
        raise CheckpointError(
            f"{folder} is of model type {model_type!r}, which does not read a video as plain "
            "frames; "
            f"the verifier must take {VIDEO_TOKEN} and pixel values alone, as Video-LLaVA and "
            "LLaVA-NeXT-Video do"
        )


# --- shared steps
# ------------------------------------------------------------------------------------------------


def save_checkpoint(folder: str | Path, model: nn.Module, tokenizer: Any,
                    pixels: PixelSpec) -> None:
    """Write weights (safetensors), configuration, tokenizer and preprocessor so that load_drafter /
    load_verifier read them."""
    with _quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    pixels.write(folder)


def _folder(path: str | Path) -> Path:
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(
            f"no checkpoint folder at {folder}; give the directory of a downloaded checkpoint "
            "(nothing is downloaded here)"
        )
    return folder


def _tokenizer(folder: Path) -> Any:
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise CheckpointError(
            f"{folder} holds no tokenizer.json or tokenizer.model; copy the tokenizer files of the "
            "original checkpoint there"
        )
    with _quiet():
        return AutoTokenizer.from_pretrained(folder)


def _handle(model: Any, tokenizer: Any, role: Role, pixels: PixelSpec, folder: Path,
            quant: str | None) -> ModelHandle:
    handle = ModelHandle(model, tokenizer, role, pixels,
                         draft_vocab_size=_text_tokens(tokenizer, model), name=folder.name)
    if quant is not None and handle.device.type == "cpu":
        handle.weights_hash(
        # bitsandbytes repacks 4-bit weights at the first CPU forward: take the identity before that
        )
    return handle


def _text_tokens(tokenizer: Any, model: nn.Module) -> int:
    """Ids of the base vocabulary: without added special tokens and without the padding rows of the
    head."""
    added = tokenizer.added_tokens_decoder
    text = tokenizer.vocab_size
    while text - 1 in added:
        text -= 1
    return min(text, model.get_output_embeddings().weight.shape[0])


def _from_pretrained(model_class: Any, folder: Path, dtype: torch.dtype, device: str,
                     quant: str | None, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
    if quant is not None:
        # A float32 decoder would be quantised from float32 but compute slowly; bitsandbytes
        # computes 4-bit layers in this dtype.
        kwargs |= {
            "quantization_config": quantization_config(quant, dtype), "device_map": {"": device}
        }
    try:
        model, info = model_class.from_pretrained(folder, dtype=dtype, output_loading_info=True,
                                                  local_files_only=True, **kwargs)
    except (RuntimeError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder} could not be loaded: {str(error).strip().splitlines()[0]}; check its files "
            "against the original"
        ) from error
    return (model if quant is not None else model.to(device)), info


@torch.no_grad()
def _check_finite(model: nn.Module, folder: Path) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
            raise CheckpointError(
                f"{folder}: {name} holds NaN or infinity after loading; download it again, or load "
                "with dtype='float32' or 'bfloat16'"
            )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers' progress bars and loading notes off for a while: this module checks and reports
    by itself."""
    bars, level = transformers_logging.is_progress_bar_enabled(
    ), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
