"""torch.compile around the model, in the model, or around the whole module: the same run as without."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from lightning_compress import load, plan_of, save_pretrained
from lightning_compress.callbacks import SoftThresholdRank
from lightning_compress.nn.soft_threshold_rank import LowRankLinear, SoftThresholdLinear
from tests.toys import ToyModule, tiny_bert, toy_loader, toy_trainer

# torch says this while it captures the part of a step that follows a graph break, such as self.log
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor")

BACKEND = "eager"  # captures graphs like inductor, and runs them as they are
SMALL = {"num_hidden_layers": 1}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Wrapped(ToyModule):
    def _build(self) -> None:
        self.model = torch.compile(tiny_bert(**self.overrides), backend=BACKEND)  # type: ignore[assignment]


class InPlace(ToyModule):
    def _build(self) -> None:
        self.model = tiny_bert(**self.overrides)
        self.model.compile(backend=BACKEND)


def fit(module: ToyModule, compile_module: bool = False) -> ToyModule:
    trainer = toy_trainer(callbacks=[SoftThresholdRank(target_params=0.5, rank_multiple=4)], max_steps=8)
    trainer.fit(torch.compile(module, backend=BACKEND) if compile_module else module, toy_loader())
    return module


def weights(module: ToyModule) -> dict[str, torch.Tensor]:
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in module.state_dict().items()}


@pytest.fixture(scope="module")
def eager() -> dict[str, torch.Tensor]:
    return weights(fit(ToyModule(**SMALL)))


@pytest.mark.parametrize(
    ("kind", "compile_module"),
    [(Wrapped, False), (InPlace, False), (ToyModule, True)],
    ids=["compiled model", "model.compile()", "compiled module"],
)
def test_a_compiled_run_ends_as_the_eager_one_and_can_be_saved(
    kind: type[ToyModule], compile_module: bool, eager: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    counters.clear()
    module = fit(kind(**SMALL), compile_module)
    if not compile_module:  # a compiled step breaks at self.log
        assert dict(counters["graph_break"]) == {}
        assert counters["stats"]["unique_graphs"] <= 4  # one for each phase, one more by transformers itself
    assert type(module) is kind
    assert not any(isinstance(value, partial) for value in vars(module).values())
    assert not any(isinstance(m, SoftThresholdLinear) for m in module.modules())
    assert sum(isinstance(m, LowRankLinear) for m in module.modules()) > 0
    compiled = weights(module)
    assert compiled.keys() == eager.keys()
    assert all(torch.allclose(compiled[name], eager[name], atol=1e-3) for name in eager)
    batch = next(iter(toy_loader()))
    plan = plan_of(module)
    assert plan is not None and not any("_orig_mod" in path for path in plan.methods[0].structure["ranks"])
    again = load(save_pretrained(module, tmp_path / "model"))
    with torch.no_grad():
        logits = module.eval().model(batch["input_ids"]).logits
        assert torch.allclose(again(batch["input_ids"]).logits, logits, atol=1e-6)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_converted_model_compiles_to_equal_outputs(backend: str) -> None:
    model: Any = fit(ToyModule(**SMALL)).model.eval()
    batch = next(iter(toy_loader()))
    with torch.no_grad():
        expected = model(batch["input_ids"]).logits
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        assert torch.allclose(compiled(batch["input_ids"]).logits, expected, atol=1e-5)
