"""Checkpoint folders on this machine to decoder handles: drafter, verifier, pair. Files and the
model type are checked before the weights are read; names, shapes and NaN after it."""

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
from transformers.utils import logging as hf_logging

from xsd.core import ROOT, CheckpointError, PairError, ParameterError
from xsd.models import checkpoints
from xsd.models.eventgpt import EventGPTConfig, EventGPTForCausalLM
from xsd.models.handle import VIDEO_TOKEN, ModelHandle, Role
from xsd.models.pixels import PixelSpec, read_pixel_spec
from xsd.models.quantization import dtype_of, quantization_config

EMBEDDED = ROOT / "data" / "pair"
"""The pair that ships with the repository: drafter/, verifier/, pair.json."""


@dataclass(frozen=True)
class Pair:
    """Two models that work together. n_event_frames, event_canvas: how the drafter's frames are
    made. draft_vocab_size: ids below it mean the same to both."""

    name: str
    drafter: ModelHandle
    verifier: ModelHandle
    n_event_frames: int = 5
    event_canvas: Literal["slice", "sensor"] = "slice"
    draft_vocab_size: int = 0
    folder: Path | None = None


def pair_folder(profile: str | Path, names: str = "'embedded'") -> tuple[Path, dict[str, Any]]:
    """A pair's folder and what its pair.json says, always with the folders of "drafter" and
    "verifier". Raises: CheckpointError (naming ``names``) where there is none."""
    folder = EMBEDDED if str(profile) == "embedded" else Path(profile)
    if not folder.is_dir():
        hint = f"give {names} or a folder with drafter/ and verifier/"
        if folder == EMBEDDED:
            hint = "it ships with the repository; clone that again or train it with notebook 00"
        raise CheckpointError(f"no pair at {folder}: {hint}")
    info = checkpoints.read_json(folder / "pair.json") if (folder / "pair.json").is_file() else {}
    return folder, info | {role: folder / info.get(role, role) for role in ("drafter", "verifier")}


def check_device(device: str) -> None:
    """Raises: ParameterError for a device that torch does not know or does not see."""
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ParameterError(f"device={device!r} is none that torch knows; give cpu, cuda or "
                             "cuda:1") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ParameterError(f"device={device!r}: no GPU is visible to torch; use cpu, or install "
                             "a CUDA build of torch and its driver (xsd doctor)")


def load_pair(profile: str | Path = "embedded", *, dtype: str | torch.dtype = "float32",
              device: str = "cpu", quant: str | None = None) -> Pair:
    """``"embedded"`` or a folder with drafter/ and verifier/ (its pair.json may name others).
    Raises: as :func:`pair_folder`, :func:`shared_vocabulary` and :func:`check_device`."""
    check_device(device)
    folder, info = pair_folder(profile)
    options = {"dtype": dtype, "device": device, "quant": quant}
    drafter = load_drafter(info["drafter"], vision_tower=info.get("vision_tower"), **options)
    verifier = load_verifier(info["verifier"], **options)
    shared = shared_vocabulary(drafter, verifier)
    drafter.draft_vocab_size = verifier.draft_vocab_size = shared
    name = info.get("name") or ("embedded" if folder == EMBEDDED else folder.name)
    return Pair(name, drafter, verifier, int(info.get("n_event_frames", 5)),
                info.get("event_canvas", "slice"), shared, folder)


