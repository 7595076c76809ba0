"""What the checkpoints of one architecture look like, and the kind of model that they make."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from pargs_jax.models.model import HeadName, Model
from pargs_jax.models.tables import Row, name_dimensions_of


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture, declared at the end of its file.

    Attributes:
        model: `model(config, head)` makes the model.
        config: the class of its configs.
        backbone_prefix: what the names of the backbone's tensors begin with.
        rows: the backbone's tensors and arrays. Rows for tensors that only some variants have do no harm.
        class_prefix: what the names of its classes in transformers begin with: `Llama` of `LlamaForCausalLM`.
        class_names: those of them that are called otherwise, by head.
        ignored: matches the names (without prefix) of tensors that checkpoints may have and nothing needs.
    """

    model: Callable[[Any, HeadName], Model]
    config: Any
    backbone_prefix: str
    rows: tuple[Row, ...]
    class_prefix: str
    class_names: Mapping[HeadName, str] = dataclasses.field(default_factory=dict)
    ignored: str = ""

    def __post_init__(self) -> None:
        name_dimensions_of(self.rows, "backbone")

    def class_name(self, model: Model) -> str:
        """The class of transformers that loads a model."""
        return self.class_names.get(model.head, self.class_prefix + model.head_kind.class_suffix)

    def without_prefix(self, tensor: str) -> str:
        """A stored tensor's name as the rows have it. Checkpoints of a bare backbone lack the prefix or its beginning:
        `model.decoder.` may be `decoder.` there."""
        prefix = self.backbone_prefix
        while prefix and not tensor.startswith(prefix):
            prefix = prefix.partition(".")[2]
        return tensor.removeprefix(prefix)
