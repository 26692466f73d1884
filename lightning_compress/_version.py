"""The version of this package, written here and nowhere else (the build reads it from this file)."""

__all__ = ["__version__"]

__version__ = "0.1.0"
