"""A tokenizer whose vocabulary is missing, empty, cut off or another model's is refused, and the files are named."""

import itertools
import json
import shutil
import warnings
from pathlib import Path

import pytest

from pargs_jax.errors import InputError, InputWarning
from pargs_jax.text.tokenization import TextTokenizer

SHARED = Path(__file__).parents[3] / "shared"
CONFIGS = ("deberta", "gpt2", "opt", "llama", "llama3")
VOCABULARIES = {
    "deberta": ["spm.model"],
    "gpt2": ["vocab.json", "merges.txt"],
    "opt": ["vocab.json", "merges.txt"],
    "llama": ["tokenizer.model"],
    "llama3": ["tokenizer.json"],
}


@pytest.fixture(scope="module")
def folders(tokenizer_folder):
    """A small tokenizer of each kind, as the model's publishers lay out its files."""
    return {name: tokenizer_folder(name) for name in CONFIGS}


@pytest.fixture
def changed(folders, tmp_path):
    """A copy of a tokenizer without some of its files, or with others in their place."""

    def change(name, gone=(), **files):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        shutil.copytree(folders[name], tmp_path / name)
        for file in gone:
            (tmp_path / name / file).unlink()
        for file, content in files.items():
            (tmp_path / name / file).write_bytes(content)
        return tmp_path / name

    return change


def refusal(folder):
    with pytest.raises(InputError, match=r"\Atokenizer '[^\n]+\Z") as caught:
        TextTokenizer.load(folder)
    return str(caught.value).removeprefix(f"tokenizer {str(folder)!r}: ")


@pytest.mark.parametrize("name", CONFIGS)
def test_whole_tokenizers_load_from_either_layout(folders, name, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", InputWarning)
        tokenizer = TextTokenizer.load(folders[name])
        tokenizer.save(tmp_path)  # as tokenizer.json
        shutil.copyfile(folders[name] / "config.json", tmp_path / "config.json")
        again = TextTokenizer.load(tmp_path)
    ids = tokenizer.encode_prompt("good answer")
    assert ids == again.encode_prompt("good answer") != tokenizer.encode_prompt("bad reply")
    assert (name in ("deberta", "llama")) == (ids[0] == tokenizer.bos_id)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_files_that_are_missing_are_named(changed, name):
    """Whichever files are missing."""
    wanted = VOCABULARIES[name]
    for count in range(1, len(wanted) + 1):
        for gone in itertools.combinations(wanted, count):
            for other in ((), ("tokenizer_config.json",)):
                message = refusal(changed(name, [*gone, *other]))
                assert message.startswith("its vocabulary is missing: there is no "), message
                assert all(file in message for file in (*gone, "tokenizer.json")), message
                assert not any(file in message for file in {*wanted} - {*gone}), message


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("share", [0, 0.5, 0.9])
def test_a_vocabulary_that_is_empty_or_cut_off_is_refused(changed, folders, name, share):
    for file in VOCABULARIES[name]:
        content = (folders[name] / file).read_bytes()
        message = refusal(changed(name, **{file: content[: int(share * len(content))]}))
        assert file in message, message


def test_a_longest_text_that_is_not_a_number_is_refused(changed, folders):
    settings = json.loads((folders["gpt2"] / "tokenizer_config.json").read_text()) | {"model_max_length": "long"}
    message = refusal(changed("gpt2", **{"tokenizer_config.json": json.dumps(settings).encode()}))
    assert message == "model_max_length is 'long', must be a number"


@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_a_broken_file_beside_the_vocabulary_is_the_one_that_is_named(changed, file):
    assert refusal(changed("llama", **{file: b'{"a": '})).startswith(f"{file} cannot be read")


def test_a_tokenizer_json_without_tokens_is_refused(changed, folders):
    definition = json.loads((folders["llama3"] / "tokenizer.json").read_bytes())
    definition["model"] |= {"vocab": {}, "merges": []}
    assert refusal(changed("llama3", **{"tokenizer.json": json.dumps(definition).encode()})) == (
        "tokenizer.json has no tokens"
    )


def test_missing_tokenizer_settings_give_a_warning(changed, folders):
    with pytest.warns(InputWarning, match=r"no tokenizer_config.json with the tokenizer's class"):
        TextTokenizer.load(changed("llama", ["tokenizer_config.json"]), [2])
    definition = json.loads((folders["llama3"] / "tokenizer.json").read_bytes())
    single = [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    tokens = {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}}
    definition["post_processor"] = {
        "type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": tokens
    }  # fmt: skip
    folder = changed("llama3", ["tokenizer_config.json"], **{"tokenizer.json": json.dumps(definition).encode()})
    with pytest.warns(InputWarning, match=r"begins texts with <\|endoftext\|> but names no bos_token"):
        TextTokenizer.load(folder, [0])


def tokenizer_of(tokens):
    """A tokenizer with this many tokens."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"a": 0, **{f"token{i}": i for i in range(1, tokens)}}
    model = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    return TextTokenizer(PreTrainedTokenizerFast(tokenizer_object=model, eos_token="token1"))


@pytest.mark.parametrize(
    ("tokens", "embeddings"),
    [
        (50257, 50257), (50257, 50304), (50257, 50400), (50265, 50272), (128001, 128100), (32000, 32064),
        (32011, 32064), (50295, 51200), (100015, 102400), (151665, 152064), (300, 384), (61, 61),
    ],
)  # fmt: skip
def test_padded_vocabularies_are_usual(tokens, embeddings):
    with warnings.catch_warnings():
        warnings.simplefilter("error", InputWarning)
        tokenizer_of(tokens).check_embeddings(embeddings, "somewhere")


def test_a_tokenizer_must_have_about_as_many_tokens_as_the_model_embeddings():
    tokenizer = tokenizer_of(1000)
    with pytest.raises(InputError, match=r"\Asomewhere: its tokenizer needs 1000 embeddings, but the model has 999\Z"):
        tokenizer.check_embeddings(999, "somewhere")
    with pytest.raises(
        InputError, match="has 1000 tokens, but the model has 2001 embeddings; the tokenizer is incomplete"
    ):
        tokenizer.check_embeddings(2001, "somewhere")
    with pytest.warns(InputWarning, match="has 1000 tokens, but the model has 2000 embeddings; check that"):
        tokenizer.check_embeddings(2000, "somewhere")


def test_a_gap_in_the_ids_counts():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    model = Tokenizer(models.WordLevel({"a": 0, "b": 70}, unk_token="a"))
    with pytest.raises(InputError, match="needs 71 embeddings, but the model has 64"):
        TextTokenizer(PreTrainedTokenizerFast(tokenizer_object=model, eos_token="b")).check_embeddings(64, "it")


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the tokenizers in ../shared")
@pytest.mark.parametrize(
    ("folder", "embeddings"), [("deberta_v3", 128100), ("gpt2", 50257), ("gpt2", 50304), ("mistral_v1", 32064)]
)
def test_real_tokenizers_are_not_refused(folder, embeddings):
    with warnings.catch_warnings():
        warnings.simplefilter("error", InputWarning)
        TextTokenizer.load(SHARED / "tokenizers" / folder).check_embeddings(embeddings, folder)
