"""Checkpoint folders on this machine to decoder handles: drafter, verifier, pair. Files, model
type, sizes and what the engine cannot do are checked before a model is built, the tensors before it
is filled, names, shapes and NaN after it. No code of a checkpoint is run, nothing is fetched."""

import inspect
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, GenerationConfig

from xsd.core import PAIRS, ROOT, CheckpointError, PairError, ParameterError, as_used
from xsd.models import base, checkpoint_files, checkpoints, pooled, settings
from xsd.models.checkpoint_files import answered
from xsd.models.eventgpt import EventGPTConfig, EventGPTForCausalLM
from xsd.models.handle import VIDEO_TOKEN, ModelHandle, Role
from xsd.models.pixels import PixelSpec, read_pixel_spec
from xsd.models.quantization import dtype_of, quantization_config, stored
from xsd.models.settings import quiet

EMBEDDED, SMOLLM2 = ROOT / "data" / "pair", ROOT / "data" / "smollm2"
"""The pairs that ship: drafter/, verifier/, pair.json (the second on a public decoder: base)."""
MOST_FRAMES = 64
"""Event frames of one clip."""
_NAMES = ("drafter", "verifier", "vision_tower", "name")


@dataclass(frozen=True)
class Pair:
    """Two models that work together. n_event_frames, event_canvas: how the drafter's frames are
    made. draft_vocab_size: ids below it mean the same to both. turns: the device that one of them
    at a time is on, where both do not fit."""

    name: str
    drafter: ModelHandle
    verifier: ModelHandle
    n_event_frames: int = 5
    event_canvas: Literal["slice", "sensor"] = "slice"
    draft_vocab_size: int = 0
    folder: Path | None = None
    turns: str = ""


def pair_folder(pair: str | Path,
                names: str = "'embedded', 'smollm2'") -> tuple[Path, dict[str, Any]]:
    """A pair's folder and what its pair.json says, always with the folders of "drafter" and
    "verifier". Raises: CheckpointError (naming ``names``) for none, or one that says what none is.
    """
    folder = dict(zip(PAIRS, (EMBEDDED, SMOLLM2), strict=True)).get(str(pair)) or Path(pair)
    if not folder.is_dir():
        hint = ("it ships with the repository; clone that again or train it (xsd pair train)"
                if str(pair) in PAIRS else f"give {names} or a folder with drafter/ and verifier/")
        raise CheckpointError(f"no pair at {folder}: {hint}")
    path = folder / "pair.json"
    info = checkpoint_files.read_json(path) if path.is_file() else {}
    for name, value in info.items():
        good = {"n_event_frames": type(value) is int and 1 <= value <= MOST_FRAMES,
                "event_canvas": value in ("slice", "sensor"), "base": value == base.SMOLLM2}
        if not good.get(name, name not in _NAMES or isinstance(value, str)):
            raise CheckpointError(f"{path}: {name} is {str(value)[:60]!r}; expected are a text, "
                                  f"event_canvas slice or sensor, n_event_frames 1 … {MOST_FRAMES}")
    folder = base.assembled(folder) if info.pop("base", None) else folder
    return folder, info | {
        role: folder / info.get(role, role) for role in _NAMES[:3]
        if role in info or role != "vision_tower"}


def check_device(device: str) -> None:
    """Raises: ParameterError for a device that torch does not know or does not see."""
    try:
        place = torch.device(device)
    except RuntimeError:
        place = torch.device("meta")
    if place.type not in ("cpu", "cuda", "mps"):
        raise ParameterError(f"device={device!r} is none that torch knows; give cpu, cuda or "
                             "cuda:1")
    there = {"cpu": sys.maxsize, "cuda": torch.cuda.device_count(),
             "mps": int(torch.backends.mps.is_available())}
    if (place.index or 0) >= there[place.type]:
        seen = there[place.type] or "no"
        raise ParameterError(f"device={device!r}: {seen} GPU is visible to torch; use cpu, or "
                             "install a CUDA build of torch and its driver (xsd doctor)")


