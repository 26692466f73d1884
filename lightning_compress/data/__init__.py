"""Data modules for the command line, the demo and the tests; they know nothing of compression."""

from lightning_compress.data.language_modeling import LanguageModelingData
from lightning_compress.data.resumable import ResumableDataLoader
from lightning_compress.data.sampling import LengthBucketedSampler
from lightning_compress.data.text_classification import TextClassificationData

__all__ = ["LanguageModelingData", "LengthBucketedSampler", "ResumableDataLoader", "TextClassificationData"]
