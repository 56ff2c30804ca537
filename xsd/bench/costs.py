"""What the parts cost on this machine, and what counted rounds should have taken at these prices.
Whatever measures returns one row per operation: what, ms (median), low, high (quartiles), n."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from xsd import files
from xsd.bench.arms import PLAIN, draft_head, kinds_of, label_of, parts_of
from xsd.core import DecoderHandle, ParameterError
from xsd.decode import overlap, proposers, replay, speculative, trees
from xsd.decode.prices import Prices

LANES = ("the verifier's lane alone", "the drafter's lane alone")
PARTS = ("prefill", "draft", "verify")
PRICES = ("drafter_prefill", "draft", "round")
"""Of an arm, besides those of the verifier that all arms share."""
SERIAL = "both prefills and first drafts, one after the other"
AT_ONCE = "both prefills and first drafts, at once"
IDEAL = "the longer lane alone (ideal overlap)"


def measure(operations: Mapping[str, Callable[[], Any]], *, repeats: int = 5,
            clock: Callable[[], float] = time.perf_counter) -> pd.DataFrame:
    """Each operation is run once to warm up, then ``repeats`` times in turn with the others.
    Raises: ParameterError if repeats < 1."""
    if repeats < 1:
        raise ParameterError(f"repeats is {repeats}; measure at least once")
    seconds: dict[str, list[float]] = {name: [] for name in operations}
    for turn in range(repeats + 1):
        for name, operation in operations.items():
            _settle()
            start = clock()
            operation()
            _settle()
            if turn:
                seconds[name].append(clock() - start)
    rows = [(name, *(1e3 * np.quantile(values, [0.5, 0.25, 0.75])), repeats)
            for name, values in seconds.items()]
    return pd.DataFrame(rows, columns=["what", "ms", "low", "high", "n"])


def _settle() -> None:
    """GPU work is queued: wait for it around an operation, never inside."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


@torch.inference_mode()
def verification_curve(handle: DecoderHandle, sample: Any, *,
                       rows: Sequence[int] = tuple(range(1, 10)), context: int = 0,
                       repeats: int = 5) -> pd.DataFrame:
    """v(K): one extend of K rows and its rollback, after the prompt and ``context`` answer tokens;
    the column ``rows`` is K."""
    state = handle.prefill(sample)
    token, device = int(state.logits.argmax()), state.logits.device
    if context:
        handle.extend(state, torch.full((context,), token, device=device))
    start = state.length

    def verify(n: int) -> None:
        handle.extend(state, torch.full((n,), token, device=device))[1].argmax(-1).tolist()
        handle.rollback(state, start)

    found = measure({f"verify {n}": lambda n=n: verify(n) for n in rows}, repeats=repeats)
    return found.assign(rows=list(rows))


@torch.inference_mode()
def step_costs(drafter: DecoderHandle, verifier: DecoderHandle,
               adapters: Mapping[str, proposers.Adapter], sample: Any, *, context: int = 8,
               repeats: int = 5) -> pd.DataFrame:
    """drafter_prefill, verifier_prefill, drafter_step, verifier_step, and one step (of a block
    drafter: one block) of each adapter with the head it drafts through, ``adapter L4``. context:
    answer positions that exist then."""
    by_drafter, by_verifier = drafter.prefill(sample), verifier.prefill(sample)
    drafter_states = by_drafter.hidden[None].repeat(context + 1, 1)
    verifier_states = by_verifier.hidden[None].repeat(context, 1)
    ids = torch.zeros(context, dtype=torch.long)

    def step(handle: DecoderHandle, state: Any) -> Callable[[], None]:
        start, token = state.length, state.logits.argmax()[None]

        def once() -> None:
            int(handle.extend(state, token)[1][-1].argmax())
            handle.rollback(state, start)

        return once

    def adapt(adapter: Any, head: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], int]:
        if getattr(adapter, "context_layers", None):
            kept = adapter.keep()
            for role, layers in adapter.context_layers.items():
                state = {"drafter": drafter, "verifier": verifier}[role].prefill(sample,
                                                                                 layers=layers)
                adapter.read(kept, role, state.context.rows(0, state.length), -state.length)
            return lambda: int(head(adapter.step_block(kept, 0, context)).argmax(-1)[0])
        more: dict[str, Any] = {"tokens": ids} if getattr(adapter, "fuses_tokens", False) else {}
        if hasattr(adapter, "keep"):  # the first, warming step fills it; the others read one row
            more["kept"] = adapter.keep()
        states = drafter_states, verifier_states
        if place := next((one.device for one in getattr(adapter, "parameters", tuple)()), None):
            states = drafter_states.to(place), verifier_states.to(place)
        return lambda: int(head(adapter.step(*states, **more)[None])[0].argmax())

    return measure({
        "drafter_prefill": lambda: int(drafter.prefill(sample).logits.argmax()),
        "verifier_prefill": lambda: int(verifier.prefill(sample).logits.argmax()),
        "drafter_step": step(drafter, by_drafter), "verifier_step": step(verifier, by_verifier),
        **{f"adapter {level}": adapt(one, draft_head(verifier, one))
           for level, one in adapters.items()},
    }, repeats=repeats)


