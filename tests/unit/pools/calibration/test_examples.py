"""Example files of every kind, and what is wrong with the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from emo_serve import demo
from emo_serve.emo.config import EmoConfig, load_config
from emo_serve.emo.tokenizer import ModelTokenizer
from emo_serve.errors import ConfigError
from emo_serve.pools.calibration.examples import Example, encode_examples, read_examples
from tests.support.golden.checkpoints import write_checkpoint


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("shared1", tmp_path_factory.mktemp("golden"))


@pytest.fixture(scope="module")
def config(golden: Path) -> EmoConfig:
    return load_config(golden)


def write(path: Path, *lines: object) -> Path:
    path.write_text(
        "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
    )
    return path


def test_a_text_file_is_one_document_blank_lines_and_all(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\n\ntwo\n".encode())
    (example,) = read_examples([path])
    assert example == Example(str(path), "one\n\ntwo\n")
    assert len(read_examples([path, path])) == 2


def test_lines_are_strings_texts_or_chats(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}]
    separators = "one\u2028line"  # which str.splitlines would take for two
    path = write(
        tmp_path / "a.jsonl",
        '"bare"',
        {"text": "of an object", "document": 3},
        "",
        {"messages": chat, "id": "x"},
        json.dumps({"text": separators}, ensure_ascii=False),
    )
    bare, text, talk, line = read_examples([path])
    assert (bare.source, bare.text) == (f"{path}:1", "bare")
    assert text.text == "of an object"
    assert (talk.source, talk.text, list(talk.messages)) == (f"{path}:4", None, chat)
    assert line.text == separators


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{text: 1}", "a.jsonl:2: is not JSON"),
        (
            "[1, 2]",
            "a.jsonl:2: the example is [1, 2]; expected a string, or an object with either"
            ' "text" or "messages"',
        ),
        ("3", "a.jsonl:2: the example is 3; expected"),
        ('{"prompt": "x"}', "a.jsonl:2: the example is {'prompt': 'x'}; expected"),
        (
            '{"text": "x", "messages": []}',
            "is {'messages': [], 'text': 'x'}; expected a string, or",
        ),
        ('{"text": " "}', "a.jsonl:2: text is ' '; expected some text"),
        ('{"text": ["x"]}', "a.jsonl:2: text is ['x']; expected some text"),
        ('""', "a.jsonl:2: text is ''; expected some text"),
        ('{"messages": []}', "a.jsonl:2: messages is []; expected a list"),
        ('{"messages": [{"role": "user"}]}', "messages[0] is {'role': 'user'}; expected"),
        ('{"messages": [{"role": "user", "content": [1]}]}', 'the strings "role" and "content"'),
    ],
)
def test_a_bad_line_is_refused_with_its_number(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "good"}, line)
    with pytest.raises(ConfigError) as caught:
        read_examples([path])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b" \n\n", "a.txt is empty; give at least one example"),
        ("a.jsonl", b"", "a.jsonl is empty"),
        ("a.txt", b"\xff\xfe", "a.txt is not UTF-8"),
        ("a.csv", b"x", "a.csv ends with '.csv'; give .jsonl or .txt"),
        ("absent.txt", None, "absent.txt cannot be read: No such file"),
    ],
)
def test_a_bad_file_is_refused(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_examples([tmp_path / name])
    assert message in str(caught.value)


def test_text_is_tokenized_as_the_server_does() -> None:
    from transformers import AutoTokenizer

    directory = demo.model_dir()
    text = demo.heldout("math")[0][:200]
    expected = AutoTokenizer.from_pretrained(directory)(text)["input_ids"]
    documents = encode_examples(
        [Example("a", text)], ModelTokenizer(directory), load_config(directory)
    )
    assert documents.ids[0].tolist() == expected
    assert expected[0] == 0, "opened by end-of-text"
    assert (documents.num_cut, documents.tokens_cut) == (0, 0)


def test_a_chat_goes_through_the_models_template(golden: Path, config: EmoConfig) -> None:
    tokenizer = ModelTokenizer(golden)
    user, assistant = ({"role": role, "content": role[0]} for role in ("user", "assistant"))
    open_chat, whole = encode_examples(
        [Example("a", messages=(user,)), Example("a", messages=(user, assistant))],
        tokenizer,
        config,
    ).ids
    assert open_chat.tolist() == tokenizer.encode("user: u\nassistant:")
    # this template always opens the assistant's turn
    assert whole.tolist() == tokenizer.encode("user: u\nassistant: a\nassistant:")


def test_a_chat_whose_template_looks_is_closed_after_the_assistant(
    golden: Path, tmp_path: Path
) -> None:
    directory = _copy(golden, tmp_path)
    fields = json.loads((directory / "tokenizer_config.json").read_text())
    fields["chat_template"] = "{% if add_generation_prompt %}open{% else %}closed{% endif %}"
    (directory / "tokenizer_config.json").write_text(json.dumps(fields))
    tokenizer = ModelTokenizer(directory)
    user, assistant = ({"role": role, "content": "x"} for role in ("user", "assistant"))
    assert tokenizer.encode_chat([user]) == tokenizer.encode("open")
    assert tokenizer.encode_chat([user, assistant]) == tokenizer.encode("closed")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "a.jsonl:7: {directory} has no chat template; give texts, not messages"),
        (
            "{{ raise_exception('no system here') }}",
            "template refuses these messages: no system here",
        ),
    ],
)
def test_a_chat_without_a_template_for_it_is_refused(
    golden: Path, config: EmoConfig, tmp_path: Path, template: str | None, message: str
) -> None:
    directory = _copy(golden, tmp_path)
    fields = json.loads((directory / "tokenizer_config.json").read_text())
    del fields["chat_template"]
    if template is not None:
        fields["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(fields))
    example = Example("a.jsonl:7", messages=({"role": "user", "content": "x"},))
    with pytest.raises(ConfigError) as caught:
        encode_examples([example], ModelTokenizer(directory), config)
    assert message.format(directory=directory) in str(caught.value)


def test_long_documents_are_cut_to_the_context(golden: Path, config: EmoConfig) -> None:
    limit = config.max_position_embeddings
    examples = [Example("a", "x" * (limit + 5)), Example("b", "x" * limit)]
    documents = encode_examples(examples, ModelTokenizer(golden), config)
    assert [len(ids) for ids in documents.ids] == [limit, limit]
    assert (documents.num_cut, documents.tokens_cut) == (1, 5)


def test_neither_padding_nor_truncation_of_the_file_is_used(golden: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    directory = _copy(golden, tmp_path)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.enable_padding(length=8)
    tokenizer.enable_truncation(2)
    tokenizer.save(str(directory / "tokenizer.json"))
    assert len(ModelTokenizer(directory).encode("abc")) == 3


def test_a_model_without_a_usable_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json does not exist"):
        ModelTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer\.json cannot be read"):
        ModelTokenizer(tmp_path)


def test_another_models_tokenizer_is_refused(golden: Path) -> None:
    small = EmoConfig(vocab_size=50, pad_token_id=None, eos_token_id=0)
    with pytest.raises(ConfigError, match=r"a: the tokenizer gives id \d+, the model has 50"):
        encode_examples([Example("a", "some words")], ModelTokenizer(golden), small)


def _copy(directory: Path, to: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (to / name).write_bytes((directory / name).read_bytes())
    return to
