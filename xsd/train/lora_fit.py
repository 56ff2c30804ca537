"""Training of L6 on teacher-forced pairs (docs/adapters.md, section 7). A run folder is as an
adapter's (:mod:`xsd.train.fit`), its best weights in best/ in peft's own format; the same call on a
freshly loaded drafter continues an interrupted run."""

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from xsd.adapters.base import Adapter, Aligned
from xsd.core import PairedStates, TrainingError
from xsd.train import guards, lora, source
from xsd.train.epochs import EpochLoop, FitResult, Progress

Prompt = Callable[[PairedStates], Tensor]


def fit_lora(
    model: nn.Module, dataset: Sequence[PairedStates] | Any, prompt: Prompt, *,
    folder: str | Path, head: Tensor, config: lora.LoraFitConfig | None = None,
    adapter: Adapter | None = None, validation: Any = None,
    held_out: Sequence[Any] | guards.Marks = (), seed: int = 0, merge: bool | None = None,
    progress: Progress = None,
) -> FitResult:
    """Train L6 on teacher-forced pairs. Afterwards the best weights are merged into ``model``; a
    quantised one is left as it came. model: the drafter (EventGPTForCausalLM, in 4 bits for QLoRA).
    dataset: a ShardDataset or PairedStates of the train split. prompt: sample → embeddings [L, D_d]
    of its whole prompt. head: the verifier's, weight [V, D_v]. validation, held_out: as in
    fit_adapter. adapter: stands, frozen, between the drafter's states and the verifier's; needed
    where their widths differ (ridge, or L1–L5). merge: None means unless quantised. False leaves
    the model as it came, as an interruption does; lora.merge_saved does it later. Raises:
    TrainingError as fit_adapter, and for other than teacher-forced post-norm pairs or prompts that
    are not the dataset's."""
    config = config or lora.LoraFitConfig()
    quantised = lora.is_quantised(model)
    if merge and quantised:
        raise TrainingError("a quantised drafter cannot take the weights in; train with merge=None "
                            "and call lora.merge_saved on one in bfloat16")
    training = LoraTraining(model, dataset, prompt, folder, head, config, adapter, validation,
                            held_out, seed)
    try:
        result = training.run(progress)
    finally:
        model.activation_checkpointing_disable()
        if training.tuned is not None:
            training.tuned.unload()
        model.eval()
    if merge or (merge is None and not quantised):
        lora.merge_saved(model, result.best_path)
    return result


