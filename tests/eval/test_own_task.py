"""Tasks of one's own: what is read, and what is said of what cannot be."""

from collections.abc import Callable
from pathlib import Path

import pytest

from penstock.errors import InvalidSetting
from penstock.eval import PerplexityTask, load_tasks
from penstock.eval.tasks import GenerationTask, MultipleChoiceTask
from tests.eval.conftest import OpenSubject

GENERATION = "name: capitals\nkind: generation\ndata: data.jsonl\n"
CHOICE = "name: pick\nkind: multiple_choice\ndata: data.jsonl\n"


def write(path: Path, task: str, data: str = '{"question": "Q?", "answer": "A"}\n') -> str:
    (path / "task.yaml").write_text(task)
    (path / "data.jsonl").write_text(data)
    return str(path / "task.yaml")


async def test_an_own_task_is_asked_as_it_says(
    tmp_path: Path, checkpoint: Callable[[str], Path], open_subject: OpenSubject
) -> None:
    data = (
        '{"country": "France", "year": 1990, "answer": ["Paris", "paris city"]}\n\n'
        '{"country": "Peru", "year": 1, "answer": "Lima"}\n'
    )
    name = write(
        tmp_path,
        GENERATION + 'prompt: "Capital of {country} in {year}: "\nformat: text\nmax_tokens: 3\nstop: ["x"]\n',
        data,
    )
    (task,) = load_tasks([name], window=2048)
    assert isinstance(task, GenerationTask)
    seen = []
    async with open_subject(checkpoint("qwen2")) as subject:
        found = await task.score(subject, limit=None, on_item=lambda *done: seen.append(done))
    assert found.shape == (2, 13)
    assert seen == [(1, 2), (2, 2)]


def test_each_kind_is_read(tmp_path: Path) -> None:
    choice = write(tmp_path, CHOICE, '{"question": "Q?", "choices": ["a", "b"], "answer": 1}\n')
    assert isinstance(load_tasks([choice], window=64)[0], MultipleChoiceTask)
    text = write(tmp_path, "name: wiki\nkind: perplexity\ndata: data.jsonl\n", "words and more words")
    (task,) = load_tasks([text], window=64)
    assert isinstance(task, PerplexityTask)
    assert task.window == 64


def test_the_hash_is_of_what_is_asked(tmp_path: Path) -> None:
    (first,) = load_tasks([write(tmp_path, GENERATION)], window=64)
    (same,) = load_tasks([write(tmp_path, GENERATION + "format: auto\n")], window=64)
    (longer,) = load_tasks([write(tmp_path, GENERATION + "max_tokens: 65\n")], window=64)
    (other,) = load_tasks([write(tmp_path, GENERATION, '{"question": "Q?", "answer": "B"}\n')], window=64)
    assert first.data_sha256 == same.data_sha256
    assert len({first.data_sha256, longer.data_sha256, other.data_sha256}) == 3


@pytest.mark.parametrize(
    ("task", "complaint"),
    [
        ("name: [\n", "line 2: not YAML"),
        ("- a\n", "a task is a mapping"),
        (GENERATION + "max_token: 3\n", "line 4: unknown key 'max_token'"),
        (CHOICE + "max_tokens: 3\n", "line 4: unknown key 'max_tokens'"),
        (GENERATION + "max_tokens: many\n", "line 4: 'max_tokens' cannot be 'many'"),
        (GENERATION + "max_tokens: 0\n", "line 4: 'max_tokens' cannot be 0"),
        (GENERATION + "format: loud\n", "line 4: 'format' cannot be 'loud'"),
        ("name: x\nkind: essay\ndata: d\n", "line 2: 'kind' cannot be"),
        ("name: x\ndata: d\n", "lacks 'kind'"),
        ("kind: generation\ndata: d\n", "lacks 'name'"),
        ("name: x\nkind: generation\ndata: nowhere.jsonl\n", "there is no data file .*nowhere.jsonl"),
    ],
)
def test_a_description_that_cannot_be_honoured_is_refused_by_line(tmp_path: Path, task: str, complaint: str) -> None:
    with pytest.raises(InvalidSetting, match=complaint):
        load_tasks([write(tmp_path, task)], window=64)


@pytest.mark.parametrize(
    ("task", "line", "complaint"),
    [
        (GENERATION, '{"question": "Q?"}', "data.jsonl, line 2: lacks 'answer'"),
        (GENERATION, '{"answer": "A"}', "line 2: lacks 'question', which the prompt names"),
        (GENERATION, '{"question": ["Q"], "answer": "A"}', "line 2: 'question' is neither a text nor a number"),
        (GENERATION, '{"question": "Q?", "answer": []}', "line 2: 'answer' cannot be"),
        (GENERATION, '{"question": " ", "answer": "A"}', "line 2: the question is empty"),
        (GENERATION, '{"question": "Q?", "answer": "A"', "line 2: not JSON"),
        (GENERATION, "[1]", "line 2: each line is a JSON object"),
        (CHOICE, '{"question": "Q?", "choices": ["a", "b"], "answer": 2}', "line 2: answer is 2, and the 2 choices"),
        (CHOICE, '{"question": "Q?", "choices": ["a"], "answer": 0}', "line 2: 'choices' cannot be"),
        (CHOICE, '{"question": "Q?", "choices": ["a", "b"], "answer": "a"}', "line 2: 'answer' cannot be 'a'"),
    ],
)
def test_a_line_that_cannot_be_honoured_is_refused_by_number(
    tmp_path: Path, task: str, line: str, complaint: str
) -> None:
    good = (
        '{"question": "Q?", "choices": ["a", "b"], "answer": 0}'
        if task is CHOICE
        else '{"question": "Q", "answer": "A"}'
    )
    with pytest.raises(InvalidSetting, match=complaint):
        load_tasks([write(tmp_path, task, f"{good}\n{line}\n")], window=64)


def test_what_is_no_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidSetting, match=r"no task 'sourse'.*source, docstrings"):
        load_tasks(["sourse"], window=64)
    with pytest.raises(InvalidSetting, match="has no lines"):
        load_tasks([write(tmp_path, GENERATION, "\n")], window=64)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InvalidSetting, match=r"latin.txt is no text in UTF-8 \(byte 3\)"):
        load_tasks([str(tmp_path / "latin.txt")], window=64)
    name = write(tmp_path, GENERATION)
    with pytest.raises(InvalidSetting, match="two tasks are called 'capitals'"):
        load_tasks([name, name], window=64)
