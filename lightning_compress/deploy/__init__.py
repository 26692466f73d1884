"""What is kept: a folder with safetensors and JSON that transformers opens once this package is imported."""

from lightning_compress.deploy.load import load
from lightning_compress.deploy.model_card import disk_bytes, model_card
from lightning_compress.deploy.quantize import quantize
from lightning_compress.deploy.save import attach_plan, detach_plan, plan_of, save_pretrained

__all__ = [
    "attach_plan",
    "detach_plan",
    "disk_bytes",
    "load",
    "model_card",
    "plan_of",
    "quantize",
    "save_pretrained",
]
