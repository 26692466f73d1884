import math
from pathlib import Path

import pytest
import torch

from lightning_compress.data import LanguageModelingData
from lightning_compress.tasks import CausalLanguageModel
from tests.tiny_pretrained import save_tiny_decoder
from tests.toys import toy_trainer


def make(tmp_path: Path, with_weights: bool, **settings) -> tuple[CausalLanguageModel, LanguageModelingData]:
    folder = save_tiny_decoder(tmp_path / "decoder", with_weights)
    text = tmp_path / "text.txt"
    text.write_text("good film bad plot fine poor a b c d " * 20)
    files = dict.fromkeys(("train", "validation", "test"), str(text))
    data = LanguageModelingData(folder, **files, block_size=8, batch_size=4)
    return CausalLanguageModel(folder, **settings), data


@pytest.mark.parametrize("with_weights", [True, False])
def test_it_learns_and_logs_perplexity(tmp_path, with_weights):
    torch.manual_seed(0)
    module, data = make(tmp_path, with_weights, learning_rate=1e-2)
    trainer = toy_trainer(max_epochs=6)
    trainer.fit(module, datamodule=data)
    assert {"train/loss", "val/loss", "val/perplexity"} <= set(trainer.callback_metrics)
    assert module.model.config._attn_implementation == "sdpa"
    (metrics,) = trainer.test(module, datamodule=data, verbose=False)
    assert metrics["test/perplexity"] < 2
    assert metrics["test/perplexity"] == pytest.approx(math.exp(metrics["test/loss"]), rel=1e-5)


def test_the_perplexity_is_that_of_all_tokens_of_unequal_batches(tmp_path):
    module, data = make(tmp_path, True)
    (metrics,) = toy_trainer().test(module, datamodule=data, verbose=False)
    blocks = data.test_dataloader().dataset.blocks_NT
    assert len(blocks) % 4
    with torch.no_grad():
        log_probabilities = module.model.eval()(blocks).logits[:, :-1].log_softmax(-1)
    loss = -log_probabilities.gather(-1, blocks[:, 1:, None]).mean()
    assert metrics["test/perplexity"] == pytest.approx(loss.exp().item(), rel=1e-5)


def test_tokens_without_a_label_do_not_count(tmp_path):
    module, data = make(tmp_path, True)
    data.setup("test")
    module.configure_model()
    batch = next(iter(data.test_dataloader()))
    batch["labels"] = batch["labels"].clone()
    batch["labels"][:, 3:] = -100
    module.log = lambda *args, **settings: None
    module.test_step(batch, 0)
    assert module.test_loss.weight == 4 * 2


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused_before_training(tmp_path):
    module, data = make(tmp_path, False)
    data.tokenizer.add_tokens(["extra"])
    with pytest.raises(ValueError, match=r"has 14 embeddings, but the data's tokenizer has 15 tokens"):
        toy_trainer().fit(module, datamodule=data)


def test_a_checkpoint_opens_without_trainer_or_data(tmp_path):
    module, data = make(tmp_path, False)
    trainer = toy_trainer(max_epochs=1)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = CausalLanguageModel.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert all(torch.equal(again.state_dict()[name], value) for name, value in module.state_dict().items())