def shared_vocabulary(drafter: ModelHandle, verifier: ModelHandle) -> int:
    """Leading ids that are the same text token in both models. Raises: PairError."""
    shared = min(drafter.draft_vocab_size, verifier.draft_vocab_size)
    sizes = f"{drafter.draft_vocab_size} text tokens against {verifier.draft_vocab_size}"
    ours, theirs = (handle.tokenizer.convert_ids_to_tokens(list(range(shared)))
                    for handle in (drafter, verifier))
    for token_id, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        if one != other:
            raise PairError(
                f"the tokenizers disagree: id {token_id} is {one!r} to the drafter and {other!r} "
                f"to the verifier ({sizes}); choose two models built on one vocabulary, as "
                "EventGPT and Video-LLaVA are")
    if drafter.draft_vocab_size != verifier.draft_vocab_size:
        raise PairError(
            f"the tokenizers disagree in size: {sizes}; choose two models built on one vocabulary")
    ours, theirs = sorted(drafter.eos_token_ids), sorted(verifier.eos_token_ids)
    if ours != theirs:
        raise PairError(f"the end-of-answer ids differ: {ours} for the drafter, {theirs} for the "
                        "verifier; correct eos_token_id in the wrong generation_config.json")
    return shared


def load_drafter(path: str | Path, quant: str | None = None, dtype: str | torch.dtype = "float32",
                 device: str = "cpu", vision_tower: str | Path | None = None) -> ModelHandle:
    """An EventGPT checkpoint folder, official or ours. quant: None, "4bit" or "8bit". vision_tower:
    a CLIP folder, for a checkpoint without tower tensors or their description. Raises:
    CheckpointError for anything missing, truncated, of the wrong type or shape, not finite."""
    folder, raw = open_checkpoint(path)
    model_type = EventGPTConfig.model_type
    if raw.get("model_type") != model_type:
        raise CheckpointError(f"{folder} is of model type {raw.get('model_type')!r} but the "
                              f"drafter must be {model_type!r}; give an EventGPT checkpoint")
    shapes = checkpoints.tensor_shapes(folder)
    has_tower = any(name.startswith(checkpoints.TOWER) for name in shapes)
    clip_folder = checkpoints.find_tower(folder, raw, vision_tower, needed=not has_tower)
    with _quiet():
        config = EventGPTConfig.from_pretrained(folder)
    if config.vision_config is None:
        config.vision_config = checkpoints.describe_tower(folder, clip_folder, shapes)
    model = _from_pretrained(EventGPTForCausalLM, folder, dtype, device, quant, config=config,
                             lacks=() if has_tower else checkpoints.TOWER)
    if not has_tower:
        checkpoints.load_tower(model.model.visual_tower.clip, clip_folder)
    pixels = read_pixel_spec(folder, clip_folder, image_size=config.tower_config().image_size)
    handle = _handle(model, "drafter", pixels, folder, quant)
    if config.mm_use_im_start_end:
        marks = handle.tokenizer.convert_tokens_to_ids(["<ev_start>", "<ev_end>"])
        unknown = (None, handle.tokenizer.unk_token_id)
        if any(mark in unknown or mark >= config.vocab_size for mark in marks):
            raise CheckpointError(
                f"{folder} says mm_use_im_start_end but its tokenizer and embedding table have no "
                "<ev_start> and <ev_end>; use the tokenizer saved with the fine-tuned weights")
    return handle


def load_verifier(path: str | Path, quant: str | None = None, dtype: str | torch.dtype = "float32",
                  device: str = "cpu") -> ModelHandle:
    """A video model that AutoModelForImageTextToText reads. Raises: as load_drafter."""
    folder, raw = open_checkpoint(path)
    if raw.get("model_type") == EventGPTConfig.model_type:
        raise CheckpointError(f"{folder} is an EventGPT checkpoint, the drafter; give a video "
                              "model such as Video-LLaVA as the verifier")
    has_tower = any("image_tower." in name for name in checkpoints.tensor_shapes(folder))
    config, model_class = verifier_class(folder)
    with _quiet(), torch.device("meta"):
        _check_video_model(model_class(config), folder)
    model = _from_pretrained(model_class, folder, dtype, device, quant,
                             lacks=() if has_tower else "model.image_tower.")
    if not has_tower and hasattr(model.model, "image_tower"):  # which videos never use
        model.model.image_tower.load_state_dict(model.model.video_tower.state_dict())
    pixels = read_pixel_spec(folder, image_size=config.vision_config.image_size)
    return _handle(model, "verifier", pixels, folder, quant)


