import re

import pytest

from lightning_compress.report.dropping_record import TokenText
from lightning_compress.report.style import STYLE
from lightning_compress.report.token_markup import SHADES, fate, legend, shade, shaded_text, spell


def read(*pieces: str) -> str:
    return "".join(" " * word.follows_space + word.text for word in spell(pieces))


@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        (("[CLS]", "un", "##believ", "##able", "!", "[SEP]"), "[CLS] unbelievable! [SEP]"),
        (("it", "'", "s", "(", "well", ")", "made", ",", "no"), "it's (well) made, no"),
        (("a", "well", "-", "made", "film"), "a well-made film"),
        (("<s>", "Ġun", "believable", "!", "ĠNo", "</s>"), "<s> unbelievable! No </s>"),
        (("▁un", "believable", "."), " unbelievable."),
        (("##", "a"), "## a"),
        (("17", "4", "30"), "17 4 30"),
        ((), ""),
    ],
)
def test_pieces_read_as_they_were_written(pieces: tuple[str, ...], text: str):
    assert read(*pieces) == text


def test_only_pieces_that_stand_for_no_text_are_special():
    words = spell(["[CLS]", "[", "]", "<s>", "<", ">", "[unclear]"])
    assert [word.text for word in words if word.is_special] == ["[CLS]", "<s>"]


def test_only_tokens_that_stay_to_the_end_have_the_fullest_shade():
    for num_layers in (1, 2, 6, 12, 24):
        shades = [shade(layers, num_layers) for layers in range(num_layers + 1)]
        assert shades == sorted(shades)
        assert shades[0] == 0
        assert [s == SHADES for s in shades] == [False] * num_layers + [True]


def test_every_shade_has_a_rule():
    assert all(re.search(rf"\.s{number}\b", STYLE) for number in range(SHADES + 1))


def test_the_fate_says_before_which_layer_a_token_left():
    assert fate(3, 6) == "left before layer 3"
    assert fate(6, 6) == "went through all layers"


def test_neighbours_of_one_fate_share_an_element_and_spaces_are_kept():
    text = TokenText(tokens=("[CLS]", "play", "##ing", "well"), layers=(2, 2, 0, 0))
    markup = shaded_text(text, 2)
    assert markup.count("<span") == 2
    assert '<small>[CLS]</small> play</span><span class="s0" title="left before layer 0">ing well' in markup
    assert re.sub(r"<[^>]+>", "", markup).strip() == "[CLS] playing well"


def test_what_a_text_says_is_escaped():
    markup = shaded_text(TokenText(tokens=("<b", "[<I>]", "&"), layers=(1, 0, 1)), 1)
    assert "<b " not in markup
    assert "&lt;b" in markup and "&amp;" in markup and "[&lt;I&gt;]" in markup


def test_the_legend_shows_each_fate_of_a_shallow_model_and_some_of_a_deep_one():
    assert re.findall(r">(\d+)</span>", legend(6)) == ["0", "1", "2", "3", "4", "5", "6"]
    deep = re.findall(r'class="(s\d)" title="([^"]+)">(\d+)<', legend(24))
    assert deep[0] == ("s0", "left before layer 0", "0")
    assert deep[-1] == ("s6", "went through all layers", "24")
    assert len(deep) == SHADES + 1