class LoraTraining(EpochLoop):
    """One training of L6: its drafter, data and folder. :func:`fit_lora` runs it."""

    best_name = "best"
    to_save_memory = ", set gradient_checkpointing=True, or load the drafter in 4 bits"
    head: Tensor
    tuned: peft.PeftModel | None = None

    def __init__(self, model: nn.Module, dataset: Any, prompt: Prompt, folder: str | Path,
                 head: Tensor, config: lora.LoraFitConfig, adapter: Adapter | None, validation: Any,
                 held_out: Sequence[Any] | guards.Marks, seed: int) -> None:
        where = model.get_input_embeddings().weight.device
        super().__init__(lora.LEVEL, folder, config, seed, where)
        self.model, self.dataset, self.prompt, self.device = model, dataset, prompt, where
        self.head = head.detach().float().to(where)
        self.adapter = copy.deepcopy(adapter)
        if adapter is not None:
            self.adapter.to(where).eval().requires_grad_(False)
        self.validation = dataset if validation is None else validation
        self.take(dataset, validation, held_out, memory_limit_gb=0)
        self._check(self.states)
        first = lora.decoder_of(model)[1].layers[0].self_attn.q_proj.weight
        # 4-bit weights are reordered by a CPU's first pass, so their bytes name nothing
        base = "quantised" if lora.is_quantised(model) else source.digest([first])
        through = "" if adapter is None else source.digest(adapter.state_dict().values())
        self.identity |= {"base": base, "adapter": through}

    def _check(self, states: source.States) -> None:
        tap = self.dataset[0].tap
        if states.mode != "teacher_forced" or tap != "post_norm" or not states.has_token_ids:
            raise TrainingError("LoRA trains on teacher_forced, post_norm pairs with token ids, "
                                f"not on {states.mode}, {tap}; extract those")
        width = states.drafter_size if self.adapter is None else self.adapter.hidden_size
        if self.adapter is not None and self.adapter.reads != "drafter":
            raise TrainingError(f"the adapter behind LoRA must read the drafter alone, and "
                                f"{self.adapter.level} does not; choose L1–L5 or ridge")
        if width != states.hidden_size:
            raise TrainingError(f"the states to train are {width} wide and the verifier's "
                                f"{states.hidden_size}; pass adapter= with a map between them")
        if self.processes.size > 1:
            raise TrainingError("L6 trains in one process; start it without torchrun")

    def prepare(self) -> None:
        """LoRA in the drafter, and its optimiser; prompts, drafter and dataset must fit."""
        config = self.config
        torch.manual_seed(self.seed)
        self.tuned = lora.attach(self.model, rank=config.rank, alpha=config.alpha,
                                 dropout=config.dropout, targets=config.targets)
        self.parameters = [p for p in self.tuned.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(self.parameters, lr=config.learning_rate,
                                           weight_decay=config.weight_decay)
        self._check_prompt()
        if config.gradient_checkpointing:
            self.model.activation_checkpointing_enable({"use_reentrant": False})

    @torch.no_grad()
    def _check_prompt(self) -> None:
        """LoRA is zero now: the states must be the stored ones, or something is of another pair."""
        self.model.eval()
        sample = self.dataset[int(self.train_indices[0])]
        answer = sample.ids_by_verifier.to(self.device)
        own = lora.forced_states(self.model, [self.prompt(sample)], [answer])[0].float().cpu()
        similar = float(F.cosine_similarity(own, sample.hidden_by_drafter.float(), dim=-1).mean())
        if not similar > 0.9:
            raise TrainingError(
                f"the drafter's states differ from the dataset's (mean cosine {similar:.2f} on "
                f"{sample.sequence}/{sample.clip}): pass the drafter and prompts that the dataset "
                "was extracted with; a drafter that LoRA was merged into must be loaded afresh")

    def _aligned(self, dataset: Any, indices: Tensor) -> Aligned:
        """The answers ``indices`` as the drafter with its LoRA says them now, with gradient."""
        samples = [dataset[i] for i in indices.tolist()]
        answers = [sample.ids_by_verifier.to(self.device) for sample in samples]
        target = pad_sequence([sample.hidden_by_verifier.float().to(self.device)
                               for sample in samples], batch_first=True)
        mask = pad_sequence([torch.ones_like(answer, dtype=torch.bool) for answer in answers],
                            batch_first=True)
        states = lora.forced_states(self.model, [self.prompt(sample) for sample in samples],
                                    answers).float()
        aligned = states if self.adapter is None else self.adapter(states, mask=mask)
        return Aligned(aligned, target, pad_sequence(answers, batch_first=True), mask)

    def train_pass(self, epoch: int) -> dict[str, float]:
        """Every token of a step weighs the same, however passes cut them."""
        config = self.config
        # LoRA's dropout only: the tower stays in eval
        lora.decoder_of(self.model)[1].layers.train()
        draw = torch.Generator().manual_seed(self.seed * 7919 + epoch)
        order = torch.randperm(len(self.train_indices), generator=draw)
        batches = self.train_indices[order].split(config.batch_size)
        sums, count, waiting = {}, 0, 0
        for number, indices in enumerate(batches, start=1):
            aligned, target, ids, mask = self._aligned(self.dataset, indices)
            losses, n = self.objective(aligned, target, ids, mask, self.head), int(mask.sum())
            (losses["total"] * n).backward()
            count, waiting = count + n, waiting + n
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + float(value.detach()) * n
            if number % config.accumulation == 0 or number == len(batches):
                for parameter in self.parameters:
                    parameter.grad /= waiting
                self.step(torch.tensor(sums["total"]), epoch, number)
                waiting = 0
        return {f"train_{name}": value / count for name, value in sums.items()}

    def predictions(self) -> Iterator[Aligned]:
        """Of one batch of validation answers after another."""
        self.model.eval()
        for indices in self.validation_indices.split(self.config.batch_size):
            yield self._aligned(self.validation, indices)

    def weights(self) -> list[Tensor]:
        """What a checkpoint keeps of the LoRA weights."""
        return [parameter.detach() for parameter in self.parameters]

    @torch.no_grad()
    def restore(self, weights: list[Tensor]) -> None:
        """Take them back."""
        for parameter, weight in zip(self.parameters, weights, strict=True):
            if parameter.shape != weight.shape:  # copy_ would spread it
                raise ValueError(f"weights of shape {tuple(weight.shape)}")
            parameter.copy_(weight)

    def save(self, name: str, row: dict[str, Any]) -> None:
        """Write the weights into best/ or final/ as peft does."""
        lora.save(self.tuned, self.folder / name, file=name, epoch=row["epoch"], seed=self.seed,
                  data=self.identity["data"], training=self.named)
