"""The arms of a live comparison, by name (docs/decoding.md, "Arms"): functions ``(sample,
max_new_tokens) -> Generation`` on the same loaded models."""

import contextlib
import functools
import hashlib
import inspect
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from xsd import files
from xsd.adapters import heads
from xsd.bench import baselines
from xsd.core import Generation, ParameterError, Sample
from xsd.decode import (
    acceptance,
    autoregressive,
    blocks,
    hybrid,
    proposers,
    rules,
    speculative,
    tracks,
)
from xsd.decode.overlap import Overlap
from xsd.decode.prices import Prices
from xsd.models.handle import ModelHandle, tensors_hash
from xsd.models.loading import Pair

BASELINES = ("ar", "ar_all_cores", "hf_generate", "hf_static", "hf_prompt_lookup")
PLAIN = (*BASELINES, "drafter", "ngram", "prompt_lookup")
TREE_NODES = 16
"""Of a tree whose name does not say."""
LABELS = {
    "ar": "own greedy loop", "ar_all_cores": "own greedy loop, all cores",
    "hf_generate": "transformers generate", "hf_static": "transformers generate, static cache",
    "hf_prompt_lookup": "transformers prompt lookup",
    "drafter": "drafter tokens", "ngram": "4-gram table", "prompt_lookup": "prompt lookup",
}


@dataclass(frozen=True)
class Arm:
    """lossless: claims the verifier's own ids. info: the settings (adapter weights included) that
    must not change when a run is resumed."""

    name: str
    run: Callable[[Sample, int], Generation]
    verifier: ModelHandle
    lossless: bool = True
    baseline: bool = False
    info: Mapping[str, Any] = field(default_factory=dict)


def parts_of(name: str) -> tuple[str, int, float, int]:
    """An arm's name as (kind, drafts a round, least probability, nodes of a round's tree); 0 where
    the name does not say. Raises: ParameterError for another form."""
    kind = r"[^@~\s]+(?: of [^@~\s]+)*"  # "L4 of a" is how an adapter's file is called
    found = re.fullmatch(rf"({kind})(?:@1f)?(?:@([1-9]\d*)(?:x([1-9]\d*))?)?"
                         r"(?:~(0?\.\d+))?(?:~(?:cos0?\.\d+|typical))?", name)
    if not found:
        raise ParameterError(f"no arm is called {name!r}; the form is L4, L4@3 (3 drafts a round), "
                             "L4@5x16 (trees of 16 nodes), L4@1f (one event frame), L4~0.6 "
                             "(stops at less likely drafts) or, lossy, L4~cos.9 and L4~typical")
    nodes = int(found[3] or (TREE_NODES if "^" in found[1] else 0))
    return found[1], int(found[2] or 0), float(found[4] or 0), nodes


def acceptance_of(name: str) -> acceptance.Greedy:
    """What an arm's name says of what may stay of a draft: the verifier's own ids, if nothing."""
    found = re.search(r"~(?:cos(0?\.\d+)|typical)$", name)
    if not found:
        return acceptance.GREEDY
    return acceptance.Cosine(float(found[1])) if found[1] else acceptance.Typical()


def kinds_of(name: str) -> list[str]:
    """What drafts in an arm, by short names: of each phase, and of each tree, its parts."""
    return [files.name_of(part) for part in re.split(r"[+^]", parts_of(name)[0])]


def levels_of(names: Sequence[str]) -> list[str]:
    """The adapter levels that arms need, in order: ``["ar", "L1+L5F"]`` → ``["L1", "L5F"]``; of
    names with a colon those that are an adapter's class."""
    found = [part for name in names for part in re.split(r"[+^]", parts_of(name)[0])]
    return [part for part in dict.fromkeys(found)
            if part not in PLAIN and (":" not in part or _is_adapter(files.import_object(part)))]


def _is_adapter(found: Any) -> bool:
    return hasattr(found, "reads") and not hasattr(found, "propose")


def label_of(name: str) -> str:
    """How an arm is called in tables and pictures."""
    kind, gamma, least, nodes = parts_of(name)
    parts = [" and ".join(LABELS.get(short, short.partition(":")[2] or short)
                          for short in map(files.name_of, part.split("^")))
             for part in kind.split("+")]
    return (" + ".join(parts) + (", 1 event frame" if "@1f" in name else "") +
            (f", trees of {nodes}" if nodes else "") +
            (f", {gamma} drafts a round" if gamma else "") +
            (f", only above {least:.0%}" if least else "") +
            ("" if acceptance_of(name).lossless else f", lossy: {name.rpartition('~')[2]}"))


