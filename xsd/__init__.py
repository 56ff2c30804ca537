"""xsd: the workbench for cross-modal speculative decoding. Import the module you need; nothing
heavy happens here."""

__version__ = "0.1.0"
