"""RunConfig: everything that defines a pretraining run."""

import ast
import dataclasses
from typing import Any, Literal, get_type_hints

from thoughtbubbles import ModelConfig, PrefixRank, Threshold, TopK
from thoughtbubbles.positions import RopeScaling
from train.data import DataConfig
from train.devices.attention import Attention
from train.devices.distributed import DistributedConfig
from train.devices.mesh import MeshConfig
from train.engine.optim import OptimizerConfig
from train.runs.instruments import parse_window


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Held-out evaluation.

    Attributes:
        every: steps between evaluations during the run (0: only at the end).
        rows: validation rows scored, spread over the split (0: all).
        positions: how many are scored prefix-only if the model is not causal (0: all).
    """

    every: int = 100
    rows: int = 256
    positions: int = 256

    def __post_init__(self):
        if min(self.every, self.rows) < 0 or self.positions < 0 or self.positions == 1:
            raise ValueError(
                f"every={self.every} rows={self.rows} positions={self.positions}: choose 0 or more "
                "(positions: 0 or at least 2)"
            )


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """Pretrained weights that a run starts from.

    Model and tokenizer are then theirs; of the run's `model` only how to compute is taken, `dtype`,
    `scan_layers` and `remat`.

    Attributes:
        weights: "smollm2", a Hugging Face folder, or a .gguf file; "" for random ones.
        forks: blocks that new fork layers go in front of (`thoughtbubbles.retrofit`).
        policy: of these fork layers.
    """

    weights: str = ""
    forks: tuple[int, ...] = ()
    policy: TopK | PrefixRank | Threshold = PrefixRank()

    def __post_init__(self):
        if self.forks and not self.weights:
            raise ValueError(
                f"init.forks={self.forks} go into pretrained weights: add --init.weights, or "
                "choose model.fork_layers"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """What every training run has.

    Attributes:
        steps: optimizer steps, each over `batch_size` rows in `accumulate` parts.
        seed: of the initial parameters.
        out: run folder (config, checkpoints, metrics); a run found there is continued.
        log_every, save_every: steps.
        keep, keep_every: checkpoints kept: the newest ones, and those at multiples for ever.
        attention: how attention is computed; "auto" takes the kernel of the mesh's devices.
        profile: record these steps with jax's profiler, e.g. "10:20" (`train.runs.instruments`).
        peak_tflops: of a device, for MFU, where `train.devices.hardware` does not know it.
        dry_run: only say what would be run.
    """

    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    distributed: DistributedConfig = DistributedConfig()
    evaluation: EvalConfig = EvalConfig()
    steps: int = 300
    batch_size: int = 16
    accumulate: int = 1
    seed: int = 0
    out: str = "runs/tiny"
    log_every: int = 10
    save_every: int = 100
    keep: int = 3
    keep_every: int | None = None
    attention: Attention = "auto"
    profile: str = ""
    peak_tflops: float | None = None
    dry_run: bool = False

    def __post_init__(self):
        for name in ("steps", "batch_size", "accumulate", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is below 1")
        if self.peak_tflops is not None and not self.peak_tflops > 0:
            raise ValueError(f"peak_tflops={self.peak_tflops} is not positive")
        if parse_window(self.profile)[0] > self.steps:
            raise ValueError(f"profile={self.profile!r} begins after steps={self.steps}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(LoopConfig):
    """A pretraining run.

    Attributes:
        train: all parameters, or only those of fork layers; the others stay as they are.
        prompt: start of the sample written at the end.
    """

    model: ModelConfig
    init: InitConfig = InitConfig()
    train: Literal["all", "forks"] = "all"
    data: DataConfig = DataConfig()
    prompt: str = "def "

    @property
    def step_flops(self) -> int:
        """Model FLOPs of a step: the matrix products of a forward pass, three times."""
        return 3 * self.batch_size * self.model.forward_flops(self.data.seq_len)


POLICIES = {policy.__name__: policy for policy in (TopK, PrefixRank, Threshold)}


def policy_from_text(text: str) -> TopK | PrefixRank | Threshold:
    """The policy that prints as `text`, e.g. `PrefixRank(ratio=1.5, window=64)`.

    Fields left out take their defaults, and so does a bare name.

    Raises:
        ValueError: no such policy or field, or a value of the wrong type.
    """
    try:
        call = ast.parse(text.strip(), mode="eval").body
        name, fields = call, []
        if isinstance(call, ast.Call) and not call.args:
            name, fields = call.func, call.keywords
        policy = POLICIES[getattr(name, "id", "")]
        types = get_type_hints(policy)
        values = {str(field.arg): _literal(field.value, types[str(field.arg)]) for field in fields}
        if len(values) < len(fields):
            raise TypeError("a field is given twice")
        return policy(**values)
    except (SyntaxError, TypeError, KeyError, RecursionError):
        choices = [
            f"{name}({', '.join(f'{f.name}={f.default}' for f in dataclasses.fields(policy))})"
            for name, policy in POLICIES.items()
        ]
        raise ValueError(f"policy {text!r}: choose one of {', '.join(choices)}") from None


def _literal(node: ast.expr, kind: Any) -> Any:
    try:
        value = ast.literal_eval(node)
    except ValueError:
        raise TypeError("not a literal") from None
    if kind is float and type(value) is int:
        return float(value)
    if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
        raise TypeError(f"{value!r} is not {kind}")
    return value


def as_json(config: Any) -> Any:
    """Nested dict of a config, tuples as lists and policies as text, as it comes from JSON."""
    if isinstance(config, tuple(POLICIES.values())):
        return repr(config)
    if dataclasses.is_dataclass(config):
        return {
            field.name: as_json(getattr(config, field.name)) for field in dataclasses.fields(config)
        }
    if isinstance(config, (list, tuple)):
        return [as_json(item) for item in config]
    return config


def model_from_json(fields: dict[str, Any]) -> ModelConfig:
    """The ModelConfig that `as_json` wrote; what older configs lack takes its default."""
    fields = dict(fields)
    policy = fields["policy"]
    # Before there were several policies, TopK's fields stood there.
    text = repr(TopK(**policy)) if isinstance(policy, dict) else policy
    fields["policy"] = policy_from_text(text)
    fields.setdefault("score_originals", True)  # the only way there was
    for name in ("fork_layers", "nope_layers"):
        fields[name] = tuple(fields.get(name, ()))
    if isinstance(fields.get("rope_scaling"), dict):
        fields["rope_scaling"] = RopeScaling(**fields["rope_scaling"])
    return ModelConfig(**fields)


# What must stay equal when a run is continued. Of the rest, changes of NOTED are told: steps move
# the schedule, the others the order of float additions.
FIXED = (
    "train", "task", "method", "weights", "model", "init", "lora", "memgen", "boundaries", "data",
    "optimizer", "batch_size", "seed",
    # of reinforcement learning
    "advantage", "clip_low", "clip_high", "dual_clip", "aggregate", "kl",
    "importance_cap", "filter_groups", "rollouts", "minibatches", "epochs", "max_new_tokens",
    "temperature", "chat", "max_batches", "advantage_clip", "gamma", "overlong_buffer",
    "overlong_penalty", "max_turns", "max_observation", "carry", "penalty", "trigger",
)  # fmt: skip
FREE_IN = {"model": ("scan_layers", "remat"), "data": ("cache_dir",)}
NOTED = ("steps", "accumulate", "mesh", "attention")


def differences(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Fields that keep a run from being continued, as `name: saved x, now y`."""
    if "model" in saved and "model" in current:  # of pretraining
        older: dict[str, Any] = {"init": as_json(InitConfig()), "train": "all"}
        saved = older | saved | {"optimizer": as_json(OptimizerConfig()) | saved["optimizer"]}
        saved, current = (
            config | {"model": _comparable(config["model"])} for config in (saved, current)
        )
    found = []
    for name in FIXED:
        found += _differences(name, saved.get(name), current.get(name), FREE_IN.get(name, ()))
    return found