@torch.inference_mode()
def prefill_overlap(verifier: DecoderHandle, proposer: proposers.Proposer, sample: Any, *,
                    n_drafts: int = 4, repeats: int = 5) -> pd.DataFrame:
    """The verifier's prefill and the drafter's prefill with ``n_drafts`` drafts: each lane alone,
    one after the other, really at once, and the ideal, which is the longer lane alone."""
    def prefill() -> int:
        return int(verifier.prefill(sample).logits.argmax())

    def draft(stop: overlap.Stop = proposers.never) -> list[int]:
        """stop is ignored: the same drafts in every mode."""
        proposer.begin(sample)
        return [] if proposer.needs_verifier else proposer.propose(n_drafts)

    found = measure({
        LANES[0]: prefill, LANES[1]: draft,
        SERIAL: lambda: overlap.run_lanes(prefill, draft, "serial"),
        AT_ONCE: lambda: overlap.run_lanes(prefill, draft, "threads"),
    }, repeats=repeats)
    longer = found.loc[found["ms"].head(2).idxmax()]
    return pd.concat([found, longer.to_frame().T.assign(what=IDEAL)], ignore_index=True)


def hiding(asked: str, verifier: DecoderHandle, proposer: proposers.Proposer, sample: Any,
           path: Path, n_drafts: int, about: Mapping[str, Any]) -> dict[str, Any]:
    """Whether to draft behind the verifier's prefill: hide_prefill and overlap of arms.build, and
    why. asked: "yes", "no", or "auto": where both lanes at once are done before one after the other
    (:func:`prefill_overlap`), which is measured once and kept in ``path``. about: what the
    measurement holds for (devices, numbers, pair)."""
    if asked != "auto":
        why = f"hide_prefill={asked} was asked for"
        return {"asked": asked, "hide_prefill": asked == "yes", "overlap": "threads", "why": why}
    held = {**about, "n_drafts": n_drafts}
    if path.is_file():
        kept = files.read_json(path, ParameterError, "delete it to measure again")
        if isinstance(kept, dict) and kept.get("about") == held:
            return kept["found"]
    ms = _ms(prefill_overlap(verifier, proposer, sample, n_drafts=n_drafts))
    at_once, in_turn = float(ms[AT_ONCE]), float(ms[SERIAL])
    pays = at_once < in_turn
    found = {
        "asked": asked, "hide_prefill": pays, "overlap": "threads" if pays else "serial",
        "at_once_ms": at_once, "in_turn_ms": in_turn,
        "why": f"the verifier's prefill and the drafter's with {n_drafts} drafts take "
               f"{at_once:.1f} ms at once and {in_turn:.1f} ms one after the other on this machine"
               f", so drafting behind the prefill {'pays' if pays else 'does not pay'}"}
    files.write_json(path, {"about": held, "found": found})
    return found


def hidden_share(lanes: pd.DataFrame) -> float:
    """How much of the shorter lane of :func:`prefill_overlap` disappears: 1 is ideal, 0 saves
    nothing, below 0 the lanes hinder each other more than they help."""
    ms = lanes.set_index("what")["ms"]
    return float((ms[SERIAL] - ms[AT_ONCE]) / min(ms[lane] for lane in LANES))


def table(*parts: pd.DataFrame) -> pd.DataFrame:
    """All that was measured in one table, also in units of one verifier step."""
    rows = pd.concat(parts, ignore_index=True)[["what", "ms", "low", "high"]]
    rows = rows.astype({"ms": float, "low": float, "high": float})
    return rows.assign(**{"verifier steps": rows["ms"] / _ms(rows)["verifier_step"]})


def prices(curve: pd.DataFrame, steps: pd.DataFrame, *, drafter: bool = True,
           level: str = "", block: bool = False) -> Prices:
    """Medians of :func:`verification_curve` and :func:`step_costs`, for drafts of the drafter's
    model (or none of its) and of an adapter's level (or none). block: once a round, whatever it
    drafts."""
    s = _ms(steps) / 1e3
    own_s = (s["drafter_step"] if drafter else 0.0) + (s[f"adapter {level}"] if level else 0.0)
    return Prices(float(s["verifier_prefill"]), float(s["drafter_prefill"]) if drafter else 0.0,
                  0.0 if block else float(own_s),
                  dict(zip(curve["rows"], curve["ms"] / 1e3, strict=True)),
                  round_s=float(own_s) if block else 0.0)


