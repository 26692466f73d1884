import pytest
import torch

from lightning_compress.data import LanguageModelingData
from lightning_compress.data.language_modeling import pack_blocks, split_documents
from tests.tiny_pretrained import save_tiny_decoder, word_tokenizer


@pytest.fixture(scope="module")
def decoder_folder(tmp_path_factory) -> str:
    return save_tiny_decoder(tmp_path_factory.mktemp("decoder"), with_weights=False)


@pytest.fixture
def stories(tmp_path) -> str:
    path = tmp_path / "stories.txt"
    path.write_text(
        "good film\nbad plot\n<|endoftext|>\na b c\n<|endoftext|>\n" + "fine poor " * 20, encoding="utf-8"
    )
    return str(path)


def make(folder: str, **settings) -> LanguageModelingData:
    return LanguageModelingData(folder, **{"block_size": 4, "batch_size": 2, **settings})


def test_documents_are_cut_at_separator_lines_only():
    text = "one\n<|endoftext|>\n\n<|endoftext|>  \ntwo <|endoftext|>\nthree\n"
    assert split_documents(text, "<|endoftext|>") == ["one", "two <|endoftext|>\nthree"]
    assert split_documents(text, None) == [text.strip("\n")]


@pytest.mark.parametrize(
    ("marks", "border"),
    [({"bos_token": "[CLS]", "eos_token": "[SEP]"}, [2]), ({"eos_token": "[SEP]"}, [3]), ({}, [])],
)
def test_each_document_is_opened_and_the_rest_left_out(marks, border):
    blocks = pack_blocks(["good bad", "film plot a"], word_tokenizer(**marks), block_size=3)
    stream = [*border, 4, 5, *border, 8, 9, 10]
    assert blocks.flatten().tolist() == stream[: len(stream) // 3 * 3]
    assert blocks.shape[1] == 3


def test_blocks_are_batched_with_their_own_ids_as_labels(decoder_folder, stories):
    data = make(decoder_folder, train=stories, validation=stories, test=stories)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].shape == (2, 4)
    assert torch.equal(batch["labels"], batch["input_ids"])
    data.setup("test")
    assert next(iter(data.test_dataloader()))["input_ids"][0].tolist() == [2, 4, 8, 5]
    assert data.vocab_size == 14


def test_the_last_blocks_are_split_off_for_validation(decoder_folder, stories):
    data = make(decoder_folder, train=stories, validation_ratio=0.25)
    data.setup("validate")
    validation = [row for batch in data.val_dataloader() for row in batch["input_ids"].tolist()]
    train = [row for batch in data.train_dataloader() for row in batch["input_ids"].tolist()]
    assert (len(train), len(validation)) == (9, 3)
    data.setup("fit")
    assert len(data.train_dataloader().dataset) == 9


def test_several_files_are_joined_and_a_subset_can_be_taken(decoder_folder, stories):
    whole = make(decoder_folder, train=[stories, stories], validation_ratio=0)
    whole.setup("fit")
    assert whole.val_dataloader() == []
    part = make(decoder_folder, train=[stories, stories], validation_ratio=0, limit_train=5)
    part.setup("fit")
    assert (len(whole.train_dataloader().dataset), len(part.train_dataloader().dataset)) == (25, 5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "No train text: give one or more text files as `train=`"),
        ({"train": "missing.txt"}, r"`train='missing.txt'` is not a file"),
        ({"block_size": 1}, "`block_size` must be at least 2, got 1"),
        ({"validation_ratio": 1.5}, "`validation_ratio` must be in"),
    ],
)
def test_mistakes_are_reported_before_training(decoder_folder, settings, message):
    with pytest.raises(ValueError, match=message):
        make(decoder_folder, **settings).setup("fit")


def test_empty_short_and_undecodable_files_are_refused(decoder_folder, tmp_path, stories):
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(ValueError, match="is empty: it holds no text"):
        make(decoder_folder, train=str(tmp_path / "empty.txt")).setup("fit")
    with pytest.raises(ValueError, match="do not fill one block of 900 tokens"):
        make(decoder_folder, train=stories, block_size=900).setup("fit")
    with pytest.raises(ValueError, match="too few to split a validation part off"):
        make(decoder_folder, train=stories, block_size=40).setup("fit")
    (tmp_path / "latin.txt").write_bytes("Ä".encode("latin-1"))
    with pytest.raises(ValueError, match="is not UTF-8"):
        make(decoder_folder, train=str(tmp_path / "latin.txt")).setup("fit")


def test_a_folder_without_a_tokenizer_is_refused(tmp_path, stories):
    with pytest.raises(ValueError, match=r"has no tokenizer_config\.json"):
        make(str(tmp_path), train=stories).setup("fit")


def test_real_stories_fit_their_model(shared_data):
    model, text = (
        shared_data / "models" / "stories260k",
        shared_data / "data" / "tinystories_sample" / "valid.txt",
    )
    if not (model.is_dir() and text.is_file()):
        pytest.skip("no stories260k among the shared models, or no TinyStories among the shared data sets")
    data = make(str(model), test=str(text), block_size=128)
    data.setup("test")
    blocks = data.test_dataloader().dataset.blocks_NT
    assert len(blocks) > 500
    assert (blocks == 1).sum() == 216
    assert data.vocab_size == 512
