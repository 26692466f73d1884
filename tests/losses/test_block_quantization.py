from __future__ import annotations

import torch

from lightning_compress.losses.block_quantization import BlockQuantizationLossMixin, terms


class Module(BlockQuantizationLossMixin):
    def __init__(self, source: object) -> None:
        self._compression = source


class Source:
    def __init__(self) -> None:
        self.compressor, self.asked = self, []

    def take_loss_terms(self, stem: str | None = None) -> dict[str, torch.Tensor]:
        self.asked.append(stem)
        return {}


def test_rounding_has_no_term_of_its_own() -> None:
    assert terms(object()) == {}
    source = Source()
    assert Module(source).rounding_loss() == 0.0 and source.asked == ["block_quantization"]
