"""Training of L6 on teacher-forced pairs (docs/adapters.md, section 7); what LoRA is put into is in
:mod:`xsd.train.lora`.

A run folder holds best/ (peft's own format), config.json, history.json, provenance.json and
checkpoint.pt; the same call on a freshly loaded drafter continues an interrupted run to the same
weights, bit for bit.
"""

from __future__ import annotations

import copy
import json
import math
import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from xsd import files
from xsd.adapters import heads
from xsd.adapters.base import Adapter
from xsd.core import CheckpointError, PairedStates, TrainingError
from xsd.train import guards, lora, objectives, source


@dataclass(frozen=True)
class LoraResult:
    """best_path: folder of the best LoRA weights. history: one row an epoch. parameters: trainable
    ones. best_epoch: from 1."""

    best_path: Path
    history: list[dict[str, Any]]
    seconds: float
    parameters: int
    best_epoch: int


def fit_lora(
    model: nn.Module, dataset: Sequence[PairedStates] | Any, prompt: Callable[[PairedStates],
                                                                              Tensor], *,
    folder: str | Path, head: Tensor, config: lora.LoraFitConfig | None = None,
    adapter: Adapter | None = None, held_out: Sequence[Any] | guards.HeldOut = (), seed: int = 0,
    merge: bool | None = None, progress: Callable[[dict[str, Any]], None] | None = None,
) -> LoraResult:
    """Train L6 on teacher-forced pairs. Afterwards the best weights are merged into ``model``; a
    quantised one is left as it came.

    Args:
        model: the drafter (EventGPTForCausalLM, in 4 bits for QLoRA). dataset: a ShardDataset or
        PairedStates of the train split.
        prompt: sample → embeddings [L, D_d] of its whole prompt (ModelHandle.prompt_embeddings).
        head: the verifier's, weight [V, D_v].
        held_out: sets that it is judged on later; nothing of them may be in ``dataset``
        (guards.refuse_held_out).
        adapter: stands, frozen, between the drafter's states and the verifier's; needed where their
        widths differ (ridge, or L1–L5).
        merge: None means unless quantised. False leaves the model as it came, as an interruption
        does; lora.merge_saved does it later.
    Raises: TrainingError for a test split, other than teacher-forced post-norm pairs, prompts that
    are not the dataset's, NaN, out of
        memory, a folder of another run.
    """
    config = config or lora.LoraFitConfig()
    if merge and lora.is_quantised(model):
        raise TrainingError(
            "a quantised drafter cannot take the weights in; train with merge=None and call "
            "lora.merge_saved on one in bfloat16"
        )
    run = _Run(model, dataset, prompt, Path(folder), head, config, adapter, held_out, seed)
    with torch.random.fork_rng(devices=[] if run.device.type == "cpu" else [run.device]):
        torch.manual_seed(seed)
        tuned = lora.attach(model, rank=config.rank, alpha=config.alpha, dropout=config.dropout,
                            targets=config.targets)
        try:
            result = run.train(tuned, progress)
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"out of memory in LoRA training: lower batch_size (now {config.batch_size}) and "
                "raise accumulation (now "
                f"{config.accumulation}), set gradient_checkpointing=True, or load the drafter in "
                "4 bits"
            ) from error
        finally:
            model.activation_checkpointing_disable()
            tuned.unload()
            model.eval()
    if merge or (merge is None and not lora.is_quantised(model)):
        lora.merge_saved(model, result.best_path)
    return result


