"""Checkpoint folders to decoder handles: the drafter (EventGPT), the verifier (a video model of transformers), and the pair.

Everything is checked before the weights are read: files whole, model type, tensor names and shapes; after it: NaN. Nothing is
downloaded: a checkpoint is a folder on this machine.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer
from transformers.utils import logging as transformers_logging

from xsd.core import ROOT, CheckpointError, PairError
from xsd.models import keymap
from xsd.models.eventgpt import EventGPTConfig, EventGPTForCausalLM
from xsd.models.handle import ModelHandle, Role
from xsd.models.pixels import PixelSpec, read_pixel_spec
from xsd.models.prompts import VIDEO_TOKEN
from xsd.models.quantization import dtype_of, quantization_config

EMBEDDED = ROOT / "data" / "pair"
"""The pair that ships with the repository: drafter/, verifier/, pair.json."""


@dataclass(frozen=True)
class Pair:
    """Two models that work together. n_event_frames and event_canvas ("slice" | "sensor"): how the drafter's frames are to be made.

    draft_vocab_size: ids below it mean the same to both and may be drafted.
    """

    name: str
    drafter: ModelHandle
    verifier: ModelHandle
    n_event_frames: int = 5
    event_canvas: Literal["slice", "sensor"] = "slice"
    draft_vocab_size: int = 0
    folder: Path | None = None


def load_pair(
    profile: str | Path = "embedded", *, dtype: str | torch.dtype = "float32", device: str = "cpu", quant: str | None = None
) -> Pair:
    """``"embedded"`` or a folder with drafter/ and verifier/ (pair.json may name other folders: ``{"drafter": ..., "verifier": ...}``).

    Raises: CheckpointError for a folder that is no pair; PairError if the models do not share a vocabulary.
    """
    folder = EMBEDDED if str(profile) == "embedded" else Path(profile)
    if not folder.is_dir():
        hint = (
            "the embedded pair ships with the repository; clone it again or train it with notebook 00"
            if folder == EMBEDDED
            else "give 'embedded' or a folder with drafter/ and verifier/"
        )
        raise CheckpointError(f"no pair at {folder}: {hint}")
    info = _read_json(folder / "pair.json") if (folder / "pair.json").is_file() else {}
    options = {"dtype": dtype, "device": device, "quant": quant}
    drafter = load_drafter(folder / info.get("drafter", "drafter"), vision_tower=info.get("vision_tower"), **options)
    verifier = load_verifier(folder / info.get("verifier", "verifier"), **options)
    shared = shared_vocabulary(drafter, verifier)
    name = info.get("name") or ("embedded" if folder == EMBEDDED else folder.name)
    drafter.draft_vocab_size = verifier.draft_vocab_size = shared
    return Pair(name, drafter, verifier, int(info.get("n_event_frames", 5)), info.get("event_canvas", "slice"), shared, folder)


def shared_vocabulary(drafter: ModelHandle, verifier: ModelHandle) -> int:
    """Number of leading ids that are the same text token in both models. Raises: PairError, with the first difference."""
    a, b = drafter.tokenizer, verifier.tokenizer
    shared = min(drafter.draft_vocab_size, verifier.draft_vocab_size)
    sizes = f"{drafter.draft_vocab_size} text tokens against {verifier.draft_vocab_size}"
    ids = list(range(shared))
    for token_id, one, other in zip(ids, a.convert_ids_to_tokens(ids), b.convert_ids_to_tokens(ids), strict=True):
        if one != other:
            raise PairError(
                f"the tokenizers disagree: id {token_id} is {one!r} to the drafter and {other!r} to the verifier ({sizes}); "
                "choose two models built on one vocabulary, as EventGPT and Video-LLaVA are"
            )
    if drafter.draft_vocab_size != verifier.draft_vocab_size:
        raise PairError(f"the tokenizers disagree in size: {sizes}; choose two models built on one vocabulary")
    if drafter.eos_token_ids != verifier.eos_token_ids:
        raise PairError(
            f"the end-of-answer ids differ: {sorted(drafter.eos_token_ids)} for the drafter, {sorted(verifier.eos_token_ids)} "
            "for the verifier; correct eos_token_id in the generation_config.json that is wrong"
        )
    return shared


# --- the drafter -------------------------------------------------------------------------------------------------------------


def load_drafter(
    path: str | Path,
    quant: str | None = None,
    dtype: str | torch.dtype = "float32",
    device: str = "cpu",
    vision_tower: str | Path | None = None,
) -> ModelHandle:
    """An EventGPT checkpoint folder, official or ours.

    quant: None, "4bit" or "8bit". vision_tower: a CLIP folder, used where the checkpoint holds no tower tensors or does not
    describe its tower. Raises: CheckpointError for anything missing, truncated, of the wrong type or shape, or not finite.
    """
    folder = _folder(path)
    raw = _read_json(folder / "config.json")
    if raw.get("model_type") != EventGPTConfig.model_type:
        raise CheckpointError(
            f"{folder} is of model type {raw.get('model_type')!r} but the drafter must be {EventGPTConfig.model_type!r}; "
            "give an EventGPT checkpoint"
        )
    shapes = keymap.tensor_shapes(folder)
    has_tower = any(name.startswith(keymap.TOWER) for name in shapes)
    tower_folder = _tower_folder(folder, raw, vision_tower, needed=not has_tower)
    with _quiet():
        config = EventGPTConfig.from_pretrained(folder)
    if config.vision_config is None:
        config.vision_config = _vision_config(folder, tower_folder, shapes)
    with torch.device("meta"):
        expected = keymap.expected_shapes(EventGPTForCausalLM(config))
    report = keymap.compare(shapes, expected if has_tower else {k: v for k, v in expected.items() if not k.startswith(keymap.TOWER)})
    if report.missing or report.mismatched or report.unexpected:
        raise CheckpointError(
            f"{folder} does not fit EventGPT's tensors: {report}; check config.json, or give the matching CLIP folder as vision_tower"
        )
    dtype = dtype_of(dtype)
    with _quiet():
        model = _from_pretrained(EventGPTForCausalLM, folder, dtype, device, quant, config=config)[0]
    if not has_tower:
        _load_tower(model, tower_folder)
    _check_finite(model, folder)
    tokenizer = _tokenizer(folder)
    if config.mm_use_im_start_end:
        _check_event_marks(tokenizer, folder, config.vocab_size)
    pixels = read_pixel_spec(folder, tower_folder, image_size=config.tower_config().image_size)
    return _handle(model, tokenizer, "drafter", pixels, folder, quant)


def _tower_folder(folder: Path, raw: dict[str, Any], override: str | Path | None, *, needed: bool) -> Path | None:
    if override is not None:
        if not Path(override).is_dir():
            raise CheckpointError(f"vision_tower={override} is no folder; give the folder of the CLIP model (config.json and weights)")
        return Path(override)
    named = raw.get("mm_visual_tower")
    for candidate in (Path(named), folder / named) if named else ():
        if (candidate / "config.json").is_file():
            return candidate
    if needed:
        raise CheckpointError(
            f"{folder} holds no vision-tower weights, and the tower its config names, {named!r}, is not on this machine (such configs "
            "carry a path of the machine they were saved on); pass vision_tower=<folder of CLIP ViT-L/14-336>"
        )
    return None


def _vision_config(folder: Path, tower_folder: Path | None, shapes: dict[str, keymap.Shape]) -> dict[str, Any]:
    """The tower's fields: from the CLIP folder, else read off the tensors (64 channels a head, as all CLIP ViT-B and -L have)."""
    if tower_folder is not None:
        found = _read_json(tower_folder / "config.json")
        return {
            k: v for k, v in found.get("vision_config", found).items() if k not in ("architectures", "torch_dtype", "transformers_version")
        }
    prefix = next((name.split("embeddings.", 1)[0] for name in shapes if name.startswith(keymap.TOWER) and "embeddings." in name), "")
    try:
        width, _, patch, _ = shapes[prefix + "embeddings.patch_embedding.weight"]
        positions = shapes[prefix + "embeddings.position_embedding.weight"][0]
        inner = shapes[prefix + "encoder.layers.0.mlp.fc1.weight"][0]
    except KeyError as error:
        raise CheckpointError(f"{folder} lacks the vision-tower tensor {error.args[0]}; download it again or pass vision_tower") from error
    if width % 64:
        raise CheckpointError(
            f"{folder} does not say how its vision tower is built (width {width} is no CLIP of 64 channels a head); "
            "pass vision_tower=<its CLIP folder>"
        )
    layers = 1 + max(int(name.split(".layers.")[1].split(".")[0]) for name in shapes if name.startswith(prefix + "encoder.layers."))
    return {
        "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": width // 64,
        "patch_size": patch, "image_size": patch * round((positions - 1) ** 0.5), "hidden_act": "quick_gelu",
    }  # fmt: skip