def prices_of(name: str, curve: pd.DataFrame, steps: pd.DataFrame,
              adapters: Mapping[str, proposers.Adapter]) -> Prices:
    """:func:`prices` of an arm by name; of several models that draft, the first's."""
    kinds = kinds_of(name)
    level = next((kind for kind in kinds if kind in adapters), "")
    drafter = adapters[level].reads != "verifier" if level else "drafter" in kinds
    block = bool(level and getattr(adapters[level], "context_layers", None))
    return prices(curve, steps, drafter=drafter, level=level, block=block)


def pricing(pair: Any, adapters: Mapping[str, proposers.Adapter],
            samples: Mapping[str, Sequence[Any]]) -> Callable[[str], Prices]:
    """:func:`prices_of` arms of these models, measured on the first sample once it is asked for."""
    @functools.cache
    def measured() -> tuple[pd.DataFrame, pd.DataFrame]:
        sample = next(iter(samples.values()))[0]
        return (verification_curve(pair.verifier, sample, rows=(1, 2, 4, 8, 16, 32, 65)),
                step_costs(pair.drafter, pair.verifier, adapters, sample))

    return lambda name: prices_of(name, *measured(), adapters)


def stored_prices(known: Mapping[str, Mapping[str, float]], **options: Any) -> Prices:
    """The prices of stored costs, ``results/live.json``'s. options: as :func:`prices`."""
    steps = pd.DataFrame.from_dict(known, orient="index").rename_axis("what").reset_index()
    curve = steps[steps["what"].str.fullmatch(r"verify \d+")]
    return prices(curve.assign(rows=curve["what"].str.split().str[1].astype(int)), steps, **options)


def _ms(rows: pd.DataFrame) -> pd.Series:
    return rows.set_index("what")["ms"]


def predict(records: Sequence[Mapping[str, Any]], price: Prices,
            eos_token_ids: frozenset[int]) -> dict[str, float]:
    """One arm's records priced by what the parts cost: predicted_s, measured_s, residual (measured
    / predicted − 1), and the parts of the prediction prefill_s, draft_s, verify_s. Raises:
    ParameterError where records hold no rounds (an autoregressive arm), or without records."""
    if not records or not all(record["rounds"] for record in records):
        raise ParameterError("a prediction needs records with rounds; choose an arm that drafts")
    rounds = []
    for record in records:
        for row in record["rounds"]:
            drafted, hiding = row["drafted"], row["phase"] == "prefill_hiding"
            if "parents" in row:
                drafted = trees.Tree(tuple(drafted), tuple(row["parents"]))
            fed, _ = speculative.rows_to_feed(drafted, record["ids"][0], eos_token_ids, hiding)
            rows = len(fed)
            rounds.append(replay.ReplayedRound(len(drafted), row["accepted"],
                                               row["bonus"] is not None, rows, hiding))
    predicted = replay.predicted_seconds(rounds, price)
    measured = sum(record["total_s"] for record in records)
    drafting = sum(each.n_drafted * price.draft_s + (price.round_s if each.n_drafted else 0.0)
                   for each in rounds if not each.hiding)
    verifying = sum(price.verify_s(each.rows) for each in rounds if each.rows)
    return {"predicted_s": predicted, "measured_s": measured,
            "residual": measured / predicted - 1, "prefill_s": predicted - drafting - verifying,
            "draft_s": drafting, "verify_s": verifying}


def predictions(records: Sequence[Mapping[str, Any]], curve: pd.DataFrame, steps: pd.DataFrame,
                adapters: Mapping[str, proposers.Adapter],
                eos_token_ids: frozenset[int]) -> pd.DataFrame:
    """What the rounds of each arm with one proposer of ours should take at the measured prices,
    beside what they took: arm, predicted_ms and measured_ms of an answer, residual, the shares
    of prefill, draft and verify in the prediction, the arm's own prices and its widest round."""
    rows = []
    for name in dict.fromkeys(record["arm"] for record in records):
        own = [record for record in records if record["arm"] == name and record["rounds"]]
        kind, nodes = files.name_of(parts_of(name)[0]), parts_of(name)[3]
        if not own or nodes or "@1f" in name or kind not in (*PLAIN, *adapters):
            continue
        price = prices_of(name, curve, steps, adapters)
        told = predict(own, price, eos_token_ids)
        drafts = [len(row["drafted"]) for record in own for row in record["rounds"]
                  if row["phase"] != "prefill_hiding"]
        rows.append({"arm": label_of(name), **{
            f"{word}_ms": 1e3 * told[f"{word}_s"] / len(own) for word in ("predicted", "measured")},
            "residual": told["residual"],
            **{part: told[f"{part}_s"] / told["predicted_s"] for part in PARTS},
            **{f"{one}_ms": 1e3 * getattr(price, f"{one}_s") for one in PRICES},
            "gamma": max(drafts, default=0)})
    return pd.DataFrame(rows, columns=["arm", "predicted_ms", "measured_ms", "residual", *PARTS,
                                       *(f"{one}_ms" for one in PRICES), "gamma"])