def build(spec: str | proposers.Proposer, pair: Pair,
          adapters: Mapping[str, proposers.Adapter] | None = None, *, gamma: int = 5,
          gamma_prefill: int | None = None, hide_prefill: bool = True,
          overlap: Overlap = "threads", ngram: rules.Rule | None = None,
          one_frame: Callable[[Sample], Sample] | None = None, label: str | None = None,
          prices: Callable[[str], Prices] | None = None) -> Arm:
    """The arm of a name, or of a proposer of your own as an object; ``label`` is its name in the
    records where one name is measured with two settings.

    adapters: level → adapter with ``reads`` and ``step``. gamma_prefill: at most so many drafts
    behind the prefill. ngram: the rule that ``ngram`` drafts by. one_frame: gives a sample with its
    one event frame, for ``@1f``. prices: of an arm by name; no node of a tree is one that does not
    pay. Raises: ParameterError naming the arms there are, what a proposer lacks, or that
    ``one_frame`` is missing.
    """
    verifier, adapters = pair.verifier, adapters or {}
    given = spec if isinstance(spec, str) else type(spec).__name__
    kind, own_gamma, least, nodes = parts_of(given)
    gamma, name = own_gamma or gamma, label or given
    if kind in BASELINES:
        cores = {"cores": available_cores()} if kind == "ar_all_cores" else {}
        return Arm(name, _baseline(kind, verifier, gamma), verifier, baseline=True,
                   info={"kind": kind, **cores})
    frames = 1 if "@1f" in given else 0
    if frames and one_frame is None:
        raise ParameterError(f"the arm {given} wants the sample's one event frame; pass one_frame=")
    if isinstance(spec, str):
        proposer = proposer_of(kind, pair, adapters, ngram, least, nodes,
                               prices(given) if prices and nodes else None)
    else:
        proposer = hybrid.Checked(spec, verifier.vocab_size)
    options = {"gamma": gamma, "gamma_prefill": gamma_prefill, "hide_prefill": hide_prefill,
               "overlap": overlap}
    keeps = acceptance_of(given)

    def run(sample: Sample, max_new_tokens: int) -> Generation:
        return speculative.generate(verifier, proposer, one_frame(sample) if frames else sample,
                                    max_new_tokens=max_new_tokens, acceptance=keeps, **options)

    info = {"kind": kind, **options, "min_probability": least,
            **({"tree_nodes": nodes, "priced": prices is not None} if nodes else {}),
            **({"event_frames": 1} if frames else {}),
            **({} if keeps.lossless else {"lossy": repr(keeps)}),
            **_fingerprints(spec, kinds_of(given), pair, adapters, ngram)}
    return Arm(name, run, verifier, keeps.lossless, info=info)


def _baseline(kind: str, verifier: ModelHandle,
              gamma: int) -> Callable[[Sample, int], Generation]:
    def on_all_cores(*given: Any) -> Generation:
        before = torch.get_num_threads()
        torch.set_num_threads(available_cores())
        try:
            return autoregressive.generate(*given)
        finally:
            torch.set_num_threads(before)

    answer = {"ar": autoregressive.generate, "ar_all_cores": on_all_cores,
              "hf_generate": baselines.hf_generate, "hf_static": baselines.hf_static,
              "hf_prompt_lookup": functools.partial(baselines.hf_prompt_lookup, n_drafts=gamma)}
    return functools.partial(answer[kind], verifier)


