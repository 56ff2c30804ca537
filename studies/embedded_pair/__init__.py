"""How the shipped pair was trained: corpus, stages, card (`xsd pair`, notebook 00)."""
