"""The ``xsd`` command. Everything heavy is imported inside the verb that needs it."""


def main(argv: list[str] | None = None) -> int:
    """Run one verb and return its exit status (:func:`xsd.cli.door.main`)."""
    from xsd.cli import door

    return door.main(argv)