def _load_tower(model: EventGPTForCausalLM, folder: Path) -> None:
    names = keymap.tower_names(folder, keymap.tensor_shapes(folder))
    weights: dict[str, torch.Tensor] = {}
    for path in keymap.weight_files(folder):
        loaded = load_file(path) if path.suffix == ".safetensors" else keymap.load_bin(path)
        weights.update({names[name]: tensor for name, tensor in loaded.items() if name in names})
    tower = model.model.visual_tower.clip
    report = keymap.compare({k: tuple(v.shape) for k, v in weights.items()}, keymap.expected_shapes(tower))
    if report.missing or report.mismatched:
        raise CheckpointError(f"the CLIP in {folder} does not fit this checkpoint: {report}; give the CLIP the checkpoint was trained with")
    tower.load_state_dict(weights, strict=False)


def _check_event_marks(tokenizer: Any, folder: Path, n_rows: int) -> None:
    marks = tokenizer.convert_tokens_to_ids(["<ev_start>", "<ev_end>"])
    unknown = [mark for mark in marks if mark is None or mark == tokenizer.unk_token_id or mark >= n_rows]
    if unknown:
        raise CheckpointError(
            f"{folder} says mm_use_im_start_end but its tokenizer and embedding table have no <ev_start> and <ev_end>; "
            "use the tokenizer saved with the fine-tuned weights"
        )


