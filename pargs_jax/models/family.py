"""What describes an architecture: the form of its checkpoints, and the kind of model that they make."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from pargs_jax.models.model import HeadName, Model
from pargs_jax.models.tables import Row, name_dimensions_of

VALUE_HEADS = ("v_head.summary", "v_head", "value_head", "regression_head")
"""The names that other libraries have for a causal model's linear reward head, which transformers calls `score`: trl,
DeepSpeed-Chat, OpenRLHF and UltraRM."""


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture, declared at the end of its file.

    Attributes:
        model: `model(config, head)` makes the model.
        config: the class of its configs.
        backbone_prefix: the prefix of its backbone's tensor names.
        rows: the backbone's tensors and arrays. Rows for tensors that only some variants have do no harm.
        class_prefix: the prefix of its class names in transformers: `Llama` in `LlamaForCausalLM`.
        class_names: class names that do not follow the pattern, by head.
        head_names: names of a head's tensors in its checkpoints, where they differ from those of the head's rows.
        ignored: a regular expression for names (without prefix) of tensors that checkpoints may contain but nobody
            needs.
        identities: a regular expression for names of tensors that checkpoints lack, because these norms do nothing.
            Their scales are 1, their biases 0, and nobody uses them.
    """

    model: Callable[[Any, HeadName], Model]
    config: Any
    backbone_prefix: str
    rows: tuple[Row, ...]
    class_prefix: str
    class_names: Mapping[HeadName, str] = dataclasses.field(default_factory=dict)
    head_names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ignored: str = ""
    identities: str = ""

    def __post_init__(self) -> None:
        name_dimensions_of(self.rows, "backbone")

    def class_name(self, model: Model) -> str:
        """The name of the transformers class that loads a model."""
        return self.class_names.get(model.head, self.class_prefix + model.head_kind.class_suffix)

    def name_in_rows(self, tensor: str) -> str:
        """A stored tensor's name as the rows spell it. Checkpoints of a bare backbone lack the prefix, or its first
        part: `model.decoder.` may be `decoder.` there."""
        layer, _, last = tensor.rpartition(".")
        if layer in VALUE_HEADS:
            return f"score.{last}"
        for name, stored in self.head_names.items():
            if tensor == stored:
                return name
        prefix = self.backbone_prefix
        while prefix and not tensor.startswith(prefix):
            prefix = prefix.partition(".")[2]
        return tensor.removeprefix(prefix)