def load_pair(pair: str | Path = "embedded", *, dtype: str | torch.dtype = "float32",
              device: str = "cpu", quant: str | None = None, drafter_device: str = "") -> Pair:
    """``"embedded"`` or a folder with drafter/ and verifier/ (its pair.json may name others).
    device, dtype: may be "auto" (core.as_used). drafter_device: another one for the drafter.
    Raises: as :func:`pair_folder`, :func:`shared_vocabulary` and :func:`check_device`."""
    device, dtype = as_used(device, dtype)
    for place in (device, drafter_device or device):
        check_device(place)
    folder, info = pair_folder(pair)
    options = {"dtype": dtype, "quant": quant}
    drafter, turns = load_drafter(info["drafter"], vision_tower=info.get("vision_tower"),
                                  device=drafter_device or device, **options), ""
    try:
        verifier = load_verifier(info["verifier"], device=device, **options)
    except torch.OutOfMemoryError:
        warnings.warn(f"both models do not fit on {device}: one at a time is there", stacklevel=2)
        drafter.model.to("cpu")
        verifier, turns = load_verifier(info["verifier"], device=device, **options), device
    shared = shared_vocabulary(drafter, verifier)
    drafter.draft_vocab_size = verifier.draft_vocab_size = shared
    name = info.get("name") or ("embedded" if folder == EMBEDDED else folder.name)
    return Pair(name, drafter, verifier, int(info.get("n_event_frames", 5)),
                info.get("event_canvas", "slice"), shared, folder, turns)


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
    """An EventGPT checkpoint folder, official or ours. quant: as quantization_config. vision_tower:
    a CLIP folder, for a checkpoint without tower tensors or their description. Raises:
    CheckpointError for anything missing, truncated, of the wrong type or shape, not finite."""
    folder, raw = open_checkpoint(path, quant)
    model_type = EventGPTConfig.model_type
    if raw.get("model_type") != model_type:
        raise CheckpointError(f"{folder} is of model type {raw.get('model_type')!r} but the "
                              f"drafter must be {model_type!r}; give an EventGPT checkpoint")
    tensors = checkpoints.open_tensors(folder)
    shapes = checkpoints.shapes_of(tensors)
    has_tower = any(name.startswith(checkpoints.TOWER) for name in shapes)
    clip_folder = checkpoints.find_tower(folder, raw, vision_tower, needed=not has_tower)
    if raw.get("vision_config") is None:
        raw["vision_config"] = checkpoints.describe_tower(folder, clip_folder, shapes)
    config = drafter_config(folder, raw)
    model = _build(EventGPTForCausalLM, config, folder, tensors, dtype, device, quant,
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
    folder, raw = open_checkpoint(path, quant)
    if raw.get("model_type") == EventGPTConfig.model_type:
        raise CheckpointError(f"{folder} is an EventGPT checkpoint, the drafter; give a video "
                              "model such as Video-LLaVA as the verifier")
    config, model_class = verifier_class(folder, raw)
    tensors = checkpoints.open_tensors(folder)
    has_tower = any("image_tower." in name for name in tensors)
    model = _build(model_class, config, folder, tensors, dtype, device, quant,
                   lacks=() if has_tower else "model.image_tower.")
    if not has_tower and hasattr(model.model, "image_tower"):  # which videos never use
        model.model.image_tower.load_state_dict(model.model.video_tower.state_dict())
    pixels = read_pixel_spec(folder, image_size=config.vision_config.image_size)
    handle = _handle(model, "verifier", pixels, folder, quant)
    mark = handle.tokenizer.convert_tokens_to_ids(VIDEO_TOKEN)
    named = getattr(config, "video_token_id", None) or getattr(config, "video_token_index", None)
    if mark != named:
        raise CheckpointError(f"{folder}: {VIDEO_TOKEN} is id {named} to config.json and {mark} to "
                              "the tokenizer; use the tokenizer saved with the video checkpoint")
    return handle


def drafter_config(folder: Path, raw: dict[str, Any]) -> EventGPTConfig:
    """The configuration of what :func:`open_checkpoint` gave. Raises: CheckpointError."""
    with quiet(), answered(folder / "config.json"):
        return EventGPTConfig.from_dict(raw)


def verifier_class(folder: Path, raw: dict[str, Any]) -> tuple[Any, type]:
    """A verifier's configuration and class. Raises: CheckpointError for no image-text model."""
    try:
        config_class = CONFIG_MAPPING[raw.get("model_type")]
        model_class = AutoModelForImageTextToText._model_mapping[config_class]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder} is of model type {raw.get('model_type')!r}, which transformers does not "
            "know as an image-text model; give a video model such as Video-LLaVA") from error
    with quiet(), answered(folder / "config.json"):
        config = config_class.from_dict(raw)
    return config, pooled.class_for(config, model_class, folder)


