import pytest
import torch

from lightning_compress.data.encoding import PadBatch, encode_texts, load_tokenizer
from tests.tiny_pretrained import save_tiny_decoder, word_tokenizer


def test_texts_are_tokenised_and_cut(encoder_folder):
    data = encode_texts(
        load_tokenizer(encoder_folder), ["good film", "bad bad bad"], None, [1, 0], max_length=4
    )
    assert data.lengths == [4, 4]
    assert data[0]["input_ids"] == [2, 4, 8, 3]
    assert data[1]["input_ids"] == [2, 5, 5, 3]
    assert (data[1]["labels"], len(data)) == (0, 2)


def test_pairs_carry_their_segments(encoder_folder):
    data = encode_texts(load_tokenizer(encoder_folder), ["good"], ["bad plot"], None, max_length=8)
    assert data[0]["input_ids"] == [2, 4, 3, 5, 9, 3]
    assert data[0]["token_type_ids"] == [0, 0, 0, 1, 1, 1]
    assert "labels" not in data[0]


@pytest.mark.parametrize(
    ("side", "ids", "mask"),
    [
        ("right", [[5, 6, 7], [8, 9, 9]], [[1, 1, 1], [1, 0, 0]]),
        ("left", [[5, 6, 7], [9, 9, 8]], [[1, 1, 1], [0, 0, 1]]),
    ],
)
def test_a_batch_is_padded_to_its_longest_text(side, ids, mask):
    items = [{"input_ids": [5, 6, 7], "labels": 1}, {"input_ids": [8], "labels": 0}]
    batch = PadBatch(pad_token_id=9, side=side)(items)
    assert batch["input_ids"].tolist() == ids
    assert batch["attention_mask"].tolist() == mask
    assert batch["labels"].tolist() == [1, 0]
    assert batch["labels"].dtype == torch.int64


def test_segments_are_padded_with_zero_and_real_labels_stay_real():
    items = [
        {"input_ids": [5, 6], "token_type_ids": [0, 1], "labels": 0.5},
        {"input_ids": [8], "token_type_ids": [1], "labels": 2.0},
    ]
    batch = PadBatch(pad_token_id=9)(items)
    assert batch["token_type_ids"].tolist() == [[0, 1], [1, 0]]
    assert batch["labels"].dtype == torch.float32


def test_a_decoder_s_tokenizer_pads_with_its_end_of_text_token(tmp_path):
    assert load_tokenizer(save_tiny_decoder(tmp_path, with_weights=False)).pad_token == "[SEP]"


def test_a_tokenizer_that_cannot_be_loaded_or_cannot_pad_is_refused(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ValueError, match=r"tokenizer=.* cannot be loaded"):
        load_tokenizer(str(tmp_path))
    word_tokenizer().save_pretrained(tmp_path / "no_padding")
    with pytest.raises(ValueError, match="neither a padding nor an end-of-text token"):
        load_tokenizer(str(tmp_path / "no_padding"))
