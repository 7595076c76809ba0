"""Tokenised rows on disk: the same as in memory, in shares as whole, made once, and made again when damaged."""

import copy
import json
import os
import threading
import time

import numpy as np
import pytest

from pargs_jax.data import example_cache
from pargs_jax.data.batches import Batches
from pargs_jax.data.example_cache import ExampleCache
from pargs_jax.data.example_sets import ExampleSet
from pargs_jax.data.examples import Cutting, digest_of
from pargs_jax.data.packing import Packing
from pargs_jax.data.sources import Rows, Share
from pargs_jax.errors import InputError
from pargs_jax.testing import tiny_tokenizer
from pargs_jax.text.prompts import get_form

ADVICE = "give another folder"


SCORED = {
    "require_rejected": False,
    "labels": 0,
    "reward_range": (-99, 99),
    "cutting": Cutting(tiny_tokenizer(), 40, 1),
}


def rows_of(count, scored=False):
    """Pairs of many lengths, or scored answers; some are bad."""
    for i in range(count):
        if i % 7 == 3:
            yield {"prompt": f"Why {i}?", "chosen": "", "rejected": "No."}
        else:
            answers = {"chosen": f"Because {'of it ' * (i % 5)}{i}.", "rejected": f"{'No ' * (i % 3)}é{i}."}
            row = {"prompt": f"Why {i}?" * (1 + i % 4), **answers, "labels": [1, i / 100], "reward": i / 3}
            yield row | {"rejected": None} if scored else row


@pytest.fixture
def write(tmp_path):
    def written(ending="jsonl", count=60, scored=False):
        path = tmp_path / f"rows.{ending}"
        if ending == "parquet":
            import pyarrow
            import pyarrow.parquet

            table = pyarrow.Table.from_pylist(list(rows_of(count)))
            pyarrow.parquet.write_table(table, path, row_group_size=7)
        else:
            path.write_text("\n".join(json.dumps(row) + "\n" * (i % 2) for i, row in enumerate(rows_of(count, scored))))
        return path

    return written


def set_of(path, **changes):
    cutting = Cutting(tiny_tokenizer(), max_length=40)
    values = {"require_rejected": True, "reward_range": None, "labels": 2, "cutting": cutting} | changes
    return ExampleSet(str(path), "train", {}, get_form("plain"), **values)


def get(folder, wanted, count=1, said=None):
    """The set, as each of `count` processes has it."""
    found, said = [None] * count, [] if said is None else said

    def process(number):
        try:
            cache = ExampleCache(folder, Share(number, count), said.append, ADVICE)
            # A tokenizer of its own, as a process has: transformers 5.7 refuses to use one in two threads.
            own = copy.deepcopy(wanted) if count > 1 else wanted
            found[number] = cache.get(own, own.key(), f"token{time.monotonic_ns() if count == 1 else ''}")
        except InputError as error:
            found[number] = error

    threads = [threading.Thread(target=process, args=[number]) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found if count > 1 else found[0]


def same(one, other):
    assert len(one) == len(other) > 0 and digest_of(one) == digest_of(other)
    for mine, theirs in zip(one, other, strict=True):
        for name in ("rewards", "labels"):
            mine_too, theirs_too = getattr(mine, name), getattr(theirs, name)
            assert (mine_too is None) == (theirs_too is None)
            assert mine_too is None or mine_too == pytest.approx(theirs_too)


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_the_shares_of_a_file_are_the_file(write, ending):
    path = write(ending)
    whole = list(Rows(path))
    for count in (1, 2, 3, 7, 100):
        shares = [list(Rows(path, share=Share(number, count))) for number in range(count)]
        assert [row for share in shares for row in share] == whole
        assert count > 7 or all(shares)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cutting": Cutting(tiny_tokenizer(), 40, 2, prefix_tokenizer=tiny_tokenizer())},
        SCORED,
        {"held_out": 0.3, "side": "held out"},
    ],
    ids=["pairs", "prefixes", "rewards", "held out"],
)  # fmt: skip
def test_examples_on_disk_are_those_in_memory(write, tmp_path, changes):
    path = write(scored=changes is SCORED)
    wanted = set_of(path, **changes)
    refused = []
    examples, found = wanted.load(refused.append)
    cached = get(tmp_path / "cache", wanted)
    again = get(tmp_path / "cache", wanted)
    for there in (cached, again):
        same(there.examples, examples)
        assert there.examples.digest == digest_of(examples) and there.found == found
        np.testing.assert_array_equal(there.examples.lengths.prompts, [len(x.prompt) for x in examples])
        there.copy_bad_rows(tmp_path / "bad.jsonl")
        assert (tmp_path / "bad.jsonl").read_text() == "".join(row.text() for row in refused)


