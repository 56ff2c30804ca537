"""What every test shares: one torch thread a worker, no hub, and hypothesis without chance. Set
before anything heavy is imported."""

import os

from hypothesis import settings

for name, value in {
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1",
}.items():
    os.environ.setdefault(name, value)

settings.register_profile("house", derandomize=True, deadline=None, database=None)
settings.load_profile("house")
