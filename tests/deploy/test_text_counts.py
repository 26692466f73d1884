import pytest

from lightning_compress.deploy import save_pretrained
from lightning_compress.deploy.text_counts import counts_on_texts
from lightning_compress.runtime.dial import set_threshold_scale
from tests.tiny_pretrained import VOCABULARY, word_tokenizer
from tests.toys_dropping import dropping_bert


@pytest.fixture
def model():
    model = dropping_bert(vocab_size=len(VOCABULARY))
    set_threshold_scale(model, 0.0)
    return model


@pytest.fixture
def folder(model, tmp_path):
    names = ["input_ids", "attention_mask"]
    tokenizer = word_tokenizer(
        pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", model_input_names=names
    )
    return save_pretrained(model, tmp_path / "model", tokenizer=tokenizer)


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("good film\n\n  \nbad\na b c d a b c d\n", encoding="utf-8")
    return path


def test_the_lines_are_counted_with_the_models_tokenizer(model, folder, texts):
    assert counts_on_texts(model, folder, texts, length=16, quantile=1.0) == (10, 10)
    assert counts_on_texts(model, folder, texts, length=16, quantile=0.6) == (4, 4)
    assert counts_on_texts(model, folder, texts, length=6, quantile=1.0) == (6, 6)


def test_a_file_without_text_is_refused(model, folder, tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n", encoding="utf-8")
    with pytest.raises(ValueError, match="holds no text"):
        counts_on_texts(model, folder, tmp_path / "empty.txt", length=16)
    with pytest.raises(FileNotFoundError):
        counts_on_texts(model, folder, tmp_path / "none.txt", length=16)


def test_a_model_without_tokenizer_is_refused(model, texts, tmp_path):
    save_pretrained(model, tmp_path / "bare")
    with pytest.raises(ValueError, match="holds no tokenizer"):
        counts_on_texts(model, tmp_path / "bare", texts, length=16)
