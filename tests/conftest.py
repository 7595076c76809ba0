"""Four virtual devices for every test; what sets no mesh runs on the first of them. Small tokenizers of each kind."""

import gc
import io
import json
import os
import shutil
from functools import cache

import jax
import pytest

from pargs_jax.mesh import prepare_virtual_devices
from pargs_jax.models.hf import save_model
from pargs_jax.testing import tiny_model, tiny_tokenizer

# Most of a test's time is compilation: LLVM's, which is told to do little; MLIR's, which fusions are written in by
# default, and not so here; and the splitting of programs for more threads, which small ones do not need. The commands
# that tests start inherit this. (An extra option that a later XLA does not know is ignored; an unknown flag is fatal.)
QUICK = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_parallel_codegen_split_count=1 --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
)
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}".strip()
prepare_virtual_devices(4)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)


@pytest.fixture(scope="session", autouse=True)
def tokenised_rows_are_kept_in_a_folder_of_the_tests(tmp_path_factory):
    os.environ["PARGS_JAX_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_are_forgotten():
    """After each file: every program maps memory, and Linux lets a process have only so many maps (65,530). XLA ends
    with a segmentation fault beyond them."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def save_tiny(tmp_path_factory):
    """Saves a random model with the demo's tokenizer and returns its folder."""

    def save(head, *, family="llama", seed=0, vocab_size=None, eos=2, name="model"):
        folder = tmp_path_factory.mktemp(head) / name
        vocab_size = vocab_size or tiny_tokenizer().vocab_size
        model, params = tiny_model(family, head, seed=seed, vocab_size=vocab_size)
        save_model(folder, model, params, special_tokens={"bos_token_id": 1, "eos_token_id": eos})
        tiny_tokenizer().save(folder)
        return str(folder)

    return save


TEXTS = [f"good answer {i} and bad reply {i * i}, said the {word}\n" for i in range(200) for word in ("cat", "old man")]
PIECES = 320
TOKENIZERS = {
    # model_type of the config, class of the tokenizer
    "deberta": ("deberta-v2", "DebertaV2Tokenizer"),
    "gpt2": ("gpt2", "GPT2Tokenizer"),
    "opt": ("opt", "GPT2Tokenizer"),
    "llama": ("llama", "LlamaTokenizer"),
    "llama3": ("llama", "PreTrainedTokenizerFast"),
}


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """Makes a small tokenizer of a kind, as the model's publishers lay out its files, and returns its folder."""

    @cache
    def make(name):
        model_type, tokenizer_class = TOKENIZERS[name]
        folder = tmp_path_factory.mktemp(name)
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
        settings = {"tokenizer_class": tokenizer_class, "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
        if name == "deberta":
            train_sentencepiece(
                folder / "spm.model", vocab_size=80, model_type="unigram", unk_id=3, unk_piece="[UNK]", pad_id=0,
                pad_piece="[PAD]", bos_id=1, bos_piece="[CLS]", eos_id=2, eos_piece="[SEP]",
            )  # fmt: skip
            settings = {"tokenizer_class": tokenizer_class}
        elif name == "llama":
            train_sentencepiece(folder / "tokenizer.model", vocab_size=PIECES, model_type="bpe", byte_fallback=True)
            settings |= {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
        elif name == "llama3":
            train_byte_level().save(str(folder / "tokenizer.json"))
        else:
            train_byte_level().save_model(str(folder))
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        return folder

    return make


def train_sentencepiece(path, **options):
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, minloglevel=2, hard_vocab_limit=False, **options
    )
    path.write_bytes(model.getvalue())


def train_byte_level():
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(TEXTS, vocab_size=PIECES, special_tokens=["<|endoftext|>"])
    return tokenizer


@pytest.fixture(scope="module")
def browser():
    """Chromium, for tests of pages."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e '.[browser]'")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("needs Chromium, such as Debian's package chromium")
    with playwright.sync_playwright() as started:
        yield started.chromium.launch(executable_path=chromium)


@pytest.fixture(scope="session")
def contrasts_of():
    """Measures the contrast of every text on a page with what is behind it, as WCAG 2 defines it."""
    return lambda page: page.evaluate(_CONTRASTS)


_CONTRASTS = """() => {
  const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const over = ([r, g, b, a = 1], below) => [r, g, b].map((x, i) => x * a + below[i] * (1 - a));
  const linear = (x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  const luminance = (rgb) => rgb.map((x) => linear(x / 255))
    .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
  return [...document.querySelectorAll("body *")].filter((node) => node.offsetParent && [...node.childNodes]
    .some((child) => child.nodeType === 3 && child.data.trim())).map((node) => {
      const layers = [];
      for (let at = node; at; at = at.parentElement) layers.unshift(channels(getComputedStyle(at).backgroundColor));
      const below = layers.reduce((under, layer) => over(layer, under), [255, 255, 255]);
      const [a, b] = [luminance(over(channels(getComputedStyle(node).color), below)), luminance(below)];
      return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    });
}"""
