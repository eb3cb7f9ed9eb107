"""Built-in tasks: what they are made of, and that nothing of it was trained on."""

from penstock.eval import BUILT_IN, built_in_task, held_out_text
from penstock.eval.sets.docstrings import HELD_OUT_PHRASINGS, RECALL_MODULES, described_objects, held_out_phrased
from penstock.eval.sets.library import HELD_OUT_MODULES, Document, library_root, split_documents
from penstock.eval.sets.signatures import signature_items
from training.questions import TRAINING_PHRASINGS, read_entries

SOURCE = '''
def greet(self, name: str, *, loud: bool = False) -> str:
    """Say hello to somebody. Then leave."""

def _private(x):
    """Not to be asked about."""

class Greeter:
    """One who greets others."""

    def wave(self, /, hand, times=2):
        """Wave a hand some times."""

    class Inner:
        """Something within another."""
'''


def test_objects_are_read_from_source() -> None:
    found = {
        one.name: one for one in described_objects([Document("pack/__init__.py", SOURCE), Document("_p.py", SOURCE)])
    }
    assert list(found) == ["pack.greet", "pack.Greeter", "pack.Greeter.wave", "pack.Greeter.Inner"]
    assert found["pack.greet"].summary == "Say hello to somebody."
    assert found["pack.greet"].parameters == "self, name, *, loud=False"
    assert found["pack.Greeter.wave"].parameters == "hand, times=2"
    assert found["pack.Greeter"].parameters is None


def test_every_built_in_task_is_the_same_every_time() -> None:
    for name in BUILT_IN:
        first, again = (built_in_task(name, window=512).data_sha256 for _ in range(2))
        assert first == again, name
    assert len({built_in_task(name, window=512).data_sha256 for name in BUILT_IN}) == len(BUILT_IN)


def test_what_is_held_out_is_what_training_leaves_out() -> None:
    training, held_out = split_documents(library_root())
    assert {document.module for document in held_out} <= HELD_OUT_MODULES
    assert not {document.module for document in training} & HELD_OUT_MODULES
    assert all(document.text in held_out_text() for document in held_out)
    asked = described_objects(held_out)
    assert len(asked) > 200
    assert {one.name.partition(".")[0] for one in asked} <= HELD_OUT_MODULES


def test_recall_asks_in_words_that_training_does_not_about_objects_that_it_does() -> None:
    assert not set(HELD_OUT_PHRASINGS) & set(TRAINING_PHRASINGS)
    assert not RECALL_MODULES & HELD_OUT_MODULES
    training, _ = split_documents(library_root())
    known = described_objects(document for document in training if document.module in RECALL_MODULES)
    trained = {entry.name: entry.summary for entry in read_entries()}
    functions = [one for one in known if one.name.count(".") == 1]
    same = [one for one in functions if trained.get(one.name) == one.summary]
    # Some are known by another name, or not exported at all.
    assert len(same) > 0.7 * len(functions)
    assert [question.text for question in held_out_phrased(known[:2])] == [
        HELD_OUT_PHRASINGS[i].format(x=known[i].name) for i in range(2)
    ]


def test_signatures_have_four_choices_and_one_is_right() -> None:
    objects = {one.name: one for one in described_objects(split_documents(library_root())[1])}
    items = signature_items(objects.values())
    assert len(items) > 100
    for item in items:
        name = item.question.removeprefix("What is the signature of ").removesuffix("?")
        assert len(set(item.choices)) == 4
        assert item.choices[item.right] == f"{name}({objects[name].parameters})"
    places = [sum(item.right == place for item in items) for place in range(4)]
    assert min(places) > len(items) / 8
