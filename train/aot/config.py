"""Config of `thoughtbubbles compile`: a pretraining run, and the topology to compile it for."""

import dataclasses

from train.aot.program import What
from train.aot.topology import KNOWN, Topology
from train.devices.attention import Attention
from train.pretraining.config import RunConfig
from train.pretraining.presets import PRESETS

# Options that only affect a real run, and must keep their defaults.
IDLE = ("dry_run", "profile", "peak_tflops", "distributed", "init", "train")


@dataclasses.dataclass(frozen=True)
class CompileConfig(RunConfig):
    """Config of a pretraining run, with the topology and the program to compile.

    Attributes:
        topology: Chips to compile for, e.g. v5e:2x4, v5p:4x4x4, v6e:4x4, h100:16.
        what: Program to compile: the train "step", or a cached "decode" step of `batch_size` rows
            with a capacity of `data.seq_len` tokens.
        advise: Whether to try changes of a config that does not fit, and to print the first change
            with which the program fits.
        json: JSON file for the report; none by default.
    """

    topology: str = ""
    what: What = "step"
    advise: bool = True
    json: str | None = None


def presets() -> dict[str, CompileConfig]:
    """Return each preset of `train.pretraining.presets` as a config without a topology, by name."""
    return {
        name: CompileConfig(
            **{field.name: getattr(run, field.name) for field in dataclasses.fields(run)}
        )
        for name, run in PRESETS.items()
    }


def check_config(config: CompileConfig) -> None:
    """Check that a config names a topology and sets no option of a real run.

    Raises:
        ValueError: The config has no topology, or sets one of `IDLE`, which only a real run uses.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(RunConfig)}
    for name in IDLE:
        if getattr(config, name) != defaults[name]:
            raise ValueError(f"{name}={getattr(config, name)}: nothing is run here, leave it out")
    if not config.topology:
        examples = ", ".join(f"{chip}:{sizes[-1]}" for chip, sizes in KNOWN.items())
        raise ValueError(f"compile for what? pass --topology, e.g. one of {examples}")


def attention_of(config: CompileConfig, topology: Topology) -> Attention:
    """Return the attention kernel to compile: `config.attention`, but "xla" for "auto" on GPUs.

    jax can't query which attention calls the cuDNN of an unattached GPU supports.
    """
    if config.attention == "auto" and topology.platform == "cuda":
        return "xla"
    return config.attention