def noted_changes(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Allowed changes after which the run is no longer the one that was begun.

    Args:
        saved, current: metadata of a checkpoint, and of the run that goes on from it: `config`, and
            under `resolved` what some of its options came to (older checkpoints lack it).
    """
    before, now = ({"attention": "auto"} | meta["config"] for meta in (saved, current))
    if "resolved" in saved:
        before, now = before | saved["resolved"], now | current["resolved"]
    found = [_differences(name, before.get(name), now.get(name), ()) for name in NOTED]
    return [line for lines in found for line in lines]


def _comparable(model: dict[str, Any]) -> dict[str, Any]:
    """Read and written again, so that an older form, or 2 for 2.0, is no difference."""
    fields = as_json(model_from_json(model))
    if not fields["fork_layers"]:  # a plain decoder has no policy, whatever stands there
        del fields["policy"], fields["score_originals"]
    return fields


def _differences(name: str, saved: Any, current: Any, free: tuple[str, ...]) -> list[str]:
    if isinstance(saved, dict) and isinstance(current, dict):
        names = [key for key in {**saved, **current} if key not in free]
        found = [_differences(f"{name}.{k}", saved.get(k), current.get(k), ()) for k in names]
        return [line for lines in found for line in lines]
    return [] if saved == current else [f"{name}: saved {saved!r}, now {current!r}"]
