"""Which tensor of a Hugging Face checkpoint is which array: one table a family."""

from collections.abc import Callable
from typing import Any, NamedTuple

from pargs_jax.models.causal import CausalModel
from pargs_jax.models.deberta import DebertaConfig
from pargs_jax.models.encoder import EncoderModel
from pargs_jax.models.gpt2 import GPT2Config
from pargs_jax.models.llama import LlamaConfig
from pargs_jax.models.model import HeadName, Model
from pargs_jax.models.opt import OPTConfig
from pargs_jax.models.prefix_causal import PrefixCausalModel


class Row(NamedTuple):
    """One line of a table: a checkpoint tensor, the array it becomes, and whether it is transposed on the way.

    Where a tensor is several arrays side by side, `part` says which of how many this one is.
    """

    tensor: str
    path: str
    transpose: bool = False
    part: tuple[int, int] = (0, 1)


class Head(NamedTuple):
    """A head as checkpoints know it: the name of their class, and its tensors (paths below `head`)."""

    class_name: str
    rows: tuple[Row, ...]


class Family(NamedTuple):
    """What the checkpoints of one architecture look like, and the kind of model they make: `model(config, head)`.

    `{}` in a row stands for the layer's number. `ignored` matches the names (without the backbone's prefix) of tensors
    that checkpoints may have and nothing needs.
    """

    model: Callable[[Any, HeadName], Model]
    config: Any
    backbone_prefix: str
    rows: tuple[Row, ...]
    heads: dict[HeadName, Head]
    ignored: str

    def without_prefix(self, tensor: str) -> str:
        """A stored tensor's name as the rows have it. Checkpoints of a bare backbone lack the prefix or its beginning:
        `model.decoder.` may be `decoder.` there."""
        prefix = self.backbone_prefix
        while prefix and not tensor.startswith(prefix):
            prefix = prefix.partition(".")[2]
        return tensor.removeprefix(prefix)


def linear(tensor: str, path: str, transpose: bool = True, part: tuple[int, int] = (0, 1)) -> tuple[Row, Row]:
    return Row(f"{tensor}.weight", f"{path}.kernel", transpose, part), Row(f"{tensor}.bias", f"{path}.bias", part=part)


def layer_norm(tensor: str, path: str) -> tuple[Row, Row]:
    return Row(f"{tensor}.weight", f"{path}.scale"), Row(f"{tensor}.bias", f"{path}.bias")


def causal_heads(language_model: str, reward_model: str) -> dict[HeadName, Head]:
    return {
        "vocabulary": Head(language_model, (Row("lm_head.weight", "linear.kernel", transpose=True),)),
        "reward": Head(reward_model, (Row("score.weight", "linear.kernel", transpose=True),)),
    }


def deberta(config: DebertaConfig, head: HeadName) -> EncoderModel | PrefixCausalModel:
    kind = {"full": EncoderModel, "prefix_causal": PrefixCausalModel}[config.attention]
    return kind(config, head)


