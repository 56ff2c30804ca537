"""One trainer for L1–L5, L5F, B1 and levels of one's own: the reference's recipe, and the one that
optimises tokens (docs/adapters.md, section 5). A run folder holds best.safetensors,
final.safetensors, config.json, history.json, provenance.json, checkpoint.pt and, once finished,
checksums.json. The same call on it continues an interrupted run to the same weights, bit for bit,
and returns a finished one at once."""

import copy
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xsd import files
from xsd.adapters import checks, heads, linear, registry
from xsd.adapters.base import Adapter, Aligned
from xsd.core import Batch, ParameterError, TrainingError
from xsd.train import guards, parts, source
from xsd.train.epochs import EpochLoop, FitResult, Progress
from xsd.train.recipes import FitConfig

FUSING = ("L5", "B1", "L5F", *registry.BLOCKS)
"""Levels that can read the token before; block drafters always do."""


def fit_adapter(
    level: Any, dataset: Any, *, folder: str | Path, config: FitConfig | None = None,
    profile: str = "reference", head: heads.Head | None = None, seed: int = 0,
    validation: Any = None, held_out: Sequence[Any] | guards.Marks = (),
    device: str | torch.device = "cpu", progress: Progress = None,
) -> FitResult:
    """Train one adapter of a level on paired states. level: of ours by name, or your own:
    "module:Class", a class, or an object, of which a copy is trained from its present weights
    (registry.create_adapter; it is checked first). dataset: a ShardDataset, a sequence of
    PairedStates, a list of Batch, or what source.open_states made of one (pack once, train many).
    folder: created; an unfinished run of the same configuration, seed and data in it is continued.
    config: how; ``profile`` is short for FitConfig(profile). head: the verifier's LM head, weight
    [V, D_v] or callable; needed by token terms, and for token acceptance in the history.
    validation: another dataset of *train* sequences; by default whole sequences of ``dataset`` are
    held back. held_out: the sets that adapters are judged on later (ShardDatasets, or
    guards.marks_of them): nothing of them may be in the others, under whatever name. progress:
    called with each epoch's row (in the process that writes). Raises: TrainingError for a test
    split, NaN, out of memory, a folder of another run; ParameterError for an unknown level or
    option."""
    config = config or FitConfig(profile=profile)
    if isinstance(level, str) and level not in registry.TRAINED and ":" not in level:
        raise ParameterError(f"level {level!r} is not trained here; choose one of "
                             f"{', '.join(registry.TRAINED)}, or a class of your own, module:Class")
    if config.select_by == "token_acceptance" and head is None:
        raise TrainingError(f"profile {config.profile!r} selects by token acceptance and needs the "
                            "verifier's LM head; pass head= (a weight [V, D])")
    return Training(level, dataset, folder, config, head=head, seed=seed, validation=validation,
                    held_out=held_out, device=device).run(progress)


