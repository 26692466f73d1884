"""Tiny models of every family."""

from tests.nn.conftest import tiny

__all__ = ["tiny"]
