"""Which attention the devices of a mesh run, and how it is split over them."""

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
    """The attention that a model gets on a mesh, `"auto"` replaced.

    Args:
        config: Config of the decoder.
        mesh: Mesh whose devices run it.
        attention: `"splash"` for TPUs, `"cudnn"` for NVIDIA GPUs, `"xla"` for all; `"auto"` is the
            kernel of the mesh's platform, or `"xla"` where there is none: on CPUs, and for what
            cuDNN can't run (float32, keys wider than it takes, a computer without cuDNN).

    Raises:
        ValueError: There is no such attention, or these devices can't run it for this model.
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
    """The function for a resolved attention, for arrays that are sharded over the mesh."""
    if attention == "xla":
        return attend
    return on_mesh({"splash": attend_splash, "cudnn": attend_cudnn}[attention], mesh)


def on_mesh(kernel: Attend, mesh: Mesh) -> Attend:
    """A kernel that XLA can't partition, run by each device on its rows and heads.

    Rows split over `data` and `fsdp`, heads of queries and of keys over `tensor`, as residuals and
    parameters do, so that nothing moves between devices; only the gradient of the bias, to which
    all heads contribute, is summed over `tensor`.
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
    """Why cuDNN's attention can't run the model here, in jax's words."""
    try:
        jax.eval_shape(attend_cudnn, *(config.attention_inputs() or ()))
    except (RuntimeError, ValueError) as error:
        return str(error).rstrip(".")
    return None