class _Run:
    """One training: its data, folder and how far it is."""
    def __init__(self, model, dataset, prompt, folder, head, config, adapter, held_out,
                 seed) -> None:
        self.model, self.dataset, self.prompt, self.folder, self.config, self.seed = model, dataset, prompt, folder, config, seed
        self.device = model.get_input_embeddings().weight.device
        self.head, self.objective = head.detach().float().to(self.device), objectives.parse(
            config.objective)
        self.adapter = None if adapter is None else copy.deepcopy(adapter).to(
            self.device).eval().requires_grad_(False)
        states = source.StreamedStates(dataset) if hasattr(
            dataset, "manifest") else source.PackedStates(dataset)
        source.refuse_test_split(states.split)
        guards.refuse_held_out(states, held_out)
        if states.mode != "teacher_forced" or dataset[
                0].tap != "post_norm" or not states.has_token_ids:
            raise TrainingError(
                "LoRA trains on teacher_forced, post_norm pairs with token ids, not on "
                f"{states.mode}, {dataset[0].tap}; extract those"
            )
        if adapter is not None and (adapter.reads, adapter.shift) != ("drafter", 0):
            raise TrainingError(
                f"the adapter behind LoRA must read the drafter alone, and {adapter.level} does "
                "not; choose L1–L5 or ridge"
            )
        width = states.drafter_size if adapter is None else adapter.hidden_size
        if width != states.hidden_size:
            raise TrainingError(
                f"the states to train are {width} wide and the verifier's {states.hidden_size}; "
                "pass adapter= with a map between them"
            )
        self.train_indices, self.validation_indices = source.split_by_sequence(
            states.sequence, config.validation_share, seed)
        first = lora.decoder_of(model)[1].layers[0].self_attn.q_proj.weight.detach()
        # 4-bit weights are reordered by a CPU's first pass, so their bytes name nothing
        base = "quantised" if lora.is_quantised(model) else source.digest([first])
        through = "" if adapter is None else source.digest(adapter.state_dict().values())
        identity = {
            "seed": seed, "config": asdict(config), "data": states.fingerprint(), "base": base,
            "adapter": through
        }
        self.identity = json.loads(json.dumps(identity))
        self.history: list[dict[str, Any]] = []
        self.best, self.best_epoch, self.finished = math.inf, 0, False

    def train(self, tuned: peft.PeftModel,
              progress: Callable[[dict[str, Any]], None] | None) -> LoraResult:
        self.trained = [p for p in tuned.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(self.trained, lr=self.config.learning_rate,
                                           weight_decay=self.config.weight_decay)
        self._check_prompt()
        self._resume()
        if self.config.gradient_checkpointing:
            self.model.activation_checkpointing_enable({"use_reentrant": False})
        while not self.finished:
            row = self._epoch(len(self.history))
            self._keep(tuned, row)
            if progress is not None:
                progress(row)
        seconds = sum(row["seconds"] for row in self.history)
        return LoraResult(self.folder / "best", self.history, seconds,
                          lora.trainable_parameters(tuned), self.best_epoch)

    @torch.no_grad()
    def _check_prompt(self) -> None:
        """LoRA is zero now: the states must be the stored ones, or prompt, model and dataset do not
        belong together."""
        self.model.eval()
        sample = self.dataset[int(self.train_indices[0])]
        own = lora.forced_states(self.model, [self.prompt(sample)],
                                 [sample.ids_by_verifier.to(self.device)])[0].float().cpu()
        similar = float(F.cosine_similarity(own, sample.hidden_by_drafter.float(), dim=-1).mean())
        if not similar > 0.9:
            raise TrainingError(
                f"the drafter's states differ from the dataset's (mean cosine {similar:.2f} on "
                f"{sample.sequence}/{sample.clip}): pass the "
                "drafter and prompts that the dataset was extracted with; a drafter that LoRA was "
                "merged into must be loaded afresh"
            )

    def _epoch(self, epoch: int) -> dict[str, Any]:
        config, start = self.config, time.perf_counter()
        low, high = config.minimum_learning_rate, config.learning_rate
        rate = low + (high - low) * (1 + math.cos(math.pi * epoch / config.epochs)) / 2
        torch.manual_seed(self.seed * 1_000_003 + epoch +
                          1)  # an epoch's dropout depends on nothing before it: resuming is exact
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        lora.decoder_of(
            self.model)[1].layers.train()  # LoRA's dropout only: the tower stays in eval
        order = torch.randperm(len(self.train_indices),
                               generator=torch.Generator().manual_seed(self.seed * 7919 + epoch))
        batches = self.train_indices[order].split(config.batch_size)
        sums, count, waiting = {}, 0, 0
        for number, indices in enumerate(batches, start=1):
            losses, n = self._losses(indices)
            (losses["total"] * n).backward()
            count, waiting = count + n, waiting + n
            _add(sums, losses, n, "train_")
            if number % config.accumulation == 0 or number == len(batches):
                # every token of the step weighs the same, however the passes cut them
                for parameter in self.trained:
                    parameter.grad /= waiting
                norm = float(nn.utils.clip_grad_norm_(self.trained, config.clip))
                if not math.isfinite(sums["train_total"]) or not math.isfinite(norm):
                    self._stop_for_nan(epoch)
                self.optimiser.step()
                self.optimiser.zero_grad(set_to_none=True)
                waiting = 0
        row = {
            "epoch": epoch + 1, "learning_rate": rate,
            **{name: value / count for name, value in sums.items()}, **self.evaluate()
        }
        if not math.isfinite(row["validation_total"]):
            self._stop_for_nan(epoch)
        return {**row, "seconds": time.perf_counter() - start}

    def _losses(self, indices: Tensor, *, judge: bool = False) -> tuple[dict[str, Tensor], int]:
        """The objective's terms over some samples and their number of positions; judge: also cosine
        and accepted tokens."""
        samples = [self.dataset[i] for i in indices.tolist()]
        answers = [sample.ids_by_verifier.to(self.device) for sample in samples]
        target = pad_sequence(
            [sample.hidden_by_verifier.float().to(self.device) for sample in samples],
            batch_first=True)
        ids = pad_sequence(answers, batch_first=True)
        mask = pad_sequence([torch.ones_like(answer, dtype=torch.bool) for answer in answers],
                            batch_first=True)
        states = lora.forced_states(self.model, [self.prompt(sample) for sample in samples],
                                    answers).float()
        aligned = states if self.adapter is None else self.adapter(states, mask=mask)
        losses = self.objective(aligned, target, ids, mask, self.head)
        if judge:
            losses["cosine_similarity"] = F.cosine_similarity(aligned[mask], target[mask],
                                                              dim=-1).mean()
            losses["token_acceptance"] = (heads.top_tokens(
                self.head, aligned[mask]) == ids[mask]).float().mean()
        return losses, int(mask.sum())

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The objective's terms, cosine similarity and token acceptance on the validation
        sequences, means over positions."""
        self.model.eval()
        sums, count = {}, 0
        for indices in self.validation_indices.split(self.config.batch_size):
            losses, n = self._losses(indices, judge=True)
            count += n
            _add(sums, losses, n)
        means = {name: value / count for name, value in sums.items()}
        judged = ("cosine_similarity", "token_acceptance")
        return {
            name if name in judged else f"validation_{name}": value
            for name, value in means.items()
        }

    # --- the folder
    # --------------------------------------------------------------------------------------------

    def _keep(self, tuned: peft.PeftModel, row: dict[str, Any]) -> None:
        self.history.append(row)
        if row["validation_total"] < self.best:
            self.best, self.best_epoch = row["validation_total"], row["epoch"]
            lora.save(tuned, self.folder / "best")
        self.finished = row[
            "epoch"] >= self.config.epochs or row["epoch"] - self.best_epoch >= self.config.patience
        files.write_json(self.folder / "history.json", self.history)
        if row["epoch"] == 1:
            files.write_json(self.folder / "config.json",
                            {"level": "L6", **self.identity, "objective": str(self.objective)})
            made = files.provenance(seed=self.seed, data_hash=self.identity["data"],
                                   device=str(self.device))
            files.write_json(self.folder / "provenance.json", made)
        with files.atomic_path(self.folder / "checkpoint.pt") as temporary:
            torch.save(
                {
                    "identity": json.dumps(self.identity, sort_keys=True), "weights": [
                        p.detach() for p in self.trained
                    ], "optimiser": self.optimiser.state_dict(), "history": self.history,
                    "best": self.best, "best_epoch": self.best_epoch, "finished": self.finished,
                }, temporary,
            )  # fmt: skip

    def _resume(self) -> None:
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return
        try:
            stored = torch.load(path, map_location=self.device, weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError, OSError) as error:
            raise CheckpointError(
                f"{path} is damaged ({type(error).__name__}); delete the folder and train again"
            ) from error
        if stored["identity"] != json.dumps(self.identity, sort_keys=True):
            raise TrainingError(
                f"{self.folder} holds another training (drafter, configuration, seed or data "
                "differ); choose another folder or delete it"
            )
        with torch.no_grad():
            for parameter, weight in zip(self.trained, stored["weights"], strict=True):
                parameter.copy_(weight)
        self.optimiser.load_state_dict(stored["optimiser"])
        self.history, self.best, self.best_epoch, self.finished = (stored[key]
                                                                   for key in ("history", "best",
                                                                               "best_epoch",
                                                                               "finished"))

    def _stop_for_nan(self, epoch: int) -> None:
        kept = f"the last good weights are {self.folder / 'best'} (epoch {self.best_epoch})" if self.best_epoch else "no epoch was finished"
        raise TrainingError(
            f"LoRA training stopped in epoch {epoch + 1}: the loss or its gradient is not a "
            f"number; {kept}; "
            f"lower learning_rate (now {self.config.learning_rate:g}) or look for NaN in the states"
        )


def _add(sums: dict[str, float], losses: dict[str, Tensor], n: int, prefix: str = "") -> None:
    for name, value in losses.items():
        sums[prefix + name] = sums.get(prefix + name, 0.0) + float(value.detach()) * n
