import re
import xml.etree.ElementTree as ElementTree

import matplotlib as mpl
from matplotlib.figure import Figure

from lightning_compress.report.svg import ACCENT, INK, draw_svg, tidy


def draw(figure: Figure) -> None:
    axes = figure.add_subplot()
    tidy(axes, "a title of $5 & <more>")
    axes.plot([0, 1], [0, 1], color=ACCENT)
    axes.text(0.5, 0.5, "words", color=INK)


def test_the_picture_is_one_element_without_addresses_or_fixed_size():
    svg = draw_svg("x", 'a "label"', draw, 4, 2)
    root = ElementTree.fromstring(svg)
    assert root.tag == "svg"
    assert root.attrib["aria-label"] == 'a "label"'
    assert {"width", "height"}.isdisjoint(root.attrib)
    assert "viewBox" in root.attrib
    assert "http" not in svg


def test_colours_and_font_come_from_the_page():
    svg = draw_svg("x", "label", draw, 4, 2)
    assert "stroke: var(--accent)" in svg
    assert "fill: var(--ink)" in svg
    assert "var(--font)" in svg
    assert "#0a00" not in svg
    assert not re.search(r"fill: #ffffff", svg)  # no white sheet behind the drawing on a dark page


def test_texts_stay_literal():
    assert "a title of $5 &amp; &lt;more&gt;" in draw_svg("x", "label", draw, 4, 2)


def test_ids_of_two_pictures_never_meet_and_all_references_resolve():
    first, second = draw_svg("x", "label", draw, 4, 2), draw_svg("y", "label", draw, 4, 2)
    ids = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in (first, second)]
    assert ids[0].isdisjoint(ids[1])
    for svg, known in zip((first, second), ids, strict=True):
        references = set(re.findall(r'href="#([^"]+)"', svg)) | set(re.findall(r"url\(#([^)]+)\)", svg))
        assert references
        assert references <= known


def test_drawing_twice_gives_the_same_text():
    assert draw_svg("x", "label", draw, 4, 2) == draw_svg("x", "label", draw, 4, 2)


def test_matplotlib_is_left_as_it_was():
    before = dict(mpl.rcParams)
    draw_svg("x", "label", draw, 4, 2)
    assert dict(mpl.rcParams) == before