class Training(EpochLoop):
    """One training: its data, adapter, optimiser and folder; :func:`fit_adapter` runs it."""

    def __init__(self, level: Any, dataset: Any, folder: str | Path, config: FitConfig, *,
                 head: heads.Head | None = None, seed: int = 0, validation: Any = None,
                 held_out: Sequence[Any] | guards.Marks = (),
                 device: str | torch.device = "cpu") -> None:
        super().__init__(files.name_of(level), folder, config, seed, torch.device(device))
        self.spec = level
        self.take(dataset, validation, held_out)
        self._choose_heads(head)
        if isinstance(level, torch.nn.Module):  # another beginning is another training
            self.identity["start"] = source.digest(level.state_dict().values())

    def _choose_heads(self, head: heads.Head | None) -> None:
        """``head``: what token terms go through; ``full_head``: the whole weight [V, D] if given.
        Raises: TrainingError when something needs token ids or rows that are not there."""
        config, self.head, self.full_head = self.config, None, None
        by_tokens = self.objective.needs_head or config.select_by == "token_acceptance"
        fused = (config.token_fusion or "vocab_size" in config.adapter_options
                 or self.level in registry.BLOCKS)
        by_rows = "fused tokens" if fused else config.draft_vocabulary and "a draft vocabulary"
        if not self.states.has_token_ids:
            if by_tokens or by_rows:
                raise TrainingError(f"objective {config.objective!r} needs token ids and this "
                                    "dataset has none; use profile 'reference' or extract again")
            return
        self.head = head
        if isinstance(head, Tensor):
            self.head = self.full_head = head.detach().float().to(self.device)
        elif by_rows:
            raise TrainingError(f"{self.level} with {by_rows} needs the rows of the LM head; pass "
                                "head= as a weight [V, D]")
        if config.draft_vocabulary is not None:
            answers = (batch.ids_by_verifier[batch.mask]
                       for batch in self.states.batches(self.train_indices, 256))
            ids = heads.most_frequent(answers, config.draft_vocabulary)
            self.head = heads.draft_head(self.full_head, ids.to(self.device))

    def prepare(self) -> None:
        """The adapter and its optimiser, from the seed (draws from torch's global generator)."""
        torch.manual_seed(self.seed)
        self.adapter = self._new_adapter().to(self.device)
        self.about = {"adapter": self.adapter.config()}
        pieces = parts.plan(self.adapter, self.config)
        self.next_weight = 0.0 if self.adapter.shift or len(pieces) == 1 else pieces[1][1]
        self.parameters = [p for p in self.adapter.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(self.parameters, lr=self.config.learning_rate,
                                           weight_decay=self.config.weight_decay, fused=True)

    def _new_adapter(self) -> Adapter:
        """As its recipe starts it. A level of one's own is checked first; an nn.Linear of it that
        is called input_map (D_d → D_v) starts as the closed form, too."""
        level, config, states = self.level, self.config, self.states
        block, ours = level in registry.BLOCKS, level in registry.TRAINED
        ridge, options = config.warm_start == "ridge" and not block, {}
        if config.token_fusion and level not in FUSING:
            raise ParameterError(
                f"{level} fuses no tokens; token_fusion is for {', '.join(FUSING)}")
        if block:
            options["context_layers"] = states.context_layers
        elif config.alpha is not None and level in ("L4", "X1", *FUSING):
            options["alpha"] = config.alpha
        if config.prediction_weight is not None and level in FUSING and not block:
            options["prediction_weight"] = config.prediction_weight
        if config.token_fusion or block:
            options["vocab_size"] = len(self.full_head)
        if ridge and ours and level != "B1":
            options["input_map"] = True
        if ridge and level in ("B1", "L5F"):
            options["residual_map"] = True
        options |= config.adapter_options
        adapter = registry.create_adapter(copy.deepcopy(self.spec), states.hidden_size,
                                          drafter_size=states.drafter_size, **options)
        if not ours:
            checks.check_adapter(adapter)
        if ridge and not isinstance(self.spec, torch.nn.Module):  # an object starts as it is
            inside = getattr(adapter, "module", adapter)  # one's own stands inside an OwnAdapter
            for name, reads in (("input_map", "drafter"), ("residual_map", adapter.reads)):
                module = getattr(inside, name, None)
                if isinstance(module, torch.nn.Linear):
                    batches = states.batches(self.train_indices, config.batch_size)
                    closed = linear.fit_linear("ridge", batches, reads=reads)
                    module.load_state_dict(closed.map.state_dict())
        if ours and adapter.fuses_tokens:
            adapter.set_token_embedding(self.full_head.cpu())
        if isinstance(self.head, heads.DraftHead):
            adapter.set_draft_vocabulary(self.head.ids.cpu())
        return adapter

    def _batches(self, states: source.States, indices: Tensor,
                 shuffle_seed: int | None = None) -> Iterator[Batch]:
        """This process's share of every batch, on its device."""
        found = states.batches(indices, self.config.batch_size, shuffle_seed=shuffle_seed)
        if self.device.type != "cpu" and isinstance(states, source.PackedStates):
            found = source.ahead(found)  # streamed ones are read ahead already
        wanted = self.adapter.context_layers
        return (states.with_context(self.processes.rows(batch), wanted).to(self.device)
                for batch in found)

    def train_pass(self, epoch: int) -> dict[str, float]:
        """Each step is the mean over all its positions, however accumulation and processes cut."""
        self.adapter.train()
        pieces = parts.plan(self.adapter, self.config)
        sums: dict[str, Any] = dict.fromkeys(("total", *self.objective.weights), 0.0)
        count = 0.0
        batches = self._batches(self.states, self.train_indices, self.seed * 7919 + epoch)
        groups = iter(lambda: list(itertools.islice(batches, self.config.accumulation)), [])
        each = self.config.batch_size * self.config.accumulation
        steps = -(-len(self.train_indices) // each)
        for number, group in enumerate(groups, start=1):
            if self.config.schedule == "step":
                self.set_rate(epoch + (number - 1) / steps)
            starts = [parts.draw_starts(self.adapter, one.mask, self.config) for one in group]
            own = [parts.norms(self.adapter, one.mask, self.config, drawn)
                   for one, drawn in zip(group, starts, strict=True)]
            whole = self.processes.sum(torch.stack(own).sum(0))
            if whole[0] == 0:
                continue  # no answer of this step is long enough
            scale = whole.clamp_min(1e-12) * parts.factor_sum(pieces, whole, self.adapter)
            total = torch.zeros((), device=self.device)
            for batch, norms, drawn in zip(group, own, starts, strict=True):
                if norms[0] == 0:
                    continue
                losses = parts.losses(self.adapter, batch, self.objective, self.head, self.config,
                                      (norms / scale).tolist(), norms.tolist(), drawn)
                losses["total"].backward()
                total += losses.pop("total").detach()
                for name, value in losses.items():
                    sums[name] = sums[name] + value.detach() * norms[0]
            step = self.step(total, epoch, number)
            sums["total"] = sums["total"] + step * whole[0] / self.processes.size
            count += float(whole[0])
        if count == 0:
            raise TrainingError(f"no answer is long enough to train {self.level}, which predicts "
                                "the next state; extract longer answers")
        return {f"train_{name}": value / count for name, value in self.processes.sums(sums).items()}

    def predictions(self) -> Iterator[Aligned]:
        """Of one batch of validation answers after another."""
        self.adapter.eval()
        for batch in self._batches(self.validation_states, self.validation_indices):
            if len(batch.mask):  # else another process has all of it
                yield self.adapter.align(batch)

    def weights(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of the adapter."""
        return self.adapter.state_dict()

    def restore(self, weights: dict[str, Tensor]) -> None:
        """Take them back."""
        self.adapter.load_state_dict(weights)

    def save(self, name: str, row: dict[str, Any]) -> None:
        """Write ``<name>.safetensors`` with where it comes from."""
        registry.save_adapter(self.adapter, self.folder / f"{name}.safetensors",
                              file=name, epoch=row["epoch"], seed=self.seed,
                              data=self.identity["data"], profile=self.config.profile,
                              training=self.named)