def verifier_class(folder: Path) -> tuple[Any, type]:
    """A verifier's configuration and class. Raises: CheckpointError for no image-text model."""
    try:
        with _quiet():
            config = AutoConfig.from_pretrained(folder)
        return config, AutoModelForImageTextToText._model_mapping[type(config)]
    except (ValueError, KeyError) as error:
        model_type = checkpoints.read_json(folder / "config.json").get("model_type")
        raise CheckpointError(
            f"{folder} is of model type {model_type!r}, which transformers does not know as an "
            "image-text model; give a video model such as Video-LLaVA") from error


def _check_video_model(model: nn.Module, folder: Path) -> None:
    features = getattr(getattr(model, "model", None), "get_video_features", None)
    reads = inspect.signature(features).parameters if features else ()
    if not reads or "video_grid_thw" in reads or not hasattr(model.model, "language_model"):
        raise CheckpointError(
            f"{folder} is of model type {model.config.model_type!r}, which does not read a video "
            f"as plain frames; the verifier must take {VIDEO_TOKEN} and pixel values alone, as "
            "Video-LLaVA and LLaVA-NeXT-Video do")


def save_checkpoint(folder: str | Path, model: nn.Module, tokenizer: Any,
                    pixels: PixelSpec) -> None:
    """Write what load_drafter / load_verifier read."""
    with _quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    pixels.write(folder)


def open_checkpoint(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """A checkpoint's folder and config.json. Raises: CheckpointError where one is missing."""
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"no checkpoint folder at {folder}; give the directory of a "
                              "downloaded checkpoint (nothing is downloaded here)")
    return folder, checkpoints.read_json(folder / "config.json")


def _handle(model: Any, role: Role, pixels: PixelSpec, folder: Path,
            quant: str | None) -> ModelHandle:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
            raise CheckpointError(f"{folder}: {name} holds NaN or infinity after loading; download "
                                  "it again, or load with dtype='float32' or 'bfloat16'")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise CheckpointError(f"{folder} holds no tokenizer.json or tokenizer.model; copy the "
                              "tokenizer files of the original checkpoint there")
    with _quiet():
        tokenizer = AutoTokenizer.from_pretrained(folder)
    base = tokenizer.vocab_size  # without added special tokens, and the padding rows of the head
    while base - 1 in tokenizer.added_tokens_decoder:
        base -= 1
    base = min(base, model.get_output_embeddings().weight.shape[0])
    handle = ModelHandle(model, tokenizer, role, pixels, name=folder.name, draft_vocab_size=base)
    if quant is not None and handle.device.type == "cpu":
        handle.weights_hash()  # bitsandbytes repacks 4-bit weights at the first CPU forward
    return handle


def _from_pretrained(model_class: Any, folder: Path, dtype: str | torch.dtype, device: str,
                     quant: str | None, *, lacks: str | tuple[()], **kwargs: Any) -> Any:
    """lacks: how names of tensors begin that are filled afterwards."""
    dtype = dtype_of(dtype)
    if quant is not None:
        kwargs |= {"quantization_config": quantization_config(quant, dtype),
                   "device_map": {"": device}}
    try:
        with _quiet():
            model, info = model_class.from_pretrained(
                folder, dtype=dtype, local_files_only=True, output_loading_info=True,
                ignore_mismatched_sizes=True, **kwargs)
    except (RuntimeError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{folder} could not be loaded: {reason}; check its files against "
                              "the original") from error
    missing = [name for name in info["missing_keys"] if not name.startswith(lacks)]
    if wrong := checkpoints.differences(missing, info["unexpected_keys"], info["mismatched_keys"]):
        raise CheckpointError(f"{folder} does not fit {model_class.__name__}: {wrong}; check "
                              "config.json (of the drafter: or give the matching CLIP folder as "
                              "vision_tower), or download it again")
    return model if quant is not None else model.to(device)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers' progress bars and notes off for a while: this module checks by itself."""
    bars, level = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
