"""Choose the attention implementation for a mesh, and shard attention over the mesh."""

from typing import Literal, get_args

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from thoughtbubbles import ArchitectureConfig
from thoughtbubbles.attention import Attend, attend
from thoughtbubbles.kernels import attend_cudnn, attend_splash
from train.devices.mesh import batch_axes

Attention = Literal["auto", "xla", "splash", "cudnn"]
PLATFORMS = {"splash": "tpu", "cudnn": "gpu"}


def resolve(config: ArchitectureConfig, mesh: Mesh, attention: Attention) -> Attention:
    """Choose the attention implementation of a model on a mesh, with `"auto"` resolved.

    Args:
        config: Config of the decoder.
        mesh: Mesh whose devices run the model.
        attention: `"splash"` for TPUs, `"cudnn"` for NVIDIA GPUs, `"xla"` for all devices. `"auto"`
            is the kernel of the mesh's platform, or `"xla"` if no kernel fits: on CPUs, for models
            without kernels, and for what cuDNN can't run (float32, keys that are too wide, a
            computer without cuDNN).

    Returns:
        Name of the attention: "xla", "splash" or "cudnn".

    Raises:
        ValueError: The attention is unknown, or these devices can't run it for this model.
    """
    if attention not in get_args(Attention):
        raise ValueError(f"attention={attention!r}: choose one of {', '.join(get_args(Attention))}")
    platform = mesh.devices.flat[0].platform
    if config.attention_inputs() is None:
        if attention not in ("auto", "xla"):
            raise ValueError(
                f"attention={attention!r}: {type(config).__name__} takes no kernel: choose auto"
            )
        return "xla"
    if attention == "auto":
        if platform == "gpu":
            return "xla" if _cudnn_obstacle(config) else "cudnn"
        return "splash" if platform == "tpu" else "xla"
    if PLATFORMS.get(attention, platform) != platform:
        raise ValueError(
            f"attention={attention!r} runs on {PLATFORMS[attention]} devices and the mesh has "
            f"{platform} devices: choose auto or xla"
        )
    if attention == "cudnn" and (obstacle := _cudnn_obstacle(config)):
        raise ValueError(f"attention='cudnn' can't run this model: {obstacle}: choose xla")
    return attention


def attention_on(mesh: Mesh, attention: Attention) -> Attend:
    """Return the attention function with a name from `resolve`, for arrays sharded over a mesh."""
    if attention == "xla":
        return attend
    return on_mesh({"splash": attend_splash, "cudnn": attend_cudnn}[attention], mesh)


def on_mesh(kernel: Attend, mesh: Mesh) -> Attend:
    """Wrap a kernel that XLA can't partition, so that each device runs it on its rows and heads.

    Rows are split over `data` and `fsdp`, and heads of queries and keys over `tensor`, in the same
    way as residuals and parameters, so that no array moves between devices. Only the gradient of
    the bias, to which all heads contribute, is summed over `tensor`.
    """
    if mesh.size == 1:
        return kernel
    batch, tensor = batch_axes(mesh), "tensor" if "tensor" in mesh.shape else None
    heads = P(batch, None, tensor, None)

    def attend_parts(query, key, value, bias=None):
        parts = jax.shard_map(
            kernel,
            mesh=mesh,
            in_specs=(heads, heads, heads, None if bias is None else P(batch)),
            out_specs=heads,
            # Pallas kernels don't say over which axes their results vary.
            check_vma=False,
        )
        return parts(query, key, value, bias)

    return attend_parts


def _cudnn_obstacle(config: ArchitectureConfig) -> str | None:
    """Reason why cuDNN's attention can't run the model here, in jax's words; None if it can."""
    try:
        jax.eval_shape(attend_cudnn, *(config.attention_inputs() or ()))
    except (RuntimeError, ValueError) as error:
        return str(error).rstrip(".")
    return None
