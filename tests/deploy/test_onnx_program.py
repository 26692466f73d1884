from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertForSequenceClassification

import lightning_compress
from lightning_compress.deploy.onnx_program import OnnxProgram, forget_sources, to_onnx
from lightning_compress.runtime.static import make_static
from tests.toys import tiny_bert

SIZES: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


@pytest.fixture(scope="module")
def graph_model() -> Any:
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name, reason="the extra `onnx` is not installed")
    program = OnnxProgram(make_static(tiny_bert(num_hidden_layers=1))).eval()
    return to_onnx(program, program.example(3, 8), {0: torch.export.Dim("batch")})


def test_inputs_and_output_are_named_as_transformers_names_them():
    bert = OnnxProgram(tiny_bert())
    assert bert.names == ("input_ids", "attention_mask", "token_type_ids")
    assert bert.output == "logits"
    base = OnnxProgram(BertModel(BertConfig(**SIZES, num_hidden_layers=1, type_vocab_size=1)))
    assert base.names == ("input_ids", "attention_mask")
    assert base.output == "last_hidden_state"
    config = DistilBertConfig(vocab_size=20, dim=8, n_layers=1, n_heads=2, hidden_dim=16)
    distilled = OnnxProgram(torch.nn.Sequential(DistilBertForSequenceClassification(config)))
    assert distilled.names == ("input_ids", "attention_mask")


@torch.no_grad()
def test_the_program_is_the_model():
    model = tiny_bert(initializer_range=0.3).eval()
    program = OnnxProgram(model)
    ids, mask, segments = program.example(4, 9)
    expected = model(input_ids=ids, attention_mask=mask, token_type_ids=segments).logits
    assert torch.equal(program(ids, mask, segments), expected)


def test_examples_are_ragged_and_the_first_is_full():
    ids, mask, segments = OnnxProgram(tiny_bert()).example(5, 9)
    lengths = mask.sum(1).tolist()
    assert lengths[0] == 9
    assert min(lengths) >= 2
    assert len(set(lengths)) > 1
    assert (ids[mask == 0] == 0).all()
    assert segments.shape == ids.shape


def test_attention_has_no_guards_and_hides_once_for_all_heads(graph_model):
    nodes = [node.op_type for node in graph_model.graph.node]
    assert "IsNaN" not in nodes
    assert nodes.count("Softmax") == 1
    assert nodes.count("Where") == 1


def test_the_names_of_the_graph_are_the_programs(graph_model):
    graph = graph_model.graph
    assert [entry.name for entry in graph.input] == ["input_ids", "attention_mask", "token_type_ids"]
    assert [entry.name for entry in graph.output] == ["logits"]
    batch, length = graph.input[0].type.tensor_type.shape.dim
    assert batch.dim_param
    assert length.dim_value == 8


def test_no_path_of_this_machine_is_left(graph_model):
    here = str(Path(lightning_compress.__file__).parent).encode()
    assert here in graph_model.SerializeToString()
    forget_sources(graph_model)
    assert here not in graph_model.SerializeToString()
