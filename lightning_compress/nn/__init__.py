"""The parts compressed models are made of, and the tools to find, replace and count them."""

from lightning_compress.nn.anatomy import Anatomy, describe, find_transformer
from lightning_compress.nn.flops import FlopsCount, ParameterCount, count_flops, count_parameters
from lightning_compress.nn.tape import Tape

__all__ = [
    "Anatomy",
    "FlopsCount",
    "ParameterCount",
    "Tape",
    "count_flops",
    "count_parameters",
    "describe",
    "find_transformer",
]
