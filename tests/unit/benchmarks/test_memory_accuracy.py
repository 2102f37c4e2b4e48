"""The memory-accuracy benchmark's maths and its inputs; tests/server has it against a server."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest
import torch

from benchmarks.accuracy import lm_eval as accuracy_lm_eval
from benchmarks.accuracy import scoring as accuracy_scoring
from benchmarks.accuracy.pools import FULL, TRUNK, Case, build_pools, cases_of, draw
from benchmarks.accuracy.report import print_report
from benchmarks.accuracy.scoring import Endpoint, Token, is_right, score_domain, standard_error
from benchmarks.accuracy.servers import memory_of
from benchmarks.accuracy.texts import (
    CHOICE_TOKENS,
    POSITIONS,
    QUESTION_TOKENS,
    Domain,
    Question,
    Text,
    derive_questions,
    read_domain,
    read_questions,
)
from emo_serve import demo
from emo_serve.emo.checkpoint import Checkpoint
from emo_serve.pools.calibration.build import calibrate

LENGTH = POSITIONS[-1] + CHOICE_TOKENS


def encode(text: str) -> list[int]:
    """One token a word, none for white space."""
    return [sum(map(ord, word)) for word in text.split()]


def text_of(document: str, number: int) -> Text:
    return Text(document, tuple(range(1000 * number, 1000 * number + LENGTH)))


# -- texts and questions --


def test_measured_texts_share_no_document_with_the_examples(tmp_path: Path) -> None:
    rows = [("a", "a0 x y"), ("b", "b0"), ("c", "c0"), ("a", "a1"), ("b", "b1"), ("d", "d0")]
    path = tmp_path / "law.jsonl"
    path.write_text("".join(json.dumps({"document": d, "text": t}) + "\n" for d, t in rows))
    domain = read_domain(path, encode, 2, None, None)
    assert domain.name == "law"
    assert domain.measured == tuple(Text(d, tuple(encode(t)[:2])) for d, t in rows if d in "ac")
    assert domain.examples == tuple(Text(d, tuple(encode(t))) for d, t in rows if d in "bd")
    assert len(read_domain(path, encode, 2, 1, None).measured) == 1


def test_texts_without_documents_are_documents(tmp_path: Path) -> None:
    path = tmp_path / "law.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\n{"text": "three"}\n')
    domain = read_domain(path, encode, 9, None, None)
    assert [len(domain.measured), len(domain.examples)] == [2, 1]
    path.write_text('{"text": "one"}\n')
    with pytest.raises(SystemExit, match="two documents"):
        read_domain(path, encode, 9, None, None)


def test_the_right_choice_is_the_texts_own_continuation() -> None:
    texts = [text_of(name, number) for number, name in enumerate("abcdea")]
    questions = derive_questions(texts)
    assert questions == derive_questions(texts)
    assert len(questions) == len(texts) * len(POSITIONS)
    assert {question.answer for question in questions} == {0, 1, 2, 3}
    for number, question in enumerate(questions):
        text, position = texts[number // 2], POSITIONS[number % 2]
        context = text.ids[position - QUESTION_TOKENS : position]
        right = text.ids[position : position + CHOICE_TOKENS]
        assert all(prompt[: len(context)] == context for prompt in question.prompts)
        assert set(question.starts) == {len(context)}
        ends = [prompt[len(context) :] for prompt in question.prompts]
        assert ends[question.answer] == right
        sources = [next(t for t in texts if end[0] in t.ids) for end in ends]
        assert len({source.document for source in sources}) == 4, "a document a choice"
        assert all(end[0] % 1000 == position for end in ends), "from the same position"


def test_no_question_without_enough_other_documents_or_length() -> None:
    same = [text_of(name, number) for number, name in enumerate("aabbcc")]
    assert derive_questions(same) == [], "two other documents, three distractors needed"
    short = [Text(str(n), tuple(range(1000 * n, 1000 * n + POSITIONS[-1]))) for n in range(5)]
    assert len(derive_questions(short)) == len(short), "only the first position fits"


def test_questions_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('{"question": "who is", "choices": ["me too", "you"], "answer": 1}\n')
    (question,) = read_questions(path, encode)
    assert question.prompts == (tuple(encode("who is me too")), tuple(encode("who is you")))
    assert (question.starts, question.answer) == ((2, 2), 1)
    for answer in (2, -1, "1", True):
        row = {"question": "q", "choices": ["a", "b"], "answer": answer}
        path.write_text(json.dumps(row))
        with pytest.raises(SystemExit, match="answer is"):
            read_questions(path, encode)
    path.write_text('{"question": "q", "choices": ["", "b"], "answer": 0}')
    with pytest.raises(SystemExit, match="adds no token"):
        read_questions(path, encode)


# -- scoring --


def tokens(*logprobs: float) -> list[Token]:
    return [Token(logprob, 1) for logprob in logprobs]


def test_only_the_choices_tokens_decide() -> None:
    # Each prompt has 4 tokens, 2 of them the question's: scores of the 2nd to 4th.
    question = Question(((1, 2, 3, 4), (1, 2, 5, 6)), (2, 2), 1)
    assert is_right(question, [tokens(0, -2, -2), tokens(-9, -1, -2)])
    assert not is_right(question, [tokens(-9, -1, -1), tokens(0, -2, -2)])
    assert not is_right(question, [tokens(0, -2, -1), tokens(0, -1, -2)]), "a tie is no answer"


def answering(prompts: Sequence[Sequence[int]]) -> list[dict[str, object]]:
    """A server's choices, out of order: each token's log-probability is minus its id."""
    return [
        {
            "index": index,
            "prompt_logprobs": [None]
            + [{str(i): {"logprob": -float(i), "rank": i}, "77": {}} for i in ids[1:]],
        }
        for index, ids in reversed(list(enumerate(prompts)))
    ]


def endpoint(requests: list[dict[str, object]]) -> Endpoint:
    def answer(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        if body["model"] == "gone":
            return httpx.Response(404, text="no such pool")
        requests.append(body)
        return httpx.Response(200, json={"choices": answering(body["prompt"])})

    return Endpoint(httpx.Client(transport=httpx.MockTransport(answer), base_url="http://x"))


def test_scores_come_back_in_the_prompts_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy_scoring, "_PROMPTS_A_REQUEST", 3)
    prompts = [[9, n, n + 1] for n in range(1, 8)]
    requests: list[dict[str, object]] = []
    scored = endpoint(requests).score("math", prompts)
    assert scored == [[Token(-n, n), Token(-n - 1, n + 1)] for n in range(1, 8)]
    assert sorted(len(request["prompt"]) for request in requests) == [1, 3, 3]  # type: ignore[arg-type]
    assert {request["prompt_logprobs"] for request in requests} == {0}
    with pytest.raises(SystemExit, match="404 no such pool"):
        endpoint([]).score("gone", prompts)


def test_a_domains_score() -> None:
    texts = (Text("a", (9, 1, 3)), Text("b", (9, 1, 1)))
    questions = (
        Question(((9, 5, 1), (9, 5, 2)), (2, 2), 0),
        Question(((9, 5, 1), (9, 5, 2)), (2, 2), 1),
    )
    score = score_domain(endpoint([]), "math", Domain("d", (), texts, questions))
    assert score.losses == (2.0, 1.0)
    assert (score.loss, score.accuracy, score.choices) == (1.5, 0.75, 0.5)
    assert score_domain(endpoint([]), "math", Domain("d", (), texts, ())).choices is None


def test_standard_error_is_of_the_paired_difference() -> None:
    baseline = [1.0, 5.0, 9.0]
    assert standard_error([loss + 0.5 for loss in baseline], baseline) == 0
    assert standard_error([2.0, 5.0, 9.0], baseline) == pytest.approx(1 / 3)


# -- pools --


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint.open(demo.model_dir())


def test_cases(checkpoint: Checkpoint) -> None:
    methods = ["layerwise", "easy-ep", "random"]
    cases = cases_of(checkpoint, [32, 8], methods, [0, 20, 1], [3, 4], [0.5], 24)
    assert cases[:2] == [Case(FULL, 32), Case(TRUNK, 1)]
    assert cases.count(Case(FULL, 32)) == 1, "keeping all is the full model"
    for method in methods[:2]:
        mine = [(case.examples, case.seed) for case in cases[2:-2] if case.method == method]
        assert mine == [(0, 3), (20, 3), (1, 3), (1, 4)], "20 of 24 are drawn once"
    assert [case.seed for case in cases if case.method == "random"] == [3, 4]
    assert cases[-2:] == [
        Case(FULL, 32, temperature=0.5),
        Case("layerwise", 8, 0, 3, temperature=0.5),
    ]
    assert len({case.pool_name("d") for case in cases}) == len(cases)


def test_each_case_has_its_pool(checkpoint: Checkpoint) -> None:
    examples = [torch.arange(n, n + 40).tolist() for n in (100, 900, 1700)]
    documents = [torch.tensor(ids) for ids in examples]
    cases = [
        *(Case(FULL, 32), Case(TRUNK, 1)),
        *(Case("layerwise", 8), Case("layerwise", 4), Case("router", 8), Case("router", 4)),
        *(Case("router", 4, 1, seed=0), Case("random", 8, seed=0), Case("random", 8, seed=1)),
        Case("layerwise", 8, temperature=0.5),
    ]
    pools = build_pools(checkpoint, "law", examples, cases)
    assert list(pools) == cases
    for case, pool in pools.items():
        assert {len(ids) for ids in pool.expert_ids} == {case.k}
        assert all(31 in ids for ids in pool.expert_ids), "the shared expert"
        assert (pool.name, pool.router_temperature) == (case.pool_name("law"), case.temperature)
    for case in cases[2:6]:
        expected = calibrate(checkpoint, documents, case.k, case.method).pool("x")
        assert pools[case].expert_ids == expected.expert_ids
    single = calibrate(checkpoint, [torch.tensor(i) for i in draw(examples, 1, 0)], 4, "router")
    assert pools[cases[6]].expert_ids == single.pool("x").expert_ids
    assert pools[cases[7]].expert_ids != pools[cases[8]].expert_ids
    assert pools[cases[9]].expert_ids == pools[cases[2]].expert_ids


def test_draws() -> None:
    examples = [[n] for n in range(10)]
    assert draw(examples, 0, 5) == draw(examples, 10, 5) == examples
    few = draw(examples, 4, 5)
    assert few == sorted(few) == draw(examples, 4, 5)
    assert len(few) == 4
    assert len({tuple(draw(examples, 1, seed)[0]) for seed in range(20)}) > 1


# -- memory, report, lm_eval --


def test_memory_of_a_summary() -> None:
    pools = {"slots": {"total": 32, "bytes_per_slot": 2**20}}
    line = "emo-serve: m is ready\n  trunk    {}\n  slab     0.03 GiB: 8 slots per layer\n"
    found = memory_of(line.format("0.0033 GiB a device"), pools)
    assert found == {"trunk_gib": 0.0033, "slab_gib": 2**-5, "gib": 0.0033 + 2**-5}
    assert memory_of(line.format("1024 bytes"), pools)["trunk_gib"] == 2**-20
    with pytest.raises(SystemExit, match="names no trunk"):
        memory_of("nothing", pools)


def row(method: str, k: int, loss: float, **more: object) -> dict[str, object]:
    figures = {"loss": loss, "accuracy": 0.25, "choices": 0.5}
    case = {"method": method, "k": k, "examples": 0, "seed": 0, "temperature": 1}
    return {**case, **figures, "loss_difference_standard_error": 0.0625, **more}


def test_report_takes_the_latest_and_lays_the_paper_beside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        *(row("full", 32, 2.5), row("trunk", 1, 5.5)),
        *(row("layerwise", 8, 2.625), row("random", 8, 4.0), row("random", 8, 4.5, seed=1)),
        row("layerwise", 8, 2.75, temperature=2),
    ]
    counts = {"measured_texts": 2, "measured_tokens": 766, "questions": 4}
    memory = [{"k": 32, "gib": 0.5}, {"k": 8, "gib": 0.25}, {"k": 1, "gib": 0.125}]
    result = {"role": "EMO", "model": "m", "rows": rows, "memory": memory, **counts}
    old = {**result, "rows": [row("full", 32, 9.0)]}
    other = {**old, "model": "other", "training_seed": 1}
    lines = [{"result": old}, {"result": other}, {"result": result}]
    (tmp_path / "memory_accuracy.jsonl").write_text("\n".join(map(json.dumps, lines)))
    print_report(tmp_path)
    printed = capsys.readouterr().out.splitlines()
    assert not any("9.000" in line for line in printed)
    paper = "*32* | *7.8* | *41.4* | *30.8* | *17.6* | *13.2* | *11.7* | *2.9* |"
    assert f"| 25 % | 8 | 0.2500 | 2.625 (+0.125 +-0.062) | 25.0 % | 50.0 % | {paper}" in printed
    assert any(line.startswith("| shared only | 1 | 0.1250 | 5.500 (+3.000") for line in printed)
    assert any("ANOTHER MODEL" in line for line in printed)
    assert "| random | 4.250 (4.000 to 4.500) |" in printed
    assert "| EMO, 8 | 2.625 | 2.750 |" in printed


def test_report_lays_training_seeds_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = [{"k": 32, "gib": 0.5}, {"k": 8, "gib": 0.25}]
    lines = []
    for role, seed, full, few in [
        *(("EMO", 0, 9.0, 9.0), ("EMO", 1, 2.0, 2.25), ("standard MoE", 0, 3.0, 4.0)),
        *(("EMO", 0, 2.5, 2.5), ("EMO", 2, 3.0, 3.5)),
    ]:
        rows = [row("full", 32, full), row("layerwise", 8, few), row("random", 8, 7.0)]
        counts = {"measured_texts": 2, "measured_tokens": 766, "questions": 4}
        figures = {"rows": rows, "memory": memory, **counts}
        lines.append({"result": {"role": role, "model": role, "training_seed": seed, **figures}})
    (tmp_path / "memory_accuracy.jsonl").write_text("\n".join(map(json.dumps, lines)))
    print_report(tmp_path)
    printed = capsys.readouterr().out.splitlines()
    assert (
        "| 8 | 2.750 (2.250 to 3.500) | +0.250 (+0.000 to +0.500) | 50.0 (50.0 to 50.0)"
        " | 4.000 | +1.000 | 50.0 |"
    ) in printed
    assert "Training seeds of EMO: 0, 1, 2; standard MoE: 0." in printed
    assert any(line.startswith("| 25 % | 8 | 0.2500 | 2.500 (+0.000") for line in printed)


def test_lm_eval_is_asked_for_tokenized_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, flags = demo.model_dir(), ["--limit", "5"]
    made = accuracy_lm_eval.command("http://x", "math", model, "arc", flags, tmp_path)
    assert made[:5] == [sys.executable, "-m", "lm_eval", "--model", "local-completions"]
    arguments = dict(part.split("=") for part in made[6].split(","))
    assert arguments["base_url"] == "http://x/v1/completions"
    assert (arguments["model"], arguments["tokenized_requests"]) == ("math", "True")
    assert arguments["tokenizer"] == str(model)
    assert arguments["add_bos_token"] == "True", "the demo's texts begin with end-of-text"
    assert made[-2:] == ["--limit", "5"]
    monkeypatch.setattr(accuracy_lm_eval, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r'pip install "lm_eval\[api\]"'):
        accuracy_lm_eval.check_installed()
