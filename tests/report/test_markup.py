import pytest

from lightning_compress.report import markup


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "0"),
        (7, "7"),
        (999, "999"),
        (1000, "1.00 k"),
        (22_713_216, "22.7 M"),
        (999_960, "1.00 M"),
        (5.31e9, "5.31 G"),
    ],
)
def test_counts_have_three_figures(number: float, words: str):
    assert markup.count(number) == words


def test_bytes_are_counted_in_powers_of_two_and_flops_in_powers_of_ten():
    assert markup.size(90_868_376) == "86.7 MiB"
    assert markup.size(512) == "512 B"
    assert markup.flops(1.2e10) == "12.0 GFLOPs"
    assert markup.flops(120) == "120 FLOPs"


def test_percentages_and_factors_have_three_figures():
    assert [markup.percent(ratio) for ratio in (0.0312, 0.5, 1.0)] == ["3.12 %", "50.0 %", "100.0 %"]
    assert [markup.times(ratio) for ratio in (1.4932, 12.34, 123.4)] == ["1.49×", "12.3×", "123×"]


def test_percentages_in_narrow_places_have_two_figures():
    shares = (0.0, 0.0004, 0.031, 0.0949, 0.095, 0.5, 1.0)
    words = ["0 %", "0.0 %", "3.1 %", "9.5 %", "10 %", "50 %", "100 %"]
    assert [markup.short_percent(ratio) for ratio in shares] == words


def test_texts_and_attributes_are_escaped():
    assert markup.escape("<a href='x'>&") == "&lt;a href=&#x27;x&#x27;&gt;&amp;"
    assert markup.element("td", "1", class_='a"b') == '<td class="a&quot;b">1</td>\n'


def test_a_table_escapes_cells_headings_and_caption():
    text = markup.table(["<h>"], [["<r>"]], caption="<c>")
    assert "&lt;h&gt;" in text
    assert "&lt;r&gt;" in text
    assert "&lt;c&gt;" in text
    assert "<h>" not in text


def test_groups_of_rows_are_marked():
    text = markup.table(["a"], [["1"], ["2"], ["3"]], firsts=[1])
    assert text.count('<tr class="first">') == 1
    assert text.index('<tr class="first">') < text.index(">2<") < text.index(">3<")


def test_sections_and_figures_wrap_their_content():
    assert markup.section("A & B", "<p>x</p>").startswith("<section><h2>A &amp; B</h2>\n<p>x</p>")
    assert "<figcaption>a &lt; b</figcaption>" in markup.figure("<svg></svg>", "a < b")
