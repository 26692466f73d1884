"""Plain Lightning modules for the command line, the demo and the tests; they know nothing of compression."""

from lightning_compress.tasks.causal_language_model import CausalLanguageModel
from lightning_compress.tasks.text_classifier import TextClassifier

__all__ = ["CausalLanguageModel", "TextClassifier"]