def test_processes_that_each_tokenise_a_share_have_what_one_process_has(write, tmp_path):
    wanted = set_of(write())
    examples, found = wanted.load()
    sets = get(tmp_path / "cache", wanted, count=3)
    for there in sets:
        same(there.examples, examples)
        assert there.found == found and there.examples.digest == digest_of(examples)
    assert [part["examples"] for part in contents(tmp_path / "cache")["parts"]] == [18, 17, 16]
    for there in get(tmp_path / "cache", wanted, count=3):  # now from the cache
        same(there.examples, examples)
    same(get(tmp_path / "cache", wanted).examples, examples)
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {"", ".lock"}


def contents(cache):
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    return json.loads((folder / "set.json").read_text())["content"]


def test_an_error_in_one_share_ends_all_processes(write, tmp_path):
    path = write()
    with path.open("a") as file:
        file.write('\n{"prompt": "a", "chosen": "b", "rejected": "c", "split": "elsewhere"}\n')
    line = len(path.read_text().split("\n")) - 1
    for error in get(tmp_path / "cache", set_of(path), count=3):
        assert f"line {line}: split is 'elsewhere'" in str(error)
    path.write_text('{"prompt": "a"}\n' * 9)
    for error in get(tmp_path / "cache", set_of(path), count=2):
        assert "none of its 9 rows can be used; line 1: chosen is missing" in str(error)


