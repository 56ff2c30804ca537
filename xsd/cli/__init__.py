"""The ``xsd`` command. Everything heavy is imported inside the verb that needs it."""


def main(argv: list[str] | None = None) -> int:
    """Run one verb and return its exit status.

    0: done; 1: problems found; 2: a mistake of the user's, with one sentence on stderr;
    130: interrupted. argv: without the program's name; by default the command line.
    """
    from xsd.cli import app

    return app.run(argv)
