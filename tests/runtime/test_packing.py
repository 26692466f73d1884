import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSequenceClassification, BertPreTrainedModel

from lightning_compress.nn.anatomy import describe
from lightning_compress.nn.operator_formats import preset
from lightning_compress.nn.quantization_plan import quantize_model
from lightning_compress.runtime.encoder import PackedEncoder
from lightning_compress.runtime.packing import is_packed, pack, packed_encoder, unpack
from tests.runtime.conftest import FAMILIES, HalfPolicy, ragged

EACH_FAMILY = pytest.mark.parametrize("family", FAMILIES)


@EACH_FAMILY
def test_packing_is_in_place_keeps_every_name_and_unpacking_undoes_it(classifier, family):
    model = classifier(family)
    names, parameters = list(model.state_dict()), list(model.parameters())
    own = type(model.get_submodule(describe(model).encoder))
    assert not is_packed(model)
    assert pack(model) is model
    assert is_packed(model)
    assert isinstance(model.get_submodule(describe(model).encoder), PackedEncoder)
    assert list(model.state_dict()) == names
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert unpack(model) is model
    assert not is_packed(model)
    assert type(model.get_submodule(describe(model).encoder)) is own
    assert list(model.state_dict()) == names


@EACH_FAMILY
def test_a_model_quantised_throughout_gives_the_same_packed(classifier, family):
    model, batch = classifier(family, initializer_range=0.1).float(), ragged([4, 7, 1])
    quantize_model(model, preset("w8a8", factor="shift", operators="all"))
    with torch.no_grad():
        padded = model(**batch).logits
        packed = pack(model)(**batch).logits
        singles = [model(**ragged_row(batch, row)).logits for row in range(3)]
    torch.testing.assert_close(packed, padded, rtol=0.0, atol=1e-5)
    torch.testing.assert_close(torch.cat(singles), packed, rtol=0.0, atol=1e-5)


def ragged_row(batch: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    length = int(batch["attention_mask"][row].sum())
    return {name: values[row : row + 1, :length] for name, values in batch.items()}


def test_packing_twice_is_packing_once_and_unpacking_what_is_not_packed_does_nothing(classifier):
    model = classifier("bert")
    unpack(model)
    encoder = packed_encoder(pack(model))
    assert packed_encoder(pack(model)) is encoder
    assert packed_encoder(unpack(model)) is None


def test_the_mode_is_carried_over_both_ways(classifier):
    model = classifier("bert").train()
    model.bert.encoder.layer[0].eval()  # frozen, as fine-tuning of the upper layers leaves it
    assert packed_encoder(pack(model)).training
    assert [layer.training for layer in model.bert.encoder.layer] == [False, True]
    assert unpack(model).bert.encoder.training
    assert [layer.training for layer in model.bert.encoder.layer] == [False, True]
    pack(model).eval()
    assert not unpack(model).bert.encoder.training


@EACH_FAMILY
@pytest.mark.parametrize("drops", [False, True])
def test_what_a_packed_model_saves_is_complete_and_opens_as_a_plain_one(classifier, family, drops, tmp_path):
    model, batch = classifier(family).float(), ragged([4, 7])
    state = {name: value.clone() for name, value in model.state_dict().items()}
    pack(model)
    if drops:
        packed_encoder(model).policy = HalfPolicy()
    with torch.inference_mode():
        model(**batch)  # query, key and value now share a storage
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    own = {name: value for name, value in saved.items() if "policy" not in name}
    assert own.keys() == state.keys()
    assert all(torch.equal(own[name], state[name]) for name in state)
    if not drops:
        reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
        assert not is_packed(reloaded)
        with torch.inference_mode():
            torch.testing.assert_close(reloaded(**batch).logits, model(**batch).logits, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(pack(reloaded)(**batch).logits, model(**batch).logits)


def test_a_state_dict_saved_by_torch_loads_into_a_packed_and_into_a_plain_model(classifier, tmp_path):
    model, batch = pack(classifier("bert")), ragged([4, 7])
    with torch.inference_mode():
        expected = model(**batch).logits
    torch.save(model.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    for other in (classifier("bert"), pack(classifier("bert"))):
        with torch.inference_mode():
            for parameter in other.parameters():
                parameter.zero_()
            other(**batch)
        other.load_state_dict(state)
        with torch.inference_mode():
            torch.testing.assert_close(other(**batch).logits, expected)


def test_whatever_holds_the_model_can_be_packed(classifier):
    holder = nn.ModuleDict({"student": classifier("distilbert")})
    assert pack(holder) is holder
    assert is_packed(holder["student"])
    assert not is_packed(unpack(holder))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_run_and_learn_in_a_packed_model_and_merge(classifier):
    batch, labels = ragged([4, 7]), torch.tensor([0, 1])
    settings = LoraConfig(
        target_modules=["query", "value", "intermediate.dense"], r=2, init_lora_weights=False
    )
    model = get_peft_model(classifier("bert"), settings).double().eval()
    with torch.no_grad():
        expected = model(**batch).logits
        torch.testing.assert_close(pack(model)(**batch).logits, expected, rtol=1e-9, atol=1e-9)
    model(**batch, labels=labels).loss.backward()
    adapters = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    assert all(parameter.grad.abs().max() > 0 for parameter in adapters)
    merged = model.merge_and_unload()
    assert is_packed(merged)
    with torch.no_grad():
        torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-9, atol=1e-9)


def test_layers_cut_after_packing_stay_cut_after_unpacking(classifier):
    model = pack(classifier("bert"))
    del model.bert.encoder.layer[1]
    assert len(unpack(model).bert.encoder.layer) == 1


@pytest.mark.parametrize(
    ("family", "name", "reason"),
    [
        ("gpt2", "GPT2Model", "decoder"),
        ("llama", "LlamaModel", "decoder"),
        ("mamba", "MambaModel", "decoder"),
    ],
)
def test_what_cannot_run_packed_is_refused_with_the_reason(tiny, family, name, reason):
    model = tiny(family, name)
    with pytest.raises(ValueError, match=f"'{family}' cannot run packed: it is a {reason}.*DistilBERT"):
        pack(model)
    assert not is_packed(model)


def test_a_bert_that_decodes_is_refused(classifier):
    with pytest.raises(ValueError, match="decoder"):
        pack(classifier("bert", "LMHeadModel", is_decoder=True))


def test_what_holds_no_model_or_an_unknown_one_is_refused(classifier):
    with pytest.raises(ValueError, match="no transformers model"):
        pack(nn.Linear(2, 2))
    model = classifier("bert")
    model.config.model_type = "my-bert"
    with pytest.raises(ValueError, match="my-bert"):
        pack(model)


def test_a_users_own_head_reads_every_token(classifier):
    plain = classifier("bert", "Model")

    class MeanHead(BertPreTrainedModel):
        def __init__(self, config) -> None:
            super().__init__(config)
            self.bert, self.classifier = plain, nn.Linear(32, 2).double()
            self.post_init()

        def forward(self, input_ids, attention_mask):
            hidden = self.bert(input_ids, attention_mask).last_hidden_state
            weights = attention_mask[..., None].double()
            return self.classifier((hidden * weights).sum(1) / weights.sum(1))

    model, batch = MeanHead(plain.config).eval(), ragged([4, 7, 1])
    with torch.no_grad():
        expected = model(**batch)
        torch.testing.assert_close(pack(model)(**batch), expected, rtol=1e-10, atol=1e-10)


def test_a_name_is_not_a_model():
    with pytest.raises(TypeError, match=r"got 'bert-base-uncased': load it first"):
        pack("bert-base-uncased")