# --- the verifier --------------------------------------------------------------------------------------------------------------


def load_verifier(path: str | Path, quant: str | None = None, dtype: str | torch.dtype = "float32", device: str = "cpu") -> ModelHandle:
    """A video model that AutoModelForImageTextToText reads: Video-LLaVA, LLaVA-NeXT-Video.

    An absent image tower (videos never use it) is filled from the video tower. Raises: CheckpointError as load_drafter.
    """
    folder = _folder(path)
    raw = _read_json(folder / "config.json")
    if raw.get("model_type") == EventGPTConfig.model_type:
        raise CheckpointError(f"{folder} is an EventGPT checkpoint, the drafter; give a video model such as Video-LLaVA as the verifier")
    keymap.tensor_shapes(folder)
    dtype = dtype_of(dtype)
    with _quiet():
        try:
            config = AutoConfig.from_pretrained(folder)
            mapped = AutoModelForImageTextToText._model_mapping[type(config)]
        except (ValueError, KeyError) as error:
            raise CheckpointError(
                f"{folder} is of model type {raw.get('model_type')!r}, which transformers does not know as an image-text model; "
                "give a video model such as Video-LLaVA"
            ) from error
    with _quiet(), torch.device("meta"):
        skeleton = mapped(config)
    _check_video_model(skeleton, folder, raw.get("model_type"))
    with _quiet():
        model, info = _from_pretrained(AutoModelForImageTextToText, folder, dtype, device, quant, ignore_mismatched_sizes=True)
    missing = sorted(info["missing_keys"])
    if missing and all("image_tower." in name for name in missing):
        model.model.image_tower.load_state_dict(model.model.video_tower.state_dict())
        missing = []
    unexpected = [name for name in info["unexpected_keys"] if not name.endswith(keymap.IGNORED)]
    mismatched = {name: (tuple(disk), tuple(expected)) for name, disk, expected in info["mismatched_keys"]}
    report = keymap.KeyReport(tuple(missing), tuple(sorted(unexpected)), mismatched)
    if missing or unexpected or mismatched:
        raise CheckpointError(f"{folder} does not fit {type(model).__name__}: {report}; check config.json or download it again")
    _check_finite(model, folder)
    tokenizer = _tokenizer(folder)
    pixels = read_pixel_spec(folder, image_size=config.vision_config.image_size)
    return _handle(model, tokenizer, "verifier", pixels, folder, quant)


