import copy
import gc
import io
import weakref
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_compress.nn.tape import ExitLogits, HiddenStates, Tape, TokensKept


class Scribe(nn.Module):
    """A layer that records what it puts out."""

    def __init__(self, tape: Tape, layer: int) -> None:
        super().__init__()
        self.tape, self.layer = tape, layer
        self.linear = nn.Linear(3, 3)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        hidden_BTD = self.linear(hidden_BTD)
        self.tape.write(HiddenStates(self.layer, hidden_BTD))
        return hidden_BTD


class Replayed(nn.Sequential):
    def forward(self, hidden_BTD: Tensor) -> Tensor:
        for layer in self:
            hidden_BTD = checkpoint(layer, hidden_BTD, use_reentrant=False)
        return hidden_BTD


def build(kind: type[nn.Sequential] = nn.Sequential) -> tuple[nn.Sequential, Tape]:
    tape = Tape()
    model = kind(Scribe(tape, 0), Scribe(tape, 1))
    return model, tape.attach(model)


def test_records_are_read_by_type_in_the_order_written():
    model, tape = build()
    out = model(torch.ones(1, 2, 3))
    tape.write(TokensKept(1, torch.ones(1, 2)))
    records = tape.read(HiddenStates)
    assert [record.layer for record in records] == [0, 1]
    assert records[1].hidden_BTD is out
    assert [record.layer for record in tape.read(TokensKept)] == [1]


def test_the_list_read_is_the_readers_own():
    model, tape = build()
    model(torch.ones(1, 2, 3))
    tape.read(HiddenStates).clear()
    assert len(tape.read(HiddenStates)) == 2


def test_reading_what_nobody_wrote_is_an_error_that_names_the_type_and_what_there_is():
    model, tape = build()
    with pytest.raises(LookupError, match=r"no layer wrote ExitLogits .*written: nothing"):
        tape.read(ExitLogits)
    model(torch.ones(1, 2, 3))
    with pytest.raises(LookupError, match=r"no layer wrote ExitLogits .*written: HiddenStates"):
        tape.read(ExitLogits)


def test_each_forward_of_the_root_starts_with_an_empty_tape():
    model, tape = build()
    model(torch.ones(1, 2, 3))
    second = model(torch.zeros(1, 2, 3))
    assert len(tape.read(HiddenStates)) == 2
    assert tape.read(HiddenStates)[1].hidden_BTD is second


def test_the_tape_is_cleared_before_other_hooks_of_the_root_write():
    model, tape = build()
    model.register_forward_pre_hook(
        lambda module, args: tape.write(TokensKept(0, torch.ones(1, 2))), prepend=False
    )
    model(torch.ones(1, 2, 3))
    assert len(tape.read(TokensKept)) == 1


def test_layers_replayed_by_checkpointing_do_not_reach_into_the_next_forward():
    model, tape = build(Replayed)
    model(torch.ones(1, 2, 3)).sum().backward()
    model(torch.ones(1, 2, 3))
    assert len(tape.read(HiddenStates)) == 2


def test_gradients_flow_through_what_was_read():
    model, tape = build()
    model(torch.ones(1, 2, 3))
    tape.read(HiddenStates)[0].hidden_BTD.sum().backward()
    assert model[0].linear.weight.grad is not None
    assert model[1].linear.weight.grad is None


def test_detaching_removes_the_hook_and_forgets_the_records():
    model, tape = build()
    model(torch.ones(1, 2, 3))
    tape.detach()
    assert not tape.is_attached
    assert len(model._forward_pre_hooks) == 0
    with pytest.raises(LookupError):
        tape.read(HiddenStates)
    tape.detach()
    assert tape.attach(model).is_attached


def test_a_tape_belongs_to_one_model():
    model, tape = build()
    with pytest.raises(ValueError, match=r"attached to a model already: call detach"):
        tape.attach(model)


def test_a_deep_copy_of_the_model_has_an_attached_tape_of_its_own():
    model, tape = build()
    model(torch.ones(1, 2, 3))
    twin = copy.deepcopy(model)
    assert twin[0].tape is twin[1].tape is not tape
    for _ in range(2):
        twin(torch.zeros(1, 2, 3))
    assert len(twin[0].tape.read(HiddenStates)) == 2
    assert tape.read(HiddenStates)[0].hidden_BTD.requires_grad
    twin[0].tape.detach()
    assert len(twin._forward_pre_hooks) == 0
    assert tape.is_attached
    assert len(model._forward_pre_hooks) == 1


def test_a_deep_copy_of_a_lone_layer_leaves_the_model_behind():
    model, _ = build()
    layer = copy.deepcopy(model[0])
    assert not layer.tape.is_attached
    layer(torch.ones(1, 2, 3))
    assert len(layer.tape.read(HiddenStates)) == 1


def test_a_pickled_model_comes_back_with_an_empty_attached_tape():
    model, _ = build()
    model(torch.ones(1, 2, 3))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    twin = torch.load(buffer, weights_only=False)
    for _ in range(2):
        twin(torch.ones(1, 2, 3))
    assert twin[0].tape is twin[1].tape
    assert len(twin[0].tape.read(HiddenStates)) == 2
    twin[0].tape.detach()
    assert len(twin._forward_pre_hooks) == 0


def test_the_tape_does_not_keep_a_model_alive():
    tape = Tape()
    model = nn.Linear(2, 2)
    tape.attach(model)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    tape.detach()
    assert not tape.is_attached


def test_only_frozen_dataclasses_are_records():
    @dataclass
    class Loose:
        layer: int

    tape = Tape()
    for record in (Loose(0), {"layer": 0}, HiddenStates):
        with pytest.raises(TypeError, match="instance of a frozen dataclass"):
            tape.write(record)


def test_a_user_may_write_records_of_his_own():
    @dataclass(frozen=True)
    class Norm:
        layer: int

    tape = Tape()
    tape.write(Norm(3))
    assert tape.read(Norm) == [Norm(3)]
