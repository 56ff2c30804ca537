"""What a researcher's own module may look like; named in tests as my_levels:…"""

import torch
from torch import nn


class Mine(nn.Module):
    """Plain, reads the drafter, position by position."""

    reads, shift = "drafter", 0

    def __init__(self, hidden_size, drafter_size, width=8):
        super().__init__()
        self.input_map = nn.Linear(drafter_size, hidden_size)
        self.enter, self.leave = nn.Linear(hidden_size, width), nn.Linear(width, hidden_size)

    def forward(self, drafter):
        x = self.input_map(drafter)
        return x + self.leave(torch.tanh(self.enter(x)))


class Next(nn.Module):
    """Plain, reads both models and says the verifier's next state; causal by a running mean."""

    reads, shift = "both", 1

    def __init__(self, hidden_size, drafter_size):
        super().__init__()
        self.map = nn.Linear(drafter_size + 2 * hidden_size, hidden_size)

    def forward(self, drafter, verifier):
        count = torch.arange(1, verifier.shape[1] + 1, device=verifier.device)[:, None]
        mean = verifier.cumsum(1) / count
        return verifier + self.map(torch.cat([drafter, verifier, mean], dim=-1))


class Peeks(Mine):
    """Looks at the whole answer."""

    def forward(self, drafter):
        return super().forward(drafter) + drafter.mean(1, keepdim=True).sum(-1, keepdim=True)


class Frozen(Mine):
    """Nothing to learn reaches it."""

    def forward(self, drafter):
        with torch.no_grad():
            return super().forward(drafter)


class Forgets(Mine):
    """What it multiplies by is in no file."""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.factor = float(torch.rand(()))

    def forward(self, drafter):
        return self.factor * super().forward(drafter)


class Narrow(Mine):
    """One number too few."""

    def forward(self, drafter):
        return super().forward(drafter)[..., 1:]


class Shifted(Mine):
    """Would see what it is to predict."""

    reads, shift = "verifier", 0