def proposer_of(kind: str, pair: Pair, adapters: Mapping[str, Any],
                ngram: rules.Rule | None = None, least: float = 0.0, nodes: int = 0,
                prices: Prices | None = None) -> proposers.Proposer:
    """The proposer that an arm's kind names; of two, one behind the prefill and one in the rounds,
    on one drafter; joined by ^, several in one tree of ``nodes``. least: their min_probability.
    Raises: as :func:`build`."""
    parts, verifier = kinds_of(kind), pair.verifier
    eos, ids = verifier.eos_token_ids, pair.draft_vocab_size or verifier.draft_vocab_size
    drafting = [*PLAIN[len(BASELINES):], *adapters, *(["ar"] if "+" in kind else [])]
    unknown = [part for part in parts if part not in drafting and ":" not in part]
    if unknown or kind.count("+") > 1:
        raise ParameterError(
            f"no arm {kind!r}: it names {', '.join(unknown) or 'three phases'}; there are "
            f"{', '.join([*PLAIN, *sorted(adapters)])}, two of those that draft as 'L4+L5F', and "
            "several in one tree as 'ngram^L5F'")
    if "ngram" in parts and ngram is None:
        raise ParameterError(
            "the arm 'ngram' needs a table: pass ngram=, a function from prefix ids to the next id")
    track = tracks.DrafterTrack(pair.drafter)

    def lookup(sample: Sample) -> rules.Rule:
        before, after = verifier.prompt_ids(sample.question)
        return rules.prompt_lookup([*before, *after])

    def made(part: str) -> Any:
        if part in adapters:
            adapter = adapters[part]
            adapter = adapter.eval() if hasattr(adapter, "eval") else adapter
            if getattr(adapter, "context_layers", None):
                return blocks.BlockProposer(track, adapter, draft_head(verifier, adapter), ids, eos)
            return proposers.AdapterProposer(track, adapter, draft_head(verifier, adapter), ids,
                                             eos)
        if part == "drafter":
            return proposers.DrafterTokens(track, ids, eos)
        rule_of = {"prompt_lookup": lookup, "ngram": lambda _: ngram,
                   "ar": lambda _: rules.stored(())}  # in this phase nobody drafts
        if part in rule_of:
            return proposers.RuleProposer(rule_of[part], eos)
        return _own(part, pair)

    def phase(text: str) -> Any:
        found = []
        for part in map(files.name_of, text.split("^")):
            found.append(made(part))
            if least and not nodes:
                found[-1].min_probability = least
            if part not in (*PLAIN, *adapters):
                found[-1] = hybrid.Checked(found[-1], verifier.vocab_size)
        if not nodes:
            return found[0]
        return hybrid.TreeProposer(*found, n_nodes=nodes, prices=prices, eos_token_ids=eos,
                                   **({"least": least} if least else {}))

    found = [phase(text) for text in kind.split("+")]
    return found[0] if len(found) == 1 else hybrid.TwoPhase(*found)


def _own(name: str, pair: Pair) -> Any:
    """What a researcher typed as module:Class, made with the pair."""
    found = files.import_object(name)
    if _is_adapter(found):
        raise ParameterError(f"{name} is an adapter and not among the loaded ones; train it with "
                             f"notebook 02 and levels={name}")
    try:
        return found(pair)
    except TypeError as error:
        raise ParameterError(f"{name} cannot be made as {name.partition(':')[2]}(pair) ({error}); "
                             "docs/extending.md shows one") from error


def draft_head(verifier: Any, adapter: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """The verifier's head as an adapter drafts through it: only the rows of its draft vocabulary,
    where it has one, and where the adapter stands, copied once."""
    if not hasattr(verifier, "head"):
        return verifier.lm_head
    weight = verifier.head.weight.detach()
    place = next((one.device for one in getattr(adapter, "parameters", tuple)()), weight.device)
    if getattr(adapter, "draft_ids", None) is None and place == weight.device:
        return verifier.lm_head
    head = heads.head_of(adapter, weight.to(place))
    if isinstance(head, torch.Tensor):
        return lambda hidden: torch.nn.functional.linear(hidden.to(head), head)
    return lambda hidden: head(hidden.to(head.weight))


def available_cores() -> int:
    """Cores that this process may run on, which may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _fingerprints(spec: Any, parts: Sequence[str], pair: Pair, adapters: Mapping[str, Any],
                  ngram: rules.Rule | None) -> dict[str, Any]:
    """What must not change when a run is resumed: the adapters' and the drafter's weights, the
    table's entries, and the source of a researcher's own class."""
    states = {part: getattr(adapters[part], "state_dict", None)
              for part in parts if part in adapters}
    found: dict[str, Any] = {"adapters": {part: tensors_hash(state())[:16] if state else ""
                                          for part, state in states.items()}}
    if not set(parts) <= {"ngram", "prompt_lookup"} and hasattr(pair.drafter, "weights_hash"):
        found["drafter"] = pair.drafter.weights_hash()
    if "ngram" in parts:
        found["ngram"] = _short(repr(sorted(getattr(ngram, "table", {}).items())))
    own = [files.import_object(part) for part in parts if ":" in part and part not in adapters]
    for each in own if isinstance(spec, str) else [type(spec)]:
        # what was typed at a prompt, or is not Python, has no source
        with contextlib.suppress(OSError, TypeError):
            found["source"] = [*found.get("source", []), _short(inspect.getsource(each))]
    return found


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
