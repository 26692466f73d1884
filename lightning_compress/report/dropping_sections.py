"""The section about tokens: which left where in real texts, how many enter each layer, and what the dial gives.

`page` puts it beside the others of `sections`.
"""

from lightning_compress.report import dropping_figures as figures
from lightning_compress.report.dropping_record import DroppingRecord, TokenText
from lightning_compress.report.markup import element, escape, figure, percent, section
from lightning_compress.report.record import RunRecord
from lightning_compress.report.token_markup import legend, shaded_text

__all__ = ["tokens"]

_SHOWN = 5
"""Texts that are seen at once; the rest unfolds."""


def tokens(record: RunRecord) -> str:
    """Return the section; empty where no token leaves."""
    found = record.dropping
    if found is None:
        return ""
    parts = [element("p", escape(_summary(found)))]
    if found.texts:
        parts.append(_texts(found))
    bars = (
        "Share of all tokens that enters each layer's attention; what is above a bar has left. "
        "Layers are counted from 0."
    )
    parts.append(figure(figures.draw_kept_by_layer(found.layers), bars))
    if found.curve:
        dial = figures.draw_dial(found.metric, found.curve, found.scale, record.target_flops)
        parts.append(figure(dial, _dial(found)))
    return section("Tokens", *parts)


def _summary(found: DroppingRecord) -> str:
    last = found.layers[-1]
    return (
        f"Over {found.num_texts:,} validation texts, a layer runs on {percent(found.mean_kept)} of the tokens on "
        f"average, the last one on {percent(last)}. The rest left earlier, and costs nothing from there on."
    )


def _texts(found: DroppingRecord) -> str:
    num_layers = len(found.layers)
    shown = "".join(_text(text, num_layers) for text in found.texts[:_SHOWN])
    rest = found.texts[_SHOWN:]
    if rest:
        more = "".join(_text(text, num_layers) for text in rest)
        noun = "text" if len(rest) == 1 else "texts"
        shown += element("details", element("summary", f"{len(rest)} more {noun}") + more)
    return element("div", legend(num_layers) + shown, class_="texts")


def _text(text: TokenText, num_layers: int) -> str:
    stayed = sum(layers >= num_layers for layers in text.layers)
    words = [element("b", escape(text.prediction)) if text.prediction is not None else ""]
    if text.label is not None and text.prediction is not None:
        is_right = text.label == text.prediction
        words.append("✓" if is_right else f"✗ label {escape(text.label)}")
    elif text.label is not None:
        words.append(f"label {escape(text.label)}")
    noun = "token" if len(text.tokens) == 1 else "tokens"
    verb = "goes" if stayed == 1 else "go"
    words.append(f"{stayed} of {len(text.tokens)} {noun} {verb} through all layers")
    head = element("p", " · ".join(word.strip() for word in words if word), class_="verdict")
    return element("article", head + shaded_text(text, num_layers))


def _dial(found: DroppingRecord) -> str:
    metric = found.metric[:1].upper() + found.metric[1:]
    return (
        f"{metric} on {found.num_texts:,} validation texts when all thresholds are multiplied by one number, "
        "without training again. FLOPs count the predictors, and every kept token of the last layer."
    )
