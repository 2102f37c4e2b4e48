"""Texts and questions of a domain: what pools are found on, and what they are measured on.

A domain is a JSONL file with one `{"text": ..., "document": ...}` per line. Texts are split by
DOCUMENT, every second one, in the file's order: the first, third, ... are measured, and pools are
found on the others. So no measured text shares its file, chapter or page with one that a pool was
found on. A text without "document" is a document of its own.

A question is a prompt and choices; the model's answer is the choice of the highest total
log-likelihood. Questions are read from JSONL, `{"question": ..., "choices": [...], "answer": 2}`,
or made of the measured texts: at some positions of each text, the tokens that follow against those
that follow at the same position of other documents of the domain. The distractors come from the
domain, so only the context tells them apart, and have the same length in tokens, so that totals can
be compared.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Domain", "Question", "Text", "derive_questions", "read_domain", "read_questions"]

Encode = Callable[[str], list[int]]

NUM_CHOICES = 4
QUESTION_TOKENS = 48
CHOICE_TOKENS = 12
POSITIONS = (128, 256)  # of a measured text, where its questions end


@dataclass(frozen=True)
class Text:
    """A text as ids, and the document it comes from."""

    document: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Question:
    """Each choice as ids after the question's, where it begins in them, and which one is right."""

    prompts: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]
    answer: int


@dataclass(frozen=True)
class Domain:
    """One domain: whole texts to find pools on, the first tokens of other texts to measure."""

    name: str
    examples: tuple[Text, ...]
    measured: tuple[Text, ...]
    questions: tuple[Question, ...]


def read_domain(
    path: Path, encode: Encode, num_tokens: int, limit: int | None, questions: Path | None
) -> Domain:
    """Read a domain's texts, measured ones cut to `num_tokens`, and read or make its questions."""
    texts: list[Text] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        fields = json.loads(line)
        texts.append(Text(str(fields.get("document", number)), tuple(encode(fields["text"]))))
    documents = {name: place for place, name in enumerate(dict.fromkeys(t.document for t in texts))}
    measured = [
        Text(text.document, text.ids[:num_tokens])
        for text in texts
        if documents[text.document] % 2 == 0
    ][:limit]
    examples = tuple(text for text in texts if documents[text.document] % 2)
    if not examples or not measured:
        raise SystemExit(f"{path}: needs texts of at least two documents")
    made = read_questions(questions, encode) if questions else derive_questions(measured)
    return Domain(path.stem, examples, tuple(measured), tuple(made))


def derive_questions(texts: Sequence[Text]) -> list[Question]:
    """Make a question at each of POSITIONS of each text; the same texts give the same questions.

    Distractors come from the next texts of other documents, starting over at the end; the place of
    the right choice rotates. A text is skipped if it, or every other one, is too short.
    """
    questions: list[Question] = []
    for place, text in enumerate(texts):
        for position in POSITIONS:
            end = position + CHOICE_TOKENS
            right = text.ids[position:end]
            others: dict[str, tuple[int, ...]] = {}
            for other in [*texts[place + 1 :], *texts[:place]]:
                if other.document != text.document and len(other.ids) >= end:
                    others.setdefault(other.document, other.ids[position:end])
            wrong = [ids for ids in dict.fromkeys(others.values()) if ids != right]
            if len(text.ids) < end or len(wrong) < NUM_CHOICES - 1:
                continue
            answer = len(questions) % NUM_CHOICES
            choices = wrong[: NUM_CHOICES - 1]
            choices.insert(answer, right)
            prompt = text.ids[max(0, position - QUESTION_TOKENS) : position]
            prompts = tuple((*prompt, *choice) for choice in choices)
            questions.append(Question(prompts, (len(prompt),) * NUM_CHOICES, answer))
    return questions


def read_questions(path: Path, encode: Encode) -> list[Question]:
    """Read a multiple-choice set; a space joins question and choice unless either has one there."""
    questions: list[Question] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        fields = json.loads(line)
        question, choices, answer = fields["question"], fields["choices"], fields["answer"]
        if type(answer) is not int or not 0 <= answer < len(choices):
            raise SystemExit(
                f"{path}:{number}: answer is {answer!r}; give a choice's index, from 0"
            )
        start = len(encode(question))
        prompts = []
        for choice in choices:
            joined = question[-1:].isspace() or choice[:1].isspace()
            ids = tuple(encode(question + ("" if joined else " ") + choice))
            if len(ids) <= start:
                raise SystemExit(
                    f"{path}:{number}: choice {choice!r} adds no token to its question"
                )
            prompts.append(ids)
        questions.append(Question(tuple(prompts), (start,) * len(prompts), answer))
    return questions
