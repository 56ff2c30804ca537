"""L6: LoRA of the drafter's decoder on a run's teacher-forced pairs, merged, and judged on the
run's held-out sets. The drafter itself changes, so the pair is loaded and the prompts are made
again from the run's clips. A frozen ridge map stands between the models; the same map behind the
drafter as it came is the comparison."""

import dataclasses
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from xsd import files
from xsd.adapters import linear, registry
from xsd.adapters.base import Adapter
from xsd.core import PAIRS, Batch, ParameterError, StorageError
from xsd.evaluate import held_out, statistics, table
from xsd.extract import plan
from xsd.models import loading
from xsd.runs import folder as run_folder
from xsd.sensors import folder as dataset_folder
from xsd.shards.store import ShardDataset
from xsd.steps import data as datasets
from xsd.steps import extraction
from xsd.train import folders, lora, lora_fit, source
from xsd.train.epochs import FitResult

CACHED_PROMPTS, BATCH, GAMMA = 256, 32, 5


def train(pairs: ShardDataset, *, run_dir: str | Path, data: str, folder: Path,
          config: lora.LoraFitConfig, head: Tensor, seed: int, device: str = "cpu",
          validation: ShardDataset | None = None,
          **options: Any) -> tuple[FitResult, dict[str, Any]]:
    """Train (or find) L6 and judge it: (what fit_lora returned, held-out set of the run →
    :func:`judge`). Writes best/ (LoRA), drafter/ (merged, an ordinary one) and map/ (the ridge map)
    into ``folder``. options: of lora_fit.fit_lora, which says what it raises."""
    name = (extraction.known(pairs) or extraction.pair_file(run_dir))["pair"]
    pair = loading.load_pair(name if name in PAIRS else run_folder.resolve(name),
                             device=device)
    states = source.open_states(pairs)
    clips = extraction.clips_of(run_dir, "train", data, pairs)
    chosen = torch.arange(len(states))
    if validation is None:
        chosen, _ = source.split_by_sequence(states.sequence, config.validation_share, seed)
    else:
        clips += extraction.clips_of(run_dir, "train", str(validation.folder), validation)
    through = linear.fit_linear("ridge", states.batches(chosen, 64))
    result = lora_fit.fit_lora(pair.drafter.model, pairs, prompts(clips, pair), folder=folder,
                               head=head, config=config, adapter=through, seed=seed, merge=True,
                               validation=validation, **options)
    drafter = pair.drafter
    with files.FolderLock(folder):
        try:
            loading.save_checkpoint(folder / "drafter", drafter.model, drafter.tokenizer,
                                    drafter.pixels)
        except (OSError, SafetensorError) as error:
            raise StorageError(f"cannot write {folder / 'drafter'} ({error}); free space or choose "
                               "another output folder and run again (nothing was lost)") from error
        registry.save_adapter(through, folder / "map")
        folders.write_checksums(folder)
    judged = {}
    for name in extraction.held_out_names(run_dir):
        stored = extraction.open_pairs(run_dir, "test", name, "teacher_forced")
        clips = extraction.clips_of(run_dir, "test", name, stored)
        judged[datasets.name_of(name)] = judge(through, held_out.of(name, stored, head),
                                               drafter.model, prompts(clips, pair), seed=seed)
    return result, judged


def prompts(clips: Iterable[dataset_folder.ClipRecord], pair: loading.Pair) -> lora_fit.Prompt:
    """Stored pair → its whole prompt's embeddings [L, D_d] in the drafter, vision included. clips:
    those the pairs were extracted from. Raises: ParameterError when a pair's is not there."""
    records = {(record.sequence, record.clip): record for record in clips}

    @lru_cache(maxsize=CACHED_PROMPTS)
    def embedded(sequence: str, clip: str, question: str) -> Tensor:
        if (sequence, clip) not in records:
            raise ParameterError(f"clip {sequence}/{clip} of the stored pairs is not in their data "
                                 "set any more; extract again")
        (sample,) = plan.folder_samples([records[sequence, clip]], [question],
                                        n_event_frames=pair.n_event_frames,
                                        canvas=pair.event_canvas)
        return pair.drafter.prompt_embeddings(sample.load())

    return lambda one: embedded(one.sequence, one.clip, one.question)


def judge(through: Adapter, pairs: held_out.HeldOut, model: torch.nn.Module,
          prompt: lora_fit.Prompt, *, seed: int = 0) -> dict[str, Any]:
    """Token acceptance and accepted drafts per round on a held-out set, with the drafter as
    extracted (before) and as ``model`` is now (after), both behind the map ``through``; and their
    paired difference from every position with room for a whole round, its interval by sequence."""
    batches = {"before": pairs.batches(BATCH), "after": _forced_again(pairs, model, prompt)}
    line: dict[str, Any] = {}
    starts = {}
    for arm, some in batches.items():
        tokens = table.of_batches({lora.LEVEL: through}, some, pairs.head, gamma=GAMMA)
        each, drafted = table.counts(tokens, GAMMA), table.drafted(tokens)
        last = drafted.groupby("sample", observed=True)["position"].transform("max")
        starts[arm] = drafted[last - drafted["position"] + 1 >= GAMMA]
        line[arm] = {"token_acceptance": float(tokens["one_step_match"].mean()),
                     "accepted_per_round": float(each["accepted"].sum() / each["rounds"].sum())}
    before, after = starts["before"], starts["after"]
    if len(before):
        gain = statistics.bootstrap_difference(after["accepted"], before["accepted"],
                                               before["sequence"], n_resamples=400, seed=seed)
        line["gain_per_start"] = dataclasses.asdict(gain)
    return line


@torch.no_grad()
def _forced_again(pairs: held_out.HeldOut, model: torch.nn.Module,
                  prompt: lora_fit.Prompt) -> Iterator[Batch]:
    """The same batches, their drafter states as the drafter gives them now."""
    known = list(pairs.samples.itertuples())
    for batch in pairs.batches(BATCH):
        answers = zip(batch.index, batch.ids_by_verifier, batch.mask, strict=True)
        states = [lora.forced_states(model, [prompt(known[index])], [ids[real]])[0].float()
                  for index, ids, real in answers]
        yield dataclasses.replace(batch, drafter=pad_sequence(states, batch_first=True))
