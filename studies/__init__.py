"""The machinery of notebooks 00 and 10 to 13, and the recipe of the shipped pair. Scripts over xsd,
no part of it."""