FAMILIES: dict[str, Family] = {
    "deberta-v2": Family(
        deberta,
        DebertaConfig,
        "deberta.",
        (
            Row("embeddings.word_embeddings.weight", "embed.embedding"),
            Row("embeddings.position_embeddings.weight", "positions.embedding"),
            Row("embeddings.token_type_embeddings.weight", "segments.embedding"),
            Row("embeddings.embed_proj.weight", "embed_out.kernel", transpose=True),
            *layer_norm("embeddings.LayerNorm", "embed_norm"),
            Row("encoder.rel_embeddings.weight", "relative.embedding"),
            *layer_norm("encoder.LayerNorm", "relative_norm"),
            *linear("encoder.conv.conv", "convolution.conv"),
            *layer_norm("encoder.conv.LayerNorm", "convolution.norm"),
            *linear("encoder.layer.{}.attention.self.query_proj", "layers.{}.query"),
            *linear("encoder.layer.{}.attention.self.key_proj", "layers.{}.key"),
            *linear("encoder.layer.{}.attention.self.value_proj", "layers.{}.value"),
            *linear("encoder.layer.{}.attention.self.pos_key_proj", "layers.{}.position_key"),
            *linear("encoder.layer.{}.attention.self.pos_query_proj", "layers.{}.position_query"),
            *linear("encoder.layer.{}.attention.output.dense", "layers.{}.out"),
            *layer_norm("encoder.layer.{}.attention.output.LayerNorm", "layers.{}.norm1"),
            *linear("encoder.layer.{}.intermediate.dense", "layers.{}.up"),
            *linear("encoder.layer.{}.output.dense", "layers.{}.down"),
            *layer_norm("encoder.layer.{}.output.LayerNorm", "layers.{}.norm2"),
        ),
        {
            "reward": Head(
                "DebertaV2ForSequenceClassification",
                (*linear("pooler.dense", "dense"), *linear("classifier", "linear")),
            )
        },
        ignored=r"embeddings\.(position_ids|position_embeddings\.weight)|(lm_predictions|mask_predictions|cls)\..*",
    ),
    "gpt2": Family(
        CausalModel,
        GPT2Config,
        "transformer.",
        (
            Row("wte.weight", "embed.embedding"),
            Row("wpe.weight", "positions.embedding"),
            *layer_norm("h.{}.ln_1", "layers.{}.norm1"),
            # GPT-2 keeps its linear layers as [in, out], which is our order already.
            *linear("h.{}.attn.c_attn", "layers.{}.query", transpose=False, part=(0, 3)),
            *linear("h.{}.attn.c_attn", "layers.{}.key", transpose=False, part=(1, 3)),
            *linear("h.{}.attn.c_attn", "layers.{}.value", transpose=False, part=(2, 3)),
            *linear("h.{}.attn.c_proj", "layers.{}.out", transpose=False),
            *layer_norm("h.{}.ln_2", "layers.{}.norm2"),
            *linear("h.{}.mlp.c_fc", "layers.{}.up", transpose=False),
            *linear("h.{}.mlp.c_proj", "layers.{}.down", transpose=False),
            *layer_norm("ln_f", "norm"),
        ),
        causal_heads("GPT2LMHeadModel", "GPT2ForSequenceClassification"),
        ignored=r"h\.\d+\.attn\.(masked_)?bias",
    ),
    "llama": Family(
        CausalModel,
        LlamaConfig,
        "model.",
        (
            Row("embed_tokens.weight", "embed.embedding"),
            Row("layers.{}.input_layernorm.weight", "layers.{}.norm1.scale"),
            *linear("layers.{}.self_attn.q_proj", "layers.{}.query"),
            *linear("layers.{}.self_attn.k_proj", "layers.{}.key"),
            *linear("layers.{}.self_attn.v_proj", "layers.{}.value"),
            *linear("layers.{}.self_attn.o_proj", "layers.{}.out"),
            Row("layers.{}.post_attention_layernorm.weight", "layers.{}.norm2.scale"),
            *linear("layers.{}.mlp.gate_proj", "layers.{}.gate"),
            *linear("layers.{}.mlp.up_proj", "layers.{}.up"),
            *linear("layers.{}.mlp.down_proj", "layers.{}.down"),
            Row("norm.weight", "norm.scale"),
        ),
        causal_heads("LlamaForCausalLM", "LlamaForSequenceClassification"),
        ignored=r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
    ),
    "opt": Family(
        CausalModel,
        OPTConfig,
        "model.decoder.",
        (
            Row("embed_tokens.weight", "embed.embedding"),
            Row("embed_positions.weight", "positions.embedding"),
            Row("project_in.weight", "project_in.kernel", transpose=True),
            *linear("layers.{}.self_attn.q_proj", "layers.{}.query"),
            *linear("layers.{}.self_attn.k_proj", "layers.{}.key"),
            *linear("layers.{}.self_attn.v_proj", "layers.{}.value"),
            *linear("layers.{}.self_attn.out_proj", "layers.{}.out"),
            *layer_norm("layers.{}.self_attn_layer_norm", "layers.{}.norm1"),
            *linear("layers.{}.fc1", "layers.{}.up"),
            *linear("layers.{}.fc2", "layers.{}.down"),
            *layer_norm("layers.{}.final_layer_norm", "layers.{}.norm2"),
            *layer_norm("final_layer_norm", "norm"),
            Row("project_out.weight", "project_out.kernel", transpose=True),
        ),
        causal_heads("OPTForCausalLM", "OPTForSequenceClassification"),
        ignored=r"version",
    ),
}