def test_grouped_answers_are_read_by_the_first_process(write, tmp_path):
    path = tmp_path / "scored.jsonl"
    rows = [{"prompt": f"Why {i % 3}?", "response": f"So {i}.", "reward": i} for i in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cutting = Cutting(tiny_tokenizer(), 40, 1)
    wanted = set_of(path, require_rejected=False, labels=0, reward_range=(-9, 9), cutting=cutting, samples=3)
    examples, found = wanted.load()
    assert len(examples) == 3 and found.report.ungrouped == 1
    for there in get(tmp_path / "cache", wanted, count=2):
        same(there.examples, examples)


def damage(path, kind):
    content = path.read_bytes()
    if kind == "removed":
        path.unlink()
    elif kind == "cut":
        path.write_bytes(content[:-1])
    else:
        path.write_bytes(bytes([content[0] ^ 1]) + content[1:])


@pytest.mark.parametrize("kind", ["removed", "cut", "altered"])
@pytest.mark.parametrize(
    "name", ["set.json", "part-0/tokens", "part-0/lengths", "part-0/labels", "part-0/bad_rows.jsonl"]
)
def test_a_damaged_set_is_made_again(write, tmp_path, name, kind):
    wanted, said = set_of(write(count=8)), []
    expected = get(tmp_path / "cache", wanted).examples
    (folder,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    opened = [*expected]
    damage(folder / name, kind)
    again = get(tmp_path / "cache", wanted, said=said)
    assert ["is damaged; tokenising again" in line for line in said] == [True]
    same(again.examples, opened)
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == ["", ".lock"]


def test_whatever_decides_the_examples_is_in_the_key(write, tmp_path):
    path = write()
    wanted = set_of(path)
    keys = [
        wanted.key(),
        set_of(path, cutting=Cutting(tiny_tokenizer(), 41)).key(),
        set_of(path, labels=0).key(),
        set_of(path, held_out=0.1).key(),
        set_of(path, held_out=0.1, side="held out").key(),
        set_of(path, cutting=Cutting(tiny_tokenizer(), 40, prefix_tokenizer=tiny_tokenizer())).key(),
    ]
    assert wanted.key() == keys[0]
    status = path.stat()
    path.write_bytes(path.read_bytes().replace(b"No", b"So"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # the same size and time, another content
    keys.append(wanted.key())
    os.utime(path, ns=(1, 1))
    keys.append(wanted.key())
    assert len(set(keys)) == len(keys)


def test_a_source_that_changes_while_it_is_read_is_refused(write, tmp_path, monkeypatch):
    path = write()
    wanted = set_of(path)
    key = wanted.key()
    monkeypatch.setattr(ExampleSet, "check", lambda *_: path.write_text(path.read_text() + "\n"))
    cache = ExampleCache(tmp_path / "cache", Share(), print, ADVICE)
    with pytest.raises(InputError, match=r"rows\.jsonl: was changed while it was read; start again"):
        cache.get(wanted, key, "token")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_run_waits_for_another_that_makes_the_same_set(write, tmp_path, monkeypatch):
    wanted, reads, said = set_of(write()), [], []
    monkeypatch.setattr(example_cache, "_SECONDS_BEFORE_NOTICE", 0.1)
    read = ExampleSet.read

    def slow(self, *arguments):
        reads.append(self)
        time.sleep(0.5)
        return read(self, *arguments)

    monkeypatch.setattr(ExampleSet, "read", slow)
    runs = [threading.Thread(target=get, args=(tmp_path / "cache", wanted, 1, said)) for _ in range(2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert len(reads) == 1
    assert said == [f"{tmp_path / 'cache'}: waiting for another run that tokenises the same rows"]


def test_what_a_killed_run_left_is_removed_by_the_next_that_makes_the_set(write, tmp_path):
    wanted = set_of(write())
    left = tmp_path / "cache" / f"{wanted.key()}.killed"
    (left / "part-0").mkdir(parents=True)
    (left / "build").touch()
    same(get(tmp_path / "cache", wanted).examples, wanted.load()[0])
    assert not left.exists()


def test_a_full_disk_is_one_line(write, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(example_cache.PartWriter, "add", full)
    with pytest.raises(InputError, match=r"cache: cannot be written \(No space left on device\); give another folder"):
        raise get(tmp_path / "cache", set_of(write()))


def test_processes_that_do_not_share_the_folder_say_so(write, tmp_path, monkeypatch):
    monkeypatch.setattr(example_cache, "SHARED_WITHIN", 0.2)
    cache = ExampleCache(tmp_path / "own", Share(1, 2), print, ADVICE)
    with pytest.raises(InputError, match="own: its processes do not share it; give another folder"):
        cache.get(set_of(write()), "key", "token")


@pytest.mark.parametrize("packing", [None, Packing(80)])
def test_batches_of_stored_examples_are_those_of_examples_in_memory(write, tmp_path, packing):
    wanted = set_of(write())
    stored, examples = get(tmp_path / "cache", wanted).examples, wanted.load()[0]
    streams = [Batches(each, 4, 40, seed=3, packing=packing) for each in (stored, examples)]
    for step in (0, 5, 17):
        one, other = (stream.batch(step) for stream in streams)
        for name, mine, theirs in zip(one._fields, one, other, strict=True):
            if mine is None or name == "packed":
                assert theirs is mine or len(mine) == len(theirs)
            else:
                np.testing.assert_array_equal(mine, theirs)
        if packing is not None:
            for mine, theirs in zip(one.packed, other.packed, strict=True):
                np.testing.assert_array_equal(mine, theirs)


def test_a_process_reads_only_its_own_rows_of_a_batch(write, tmp_path):
    examples = set_of(write()).load()[0]
    read = []

    class Watched(list):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    own = np.array([True, False, False, True])
    whole = Batches(examples, 4, 40, seed=0).batch(2)
    part = Batches(Watched(examples), 4, 40, seed=0, own=own).batch(2)
    assert len(read) == 2
    np.testing.assert_array_equal(part.prompt_lengths, whole.prompt_lengths)
    np.testing.assert_array_equal(part.answer_lengths, whole.answer_lengths)
    for name in ("prompts", "answers", "labels"):
        mine, theirs = getattr(part, name), getattr(whole, name)
        np.testing.assert_array_equal(mine[own], theirs[own])
        assert mine.shape == theirs.shape and not mine[~own].any()
