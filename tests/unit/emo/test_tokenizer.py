"""A model's tokenizer: text to ids and back."""

from __future__ import annotations

from emo_serve import demo
from emo_serve.emo.tokenizer import ModelTokenizer


def test_ids_become_the_text_they_were_made_of() -> None:
    tokenizer = ModelTokenizer(demo.model_dir())
    text = "def f(x):\n    return x + 1  # \u03b1"
    ids = tokenizer.encode(text)
    assert ids[0] == 0  # end-of-text, which opens every text
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([]) == ""
