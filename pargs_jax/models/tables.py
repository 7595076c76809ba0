"""Weight tables: which tensor of a Hugging Face checkpoint becomes which array, and the names of its dimensions.

Rows of the same tensor are arrays that lie side by side in it, in the order of the table.
"""

from collections.abc import Iterable
from typing import NamedTuple

from pargs_jax.sharding import name_dimensions

Axes = tuple[str | None, ...]

WITH_OWN_ADDITIONS = ("backbone.embed.embedding", "head.linear.kernel")
"""The arrays outside the blocks that can have low-rank additions (`pargs_jax.models.lora`)."""


class Row(NamedTuple):
    """One line of a table: a tensor, and the array that it becomes. `{}` stands for the layer number.

    Attributes:
        tensor: its name in checkpoints, without the backbone's prefix.
        path: the array's path below `backbone` or `head`.
        axes: names of the array's last dimensions (`sharding.AXIS_OF`), which say how it is split over a mesh.
        transpose: whether the tensor is transposed when read: torch stores linear layers as [out, in].
    """

    tensor: str
    path: str
    axes: Axes = ()
    transpose: bool = False


def linear(tensor: str, path: str, axes: Axes, transpose: bool = True) -> tuple[Row, Row]:
    """A matrix and its bias, if it has one."""
    return (
        Row(f"{tensor}.weight", f"{path}.kernel", axes, transpose),
        Row(f"{tensor}.bias", f"{path}.bias", _bias_axes(axes)),
    )


def _bias_axes(axes: Axes) -> Axes:
    """Biases along the width are small, so every device holds them in full."""
    return () if axes[-1:] == ("width",) else axes[-1:]


def norm(tensor: str, path: str) -> tuple[Row, Row]:
    return Row(f"{tensor}.weight", f"{path}.scale"), Row(f"{tensor}.bias", f"{path}.bias")


def name_dimensions_of(rows: Iterable[Row], below: str) -> None:
    """Tells `pargs_jax.sharding` how a table's arrays are split; `below` is `backbone` or `head`."""
    for row in rows:
        path = f"{below}.{row.path.replace('.{}', '')}"
        name_dimensions(path, row.axes)
        if path.endswith(".kernel"):  # its scales in int8 are placed like a bias
            name_dimensions(f"{path}_scale", _bias_axes(row.axes))
        if path in WITH_OWN_ADDITIONS:  # these are split as it is
            layer, (inputs, outputs) = path.rpartition(".")[0], row.axes
            name_dimensions(f"{layer}.lora_in", (inputs, None))
            name_dimensions(f"{layer}.lora_out", (None, outputs))
