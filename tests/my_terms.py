"""A term of an objective as a researcher writes it; named in tests as my_terms:apart."""


def apart(aligned, target, ids, head=None, weights=None):
    """Mean absolute difference."""
    return (aligned - target).abs().mean()
