"""Small paired answers with something to learn: a token chain, the verifier's states made from it,
the drafter's a noisy rotation."""

import torch

from xsd.core import PairedStates

WIDTH, VOCABULARY = 16, 24


def head(seed: int = 0) -> torch.Tensor:
    """An LM head, float32 [V, D], rows of length 2."""
    g = torch.Generator().manual_seed(seed)
    return 2 * torch.nn.functional.normalize(torch.randn(VOCABULARY, WIDTH, generator=g), dim=-1)


def answers(n: int = 40, *, n_sequences: int = 5, drafter_size: int = WIDTH, split: str = "train",
            seed: int = 0) -> list[PairedStates]:
    """n answers of 3…9 tokens. Token t+1 follows token t by a fixed table, except for a word that
    only the start decides."""
    g = torch.Generator().manual_seed(seed)
    weight = head()
    table = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(7))
    turn = torch.linalg.qr(
        torch.randn(max(WIDTH, drafter_size), WIDTH,
                    generator=torch.Generator().manual_seed(8)))[0][:drafter_size]
    result = []
    for index in range(n):
        length = int(torch.randint(3, 10, (1,), generator=g))
        ids = [int(torch.randint(VOCABULARY, (1,), generator=g))]
        while len(ids) < length:
            ids.append(int(table[ids[-1]]))
        verifier = 3 * weight[ids] + 0.2 * torch.randn(length, WIDTH, generator=g)
        drafter = verifier @ turn.T + 0.1 * torch.randn(length, drafter_size, generator=g)
        tokens = (verifier @ weight.T).argmax(-1)
        result.append(
            PairedStates(f"s{index % n_sequences}", f"{index:06d}", "What?", drafter, verifier,
                         tokens, tokens, "teacher_forced", split=split))
    return result