def _check_video_model(model: nn.Module, folder: Path) -> None:
    features = getattr(getattr(model, "model", None), "get_video_features", None)
    reads = inspect.signature(features).parameters if features else ()
    if not reads or "video_grid_thw" in reads or not hasattr(model.model, "language_model"):
        raise CheckpointError(
            f"{folder} is of model type {model.config.model_type!r}, which does not read a video "
            f"as plain frames; the verifier must take {VIDEO_TOKEN} and pixel values alone, as "
            "Video-LLaVA and LLaVA-NeXT-Video do")
    read, depth = model.config.vision_feature_layer, model.config.vision_config.num_hidden_layers
    for layer in read if isinstance(read, list) else [read]:
        if type(layer) is not int or not -depth - 1 <= layer <= depth:
            raise CheckpointError(f"{folder}/config.json reads vision_feature_layer {layer!r} of a "
                                  f"tower with {depth} layers; copy it from the original")


def save_checkpoint(folder: str | Path, model: nn.Module, tokenizer: Any,
                    pixels: PixelSpec) -> None:
    """Write what load_drafter / load_verifier read."""
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    pixels.write(folder)


def open_checkpoint(path: str | Path, quant: str | None = None) -> tuple[Path, dict[str, Any]]:
    """A checkpoint's folder, its files looked at, and config.json (checkpoint_files.read_config).
    Raises: CheckpointError where one is missing or may not be read."""
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"no checkpoint folder at {folder}; give the directory of a "
                              "downloaded checkpoint (nothing is downloaded here)")
    checkpoint_files.check_files(folder)
    return folder, checkpoint_files.read_config(folder, quant)


def _handle(model: Any, role: Role, pixels: PixelSpec, folder: Path,
            quant: str | None) -> ModelHandle:
    for name, parameter in ((name, one) for name, whole in model.named_parameters()
                            for one in stored(whole)):
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
            raise CheckpointError(f"{folder}: {name} holds NaN or infinity after loading; download "
                                  "it again, or load with dtype='float32' or 'bfloat16'")
    tokenizer = settings.read_tokenizer(folder, model.config)
    added = tokenizer.added_tokens_decoder
    base = tokenizer.vocab_size  # without added special tokens, and the padding rows of the head
    while base - 1 in added:
        base -= 1
    base = min(base, model.get_output_embeddings().weight.shape[0])
    unused = settings.neutral(folder, model, tokenizer)
    handle = ModelHandle(model, tokenizer, role, pixels, name=folder.name, draft_vocab_size=base,
                         unused_settings=unused)
    if unused:
        warnings.warn(unused, stacklevel=4)
    if quant is not None and handle.device.type == "cpu":
        handle.weights_hash()  # bitsandbytes repacks 4-bit weights at the first CPU forward
    return handle


def _build(model_class: Any, config: Any, folder: Path, tensors: dict[str, Any],
           dtype: str | torch.dtype, device: str, quant: str | None, *,
           lacks: str | tuple[()]) -> Any:
    """A model filled with exactly these tensors. lacks: how names of tensors begin that are filled
    afterwards."""
    dtype = dtype_of(dtype)
    options = {} if quant is None else {"quantization_config": quantization_config(quant, dtype,
                                                                                   device),
                                        "device_map": {"": device}}
    settings.check_decoder(config, folder)
    with quiet(), answered(folder / "config.json"), torch.device("meta"):
        empty = model_class(config)
    if model_class is not EventGPTForCausalLM:
        _check_video_model(empty, folder)
    checkpoints.check_room(folder, empty, checkpoints.shapes_of(tensors), lacks)
    with quiet(), answered(folder):
        model, info = model_class.from_pretrained(
            None, config=config, state_dict=tensors, generation_config=GenerationConfig(),
            dtype=dtype, attn_implementation="sdpa", local_files_only=True,
            output_loading_info=True, ignore_mismatched_sizes=True, **options)
    missing = [name for name in info["missing_keys"] if not name.startswith(lacks)]
    if wrong := checkpoints.differences(missing, info["unexpected_keys"], info["mismatched_keys"]):
        raise CheckpointError(f"{folder} does not fit {model_class.__name__}: {wrong}; check "
                              "config.json (of the drafter: or give the matching CLIP folder as "
                              "vision_tower), or download it again")
    names = [name for name in tensors if not name.endswith(checkpoints.IGNORED)]
    if len(names) > (most := len(empty.state_dict()) - len(info["missing_keys"])):
        raise CheckpointError(f"{folder} holds {len(names)} tensors for the {most} of its model: "
                              "one stands there under two names; download it again")
    return model if quant is not None else model.to(device)