def _check_video_model(model: nn.Module, folder: Path, model_type: str | None) -> None:
    features = getattr(getattr(model, "model", None), "get_video_features", None)
    reads = [] if features is None else list(inspect.signature(features).parameters)
    if not reads or "video_grid_thw" in reads or not hasattr(model.model, "language_model"):
        raise CheckpointError(
            f"{folder} is of model type {model_type!r}, which does not read a video as plain frames; "
            f"the verifier must take {VIDEO_TOKEN} and pixel values alone, as Video-LLaVA and LLaVA-NeXT-Video do"
        )


# --- shared steps ----------------------------------------------------------------------------------------------------------------


def save_checkpoint(folder: str | Path, model: nn.Module, tokenizer: Any, pixels: PixelSpec) -> None:
    """Write weights (safetensors), configuration, tokenizer and preprocessor so that load_drafter / load_verifier read them."""
    with _quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    pixels.write(folder)


def _folder(path: str | Path) -> Path:
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(
            f"no checkpoint folder at {folder}; give the directory of a downloaded checkpoint (nothing is downloaded here)"
        )
    return folder


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; give the directory that holds config.json and the weights") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}); copy it again from the original checkpoint") from error


def _tokenizer(folder: Path) -> Any:
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise CheckpointError(
            f"{folder} holds no tokenizer.json or tokenizer.model; copy the tokenizer files of the original checkpoint there"
        )
    with _quiet():
        return AutoTokenizer.from_pretrained(folder)


def _handle(model: Any, tokenizer: Any, role: Role, pixels: PixelSpec, folder: Path, quant: str | None) -> ModelHandle:
    handle = ModelHandle(model, tokenizer, role, pixels, draft_vocab_size=_text_tokens(tokenizer, model), name=folder.name)
    if quant is not None and handle.device.type == "cpu":
        handle.weights_hash()  # bitsandbytes repacks 4-bit weights at the first CPU forward: take the identity before that
    return handle


def _text_tokens(tokenizer: Any, model: nn.Module) -> int:
    """Ids of the base vocabulary: without added special tokens and without the padding rows of the head."""
    added = tokenizer.added_tokens_decoder
    text = tokenizer.vocab_size
    while text - 1 in added:
        text -= 1
    return min(text, model.get_output_embeddings().weight.shape[0])


def _from_pretrained(
    model_class: Any, folder: Path, dtype: torch.dtype, device: str, quant: str | None, **kwargs: Any
) -> tuple[Any, dict[str, Any]]:
    if quant is not None:
        # A float32 decoder would be quantised from float32 but compute slowly; bitsandbytes computes 4-bit layers in this dtype.
        kwargs |= {"quantization_config": quantization_config(quant, dtype), "device_map": {"": device}}
    try:
        model, info = model_class.from_pretrained(folder, dtype=dtype, output_loading_info=True, local_files_only=True, **kwargs)
    except (RuntimeError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder} could not be loaded: {str(error).strip().splitlines()[0]}; check its files against the original"
        ) from error
    return (model if quant is not None else model.to(device)), info


@torch.no_grad()
def _check_finite(model: nn.Module, folder: Path) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
            raise CheckpointError(
                f"{folder}: {name} holds NaN or infinity after loading; download it again, or load with dtype='float32' or 'bfloat16'"
            )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers' progress bars and loading notes off for a while: this module checks and reports by itself."""
    bars, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
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
