"""Load: a transformers quantizer that rebuilds the compressed structure before the weights are read.

Importing this module registers the quantizer, after which ``AutoModelFor….from_pretrained``, ``pipeline`` and
:func:`load` open compressed models; Lightning is not needed. The counterpart is
:mod:`lightning_compress.deploy.save`.

Only that part of the quantizer interface is used that is the same in all supported releases of transformers:
the hooks before and after weight loading, ``is_serializable``, ``is_trainable`` and the two registration
decorators.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
import transformers
from transformers import PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from lightning_compress.deploy.skeleton import (
    Root,
    check_checkpoint,
    require_converted,
    restore_structure,
    spare_from_initialising,
    tensor_shapes,
)
from lightning_compress.methods.block_quantization import BlockQuantizationConfig
from lightning_compress.plan import CompressionPlan, PlanError
from lightning_compress.runtime.backends import check_backend, use_backend
from lightning_compress.runtime.engine_timing import BackendReport

__all__ = ["QUANT_METHOD", "CompressionConfig", "CompressionQuantizer", "load", "register"]

QUANT_METHOD = "lightning_compress"

logger = logging.get_logger(__name__)


class CompressionConfig(QuantizationConfigMixin):
    """The ``quantization_config`` entry of a compressed model's ``config.json``.

    Args:
        plan: The plan as plain data; validated here, before anything is built.
        root: What the paths in the plan start from; the model itself unless only a base model was saved.
        quant_method: Always ``"lightning_compress"``.
        **unknown: Nothing else is accepted.

    Raises:
        PlanError: If the plan or one of the other fields cannot be read by this release.
    """

    quant_method: str  # type: ignore[assignment]
    plan: dict[str, Any]
    root: Root

    def __init__(
        self, plan: Mapping[str, Any], root: Root = "model", quant_method: str = QUANT_METHOD, **unknown: Any
    ) -> None:
        if unknown:
            raise PlanError(f"quantization_config has unknown fields {sorted(unknown)}: save the model again")
        if root not in get_args(Root):
            raise PlanError(f"quantization_config field 'root' is {root!r}, allowed are {get_args(Root)}")
        if quant_method != QUANT_METHOD:
            raise PlanError(f"quantization_config has quant_method {quant_method!r}, not {QUANT_METHOD!r}")
        self.quant_method = quant_method
        self.root = root
        self.plan = CompressionPlan.from_dict(plan).to_dict()


class CompressionQuantizer(HfQuantizer):
    """Rebuilds the plan's structure on the skeleton that ``from_pretrained`` is about to fill with weights.

    A compressed model is otherwise a plain model: it can be cast, trained, compiled and saved, so whatever
    marks it as quantised is taken off again after loading.
    """

    quantization_config: CompressionConfig

    @property
    def compression_plan(self) -> CompressionPlan:
        """The plan, validated."""
        return CompressionPlan.from_dict(self.quantization_config.plan)

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to compress a dense checkpoint on the fly, and plans still in training form."""
        if not self.pre_quantized:
            raise ValueError(
                "this checkpoint is dense: from_pretrained can open a compressed model but not compress one; "
                "train it with a compression callback, then save it with lightning_compress.save_pretrained"
            )
        require_converted(self.compression_plan)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        """Restore the structure on the skeleton and compare it with the headers of the weight files."""
        before, modules, files = tensor_shapes(model), set(model.modules()), kwargs.get("checkpoint_files")
        restore_structure(model, self.compression_plan, self.quantization_config.root)
        check_checkpoint(model, before, files)
        spare_from_initialising(model, modules, files)
        self._frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        # From here the files hold exactly what the skeleton asks for. As a "pre-quantised" load, releases
        # before 5.23 would keep the stored dtype of tensors whose name gains or loses the base model's
        # prefix.
        self.pre_quantized = False
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        """Take the marks of a quantised model off: they forbid casts and training. What was frozen stays frozen."""
        self.pre_quantized = True
        for name in self._frozen:
            model.get_parameter(name).requires_grad_(False)
        mark_as_plain(model)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Whether ``model.save_pretrained`` may write the model: not while it is in training form."""
        if not self.compression_plan.is_converted:
            logger.warning("The model is in training form: call lightning_compress.convert(module) first.")
        return self.compression_plan.is_converted

    @property
    def is_trainable(self) -> bool:
        """Fine-tuning goes on as for any model."""
        return True

    @property
    def is_compileable(self) -> bool:
        """``generate`` may compile the model."""
        return True

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        raise ValueError("compression removed weights for good: load the dense model instead")


def mark_as_plain(model: PreTrainedModel) -> None:
    """Remove the attributes by which transformers tells a quantised model from a plain one."""
    model.is_quantized = False  # type: ignore[assignment]
    vars(model).pop("quantization_method", None)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            vars(module.config).pop("_is_quantized", None)


def register() -> None:
    """Make transformers know compressed models; calling it again (a reloaded module) changes nothing.

    Raises:
        RuntimeError: If another package has taken the name.
    """
    for known, enter, ours in (
        (AUTO_QUANTIZATION_CONFIG_MAPPING, register_quantization_config, CompressionConfig),
        (AUTO_QUANTIZER_MAPPING, register_quantizer, CompressionQuantizer),
    ):
        taken = known.get(QUANT_METHOD)
        if taken is not None and taken.__qualname__ != ours.__qualname__:
            raise RuntimeError(f"quant_method {QUANT_METHOD!r} is already registered by {taken.__module__}")
        known.pop(QUANT_METHOD, None)
        enter(QUANT_METHOD)(ours)


def load(
    directory: str | Path,
    *,
    device: str | torch.device | None = None,
    backend: str | Mapping[str, str] | BackendReport | None = None,
    **from_pretrained_kwargs: Any,
) -> PreTrainedModel:
    """Open a compressed model with the class it was saved from, in evaluation mode.

    Args:
        directory: Folder written by :func:`lightning_compress.save_pretrained` or by the ``save_pretrained``
            of a compressed model.
        device: Where to put the model; the CPU by default.
        backend: What computes quantised linears there, as :func:`lightning_compress.use_backend` takes it: ``"auto"``
            measures which is fastest for each shape, and prints it. By default the reference computes them.
        **from_pretrained_kwargs: Passed on to ``from_pretrained``, e.g. ``dtype=torch.bfloat16``.

    Raises:
        ValueError: If the folder is not a model, was not compressed by this library, names a class that
            transformers does not have, or lacks weights; if a backend is named that is none or cannot compute a
            layer, or the model has no quantised linear.
        PlanError: If the plan cannot be used by this release or does not fit the model.
    """
    folder = Path(directory)
    config = _read_config(folder)
    if backend is not None:
        check_backend(backend)
        _check_quantized(config["quantization_config"]["plan"], folder)
    model_class = _model_class(config.get("architectures"), folder)
    from_pretrained_kwargs["use_safetensors"] = True
    loaded: Any = model_class.from_pretrained(
        folder, output_loading_info=True, local_files_only=True, **from_pretrained_kwargs
    )
    model, info = loaded
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])[:5]
        raise ValueError(f"{folder} lacks the weights {missing}: save the model again")
    model = model if device is None else model.to(device)
    if backend is not None:
        use_backend(model, backend)
    return model


def _check_quantized(plan: Mapping[str, Any], folder: Path) -> None:
    records = (record for record in plan["methods"] if record["method"] == BlockQuantizationConfig.stem)
    if not any(record["structure"].get("linears") for record in records):
        raise ValueError(
            f"{folder} has no quantised linear, and only these have backends: leave backend out, or call "
            "lightning_compress.quantize(model, ...) first"
        )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        reason = "there is no such folder" if not folder.is_dir() else "it has no config.json"
        raise ValueError(
            f"{folder} is not a model directory: {reason}. Pass a folder written by "
            "lightning_compress.save_pretrained; models on the hub open with AutoModelFor….from_pretrained"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}): save the model again") from error
    entry = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(entry, dict) or entry.get("quant_method") != QUANT_METHOD:
        raise ValueError(
            f"{folder} was not compressed by lightning_compress (its config.json has no plan): open it with "
            "transformers' AutoModelFor….from_pretrained"
        )
    if "plan" not in entry:
        raise PlanError(f"{path}: quantization_config has no 'plan': save the model again")
    CompressionConfig.from_dict(entry)
    return config


def _model_class(architectures: Any, folder: Path) -> type[PreTrainedModel]:
    name = architectures[0] if isinstance(architectures, list) and len(architectures) == 1 else None
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise ValueError(
            f"{folder}/config.json names the architectures {architectures!r}, of which transformers "
            f"{transformers.__version__} has no model class: call YourModel.from_pretrained on the folder "
            "instead"
        )
    return found


register()
