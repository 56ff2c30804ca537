"""Live comparison of arms on two loaded models: interleaved measuring, summaries with intervals,
the cost of every part."""
